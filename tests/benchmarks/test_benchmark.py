import json
import shutil

import pytest
from commands import error_line, run

from backbones.loading import load_model
from benchmarks.training_cost import COMPILED
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


@pytest.mark.slow
@pytest.mark.timed
def test_training_is_counted_in_forward_passes():
    text = run("benchmark.py", *TINY, "--num-sampling-steps", 8, "--batch-size", 8, "--train")
    rows = {row["case"]: row for row in json.loads(text.splitlines()[-1])["rows"]}
    assert rows["forward"]["forwards"] == 1
    assert rows["update"]["forwards"] < rows["update, backbone gradients"]["forwards"]
    assert 2 < rows["update"]["forwards"] < 8
    assert rows["refresh"]["of_naive"] < 0.8  # 36 of 64 steps, and what blending costs
    memory = {name: row["peak_mb_on_top"] for name, row in rows.items()}
    assert memory["forward"] < memory["update"] < memory["update, backbone gradients"]
    assert memory["update, branches recomputed"] < memory["update"]
    assert memory["end-to-end"] < memory["end-to-end, kept"]
    assert rows["end-to-end, search"]["forwards"] > rows["end-to-end"]["forwards"]  # three backward passes


@pytest.mark.slow
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
