import json
import shutil
from functools import partial
from unittest import mock

import pytest
from commands import error_line, run
from tiny_pipeline import save_pipeline

import benchmark
from backbones import prompts
from backbones.loading import load_model
from backbones.pixart import random_pixart
from backbones.settings import ModelSettings
from benchmarks.training_cost import CASES, COMPILED
from schedules.baselines import fora_schedule

TINY = ["--model", "DiT-digits/2", "--cfg-scale", 1.5, "--repeats", 1, "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def _short_ceilings():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.timing.COPY_BYTES", 2**20)
        patch.setattr("common.timing.CEILING_RUNS", 2)
        yield


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    output = tmp_path_factory.mktemp("benchmark") / "x.json"
    arguments = ["--num-sampling-steps", 4, 6, "--batch-size", 1, 2, "--methods", "fora:2", "fewer-steps:2"]
    text = run("benchmark.py", *TINY, *arguments, "--output", output)
    last = json.loads(text.splitlines()[-1])
    assert json.loads(output.read_text()) == last
    return last


def test_every_setting_has_its_rows(found):
    settings = [(row["method"], row["num_steps"], row["batch_size"]) for row in found["rows"]]
    expected = [
        (method, 2 if method == "fewer-steps:2" else steps, batch)
        for steps in (4, 6)
        for batch in (1, 2)
        for method in ("none", "fora:2", "fewer-steps:2", "loop")
    ]
    assert settings == expected
    assert "threads" in found["hardware"]
    assert found["precision"] == "fp32"


def test_figures_fit_together(found):
    model = load_model("DiT-digits/2")
    facts = found["cards"]["2"]
    per_step = 2 * 2 * (sum(model.branch_macs) + model.other_macs) / 1e9
    assert facts["gmacs_per_step"] == pytest.approx(per_step)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    ceiling = facts["matmul_gmacs_per_second"]
    for row in found["rows"]:
        assert row["ms_least"] <= row["ms"] <= row["ms_most"]
        assert row["ratio"] == pytest.approx(row["speedup_latency"] / row["speedup_macs"])
    (own,) = [r for r in found["rows"] if (r["method"], r["num_steps"], r["batch_size"]) == ("fora:2", 4, 2)]
    schedule = fora_schedule(4, 24, 2)
    assert own["speedup_macs"] == pytest.approx(schedule.speedup_macs(model))
    assert own["cache_mb"] * 2**20 == 24 * 4 * model.branch_size * 4
    assert own["of_ceiling"] == pytest.approx(4 * schedule.macs(model) / own["ms"] / ceiling / 1e6)
    products = 4 * schedule.macs(model) / ceiling / 1e9
    read = (
        2 * 24 // 2 * (4 + 8) * 128**2 * 4 / facts["copy_gb_per_second"] / 1e9
    )  # of two steps, all branches
    assert own["floor_ms"] == pytest.approx(1e3 * max(products, read))
    fewer = [row for row in found["rows"] if row["method"] == "fewer-steps:2"]
    assert [row["speedup_macs"] for row in fewer] == [2, 2, 3, 3]


def test_the_hoisted_path_equals_the_loop(found):
    for row in found["rows"]:
        if row["method"] == "none":
            assert row["mse_to_loop"] < 1e-9


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    pytest.importorskip("transformers")
    return save_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.mark.slow
def test_prompts(pipeline, tmp_path, monkeypatch):
    """A folder with its weights, under a solver with a memory that adds noise."""
    monkeypatch.setattr(prompts, "FOLDER", tmp_path / "prompts")
    arguments = ["benchmark.py", "--model", pipeline, "--prompt", "a green heart", "red", *TINY[2:]]
    arguments += ["--sampler", "sa-solver", "--num-sampling-steps", 4, "--batch-size", 2]
    text = run(*arguments, "--methods", "fora:2")
    found = json.loads([line for line in text.splitlines() if line.startswith("{")][-1])
    assert (found["sampler"], found["weights"]) == ("sa-solver", str(pipeline / "transformer"))
    assert list(found["cards"]["2"]["gmacs_of_branch"]) == ["attn1", "attn2", "ff"]
    none, fora, loop = found["rows"]
    assert none["mse_to_loop"] < 1e-9
    model, _ = ModelSettings(str(pipeline), prompt=("a green heart", "red")).load()
    schedule = fora_schedule(4, 6, 2)
    assert fora["speedup_macs"] == pytest.approx(schedule.speedup_macs(model))
    assert fora["cache_mb"] * 2**20 == 6 * 4 * model.branch_size * 4
    assert loop["method"] == "loop"
    model.close()
    monkeypatch.setattr("benchmarks.training_cost._memory", lambda *_: 0)  # processes of their own
    run(*arguments, "--train", "--cases", "update, branches recomputed")


def test_a_known_model_has_random_weights_and_prompts(monkeypatch):
    small = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8}
    made = partial(random_pixart, cross_attention_dim=16, **small)
    monkeypatch.setattr("backbones.text_models.random_pixart", made)
    arguments = ["benchmark.py", "--model", "PixArt-alpha-256", "--num-sampling-steps", 2, *TINY[2:]]
    found = json.loads(run(*arguments, "--batch-size", 3).splitlines()[-1])
    assert [row["method"] for row in found["rows"]] == ["none", "loop"]
    assert found["weights"] == "random"


def test_methods_are_calibrated():
    methods = ["fora:2", "taylor-fora:2", "digits-T4-1.96x", "none"]
    words = [*TINY, "--num-sampling-steps", 4, "--batch-size", 1, "--calibrate", 3, "--methods"]
    found = json.loads(run("benchmark.py", *words, *methods[:1]).splitlines()[-1])
    assert [row["method"] for row in found["rows"]] == ["none", "calibrated-fora:2", "loop"]
    assert found["rows"][1]["cache_mb"] > found["rows"][0]["cache_mb"]
    with mock.patch("sys.argv", ["benchmark.py", *map(str, words), *methods]):
        chosen = benchmark.chosen_methods(benchmark.parse_args())
    router = "calibrated-dynamiclayer:digits-T4-1.96x"
    assert list(chosen) == ["none", "calibrated-fora:2", "taylor-fora:2", router]
    assert chosen[router].values["calibrate"] == chosen["calibrated-fora:2"].values["calibrate"] == 3
    assert "--calibrate has no effect" in run("benchmark.py", *words, "none")


def test_what_a_model_cannot_do_is_refused(pipeline):
    assert "needs --prompt TEXT" in error_line("benchmark.py", "--model", pipeline)
    line = error_line("benchmark.py", *TINY, "--class-dropout-prob", 0)
    assert "needs a null label" in line
    assert "predicts noise; take another --sampler" in error_line(
        "benchmark.py", *TINY, "--sampler", "flow-euler"
    )


def training_rows(*words):
    text = run("benchmark.py", *TINY, "--num-sampling-steps", 8, "--batch-size", 8, "--train", *words)
    return {row["case"]: row for row in json.loads(text.splitlines()[-1])["rows"]}


@pytest.mark.slow
@pytest.mark.timed
def test_training_is_counted_in_forward_passes(monkeypatch):
    monkeypatch.setattr("benchmarks.training_cost._memory", lambda *_: 0)  # a fresh process for each case
    rows = training_rows()
    assert set(rows) == set(CASES)
    assert rows["forward"]["forwards"] == 1
    assert rows["update"]["forwards"] < rows["update, backbone gradients"]["forwards"]
    assert 2 < rows["update"]["forwards"] < 8
    assert rows["refresh"]["of_naive"] < 0.8  # 36 of 64 steps, and what blending costs
    assert rows["end-to-end, search"]["forwards"] > rows["end-to-end"]["forwards"]  # three backward passes


@pytest.mark.slow
def test_memory_of_training_is_measured_apart():
    updates = ("update", "update, backbone gradients", "update, branches recomputed")
    rows = training_rows("--cases", *updates, "end-to-end", "end-to-end, kept")
    memory = {name: row["peak_mb_on_top"] for name, row in rows.items()}
    assert memory["forward"] < memory["update"] < memory["update, backbone gradients"]
    assert memory["update, branches recomputed"] < memory["update"]
    assert memory["end-to-end"] < memory["end-to-end, kept"]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_training_is_measured_compiled():
    arguments = ["--num-sampling-steps", 3, "--batch-size", 1, "--train", "--compile", "--cases", *COMPILED]
    text = run("benchmark.py", *TINY, *arguments)
    rows = {row["case"]: row for row in json.loads(text.splitlines()[-1])["rows"]}
    assert set(rows) == {"forward", *COMPILED}
    assert rows["update, compiled"]["forwards"] > 0


def test_cases_of_training_are_chosen(monkeypatch):
    monkeypatch.setattr("benchmarks.training_cost._memory", lambda *_: 0)  # a fresh process for each case
    arguments = ["--num-sampling-steps", 2, "--batch-size", 1, "--train", "--cases", "update"]
    text = run("benchmark.py", *TINY, *arguments)
    assert [row["case"] for row in json.loads(text.splitlines()[-1])["rows"]] == ["forward", "update"]
    assert "--cases requires --train" in run("benchmark.py", *TINY, "--cases", "update", status=2)
    compiled = run("benchmark.py", *TINY, *arguments[:-1], "update, compiled", status=2)
    assert "needs --compile" in compiled


def test_what_training_does_not_read_is_refused():
    for flags, word in ((["--cuda-graph"], "no --cuda-graph"), (["--batch-size", 1, 2], "no --batch-size")):
        assert word in run("benchmark.py", *TINY, "--train", *flags, status=2)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("fora", "fora:INTERVAL"),
        ("none:2", "write none"),
        ("fora:0.5", "below 1"),
        ("no-such-router", "does not exist"),
    ],
)
def test_unknown_methods_are_refused(spec, words):
    assert words in error_line("benchmark.py", *TINY, "--num-sampling-steps", 4, "--methods", spec)
