"""No option is without effect in silence: every command, every method, every flag that the parser knows.

Each pair of a method and a flag is run, small, and compared with the run without the flag: what was
trained, sampled, written, printed, or asked of what stands in for models, compilers and devices. Either
something differs, or the command says that the flag has no effect, and not both.
"""

import argparse
import contextlib
import copy
import dataclasses
import importlib
import json
import os
import re
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from commands import run
from PIL import Image
from safetensors.torch import load_file

from common.distributed import Processes
from end_to_end.trajectory import ReferenceTrajectory
from models import DiT
from router import Router, load_router, save_router
from sampling import loop as sampling
from schedules.baselines import fora_schedule
from schedules.table import METHODS, REUSES, split_name
from schedules.table import flags_of as flags_of_method
from study import measure
from training import arguments, data

STEPS = 3
NOT_FLAGS = ("help", "samples")


def flags_of(module: str, monkeypatch) -> dict[str, argparse.Action]:
    """What the command's parser knows, by name."""
    seen = []

    def parse(parser, _=None):
        seen.extend(parser._actions)
        raise SystemExit

    with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr("common.cli.parse", parse)
        patch.setattr("sys.argv", [module])
        importlib.import_module(module).parse_args()
    return {action.dest: action for action in seen if action.dest not in NOT_FLAGS}


def words_for(action: argparse.Action, values: dict) -> list[str]:
    """The flag with a value that is not its default; a flag that is not listed gets one that may do."""
    flag = action.option_strings[0]
    if action.nargs == 0:
        return [flag]
    if action.dest in values:
        given = values[action.dest]
        return [flag, *map(str, given if isinstance(given, list) else [given])]
    if action.choices:
        return [flag, str(next(one for one in action.choices if one != action.default))]
    return [flag, "2"]


def without(words: list, flag: str) -> list:
    """The words but for a flag and its value, which another one excludes or stands for."""
    words = list(map(str, words))
    if flag in words:
        at = words.index(flag)
        del words[at : at + 2]
    return words


class Outcome(dict):
    """What a run did, as text, in comparable pieces."""

    def differs(self, other: "Outcome") -> list[str]:
        return [name for name in self.keys() | other.keys() if self.get(name) != other.get(name)]


def noted(text: str, dest: str) -> bool:
    return f"--{dest.replace('_', '-')} has no effect" in text


def check(base: Outcome, own: Outcome, dest: str) -> str | None:
    """What is wrong with a flag, None: nothing."""
    changed, said = base.differs(own), noted(own["notes"], dest)
    changed = [name for name in changed if name != "notes"]
    if changed and said:
        return f"--{dest} is said to have no effect but changes {changed}"
    if not changed and not said:
        return f"--{dest} has no effect, in silence"
    return None


# ---- training --------------------------------------------------------------------------------------

HARMONICA = ["--max-steps", 6, "--lambda-c", 50, "--lr", 0.1]
L2C = ["--method", "l2c", "--data", "IMAGES", "--max-steps", 3, "--lr", 0.1]
END_TO_END = ["--method", "end-to-end", "--target-speedup", 1.5]
TRAININGS = {
    "harmonica": HARMONICA,
    "harmonica without a proxy": [*without(HARMONICA, "--lambda-c"), "--proxy", "none"],
    "harmonica without a weight": [*HARMONICA, "--l1", 0],
    "harmonica with a target": [*HARMONICA, "--target-cur", 0.3],
    "harmonica at random weights": [*HARMONICA, "--random-weights"],
    "harmonica resumed": [*HARMONICA, "--resume", "RUN"],
    "l2c": L2C,
    "l2c on latents": [*L2C, "--data", "LATENTS"],
    "l2c without a weight": [*L2C, "--l1", 0],
    "end-to-end": [*END_TO_END, "--search-samples", 4, "--max-steps", 4],
    "end-to-end without weights of reuse": [*END_TO_END, "--search-samples", 4, "--terms", 0],
    "end-to-end, grown": [*END_TO_END, "--search", "grow", "--max-steps", 7],
    "end-to-end, grown without weights of reuse": [
        *END_TO_END,
        "--search",
        "grow",
        "--max-steps",
        6,
        "--terms",
        0,
    ],
}
TRAIN_VALUES = {
    "model": "DiT-S/8", "ckpt": "x.pt", "image_size": 512, "num_classes": 7, "num_sampling_steps": 4,
    "cfg_scale": 3, "ste_threshold": 0.45, "lambda_c": 3, "l1": 0.5, "target_cur": 0.35,
    "target_speedup": 1.3, "lr": 0.3, "epochs": 1, "max_steps": 9, "global_batch_size": 8,
    "trajectories": 3, "global_seed": 7, "results_dir": "elsewhere", "log_every": 3, "ckpt_every": 2,
    "resume": "RUN", "terms": 2, "search": "grow", "search_samples": 9,
    "init": "ROUTER",
    "pool": 8, "moments_weight": 2, "window": 2,
    "open_share": 0.5, "data": "OTHER", "groups": 2, "vae": "mse", "num_works": 1, "device": "cpu",
    "local_rank": 3, "precision": "bf16",
}  # fmt: skip
EXCLUDES = {
    "trajectories": ["--global-batch-size"], "target_cur": ["--target-speedup"],
    "target_speedup": ["--target-cur"],
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Data and files that the commands above name."""
    folder, generator = tmp_path_factory.mktemp("places"), np.random.default_rng(0)
    for images in ("IMAGES", "OTHER"):
        for label in range(5):
            (folder / images / str(label)).mkdir(parents=True)
            pixels = generator.integers(0, 256, (32, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / images / str(label) / "x.png")
    latents = generator.normal(size=(6, 4, 4, 4)).astype(np.float32)
    np.savez(folder / "LATENTS.npz", latents=latents, labels=np.arange(6) % 5)
    logits = torch.where(fora_schedule(6, 4, 2).compute, 3.0, -3.0)
    save_router(folder / "ROUTER.safetensors", Router.from_logits(logits))
    return folder


def at(words: list, places) -> list[str]:
    names = {"IMAGES": "IMAGES", "OTHER": "OTHER", "LATENTS": "LATENTS.npz", "ROUTER": "ROUTER.safetensors"}
    return [str(places / names[word]) if word in names else str(word) for word in words]


class FakeVae:
    def encode(self, x):
        mean = torch.nn.functional.avg_pool2d(x, 8).mean(1, keepdim=True).repeat(1, 4, 1, 1)
        posterior = type("Posterior", (), {"mean": mean, "std": torch.zeros_like(mean)})
        return type("Encoded", (), {"latent_dist": posterior})


@dataclasses.dataclass(frozen=True)
class FakeConfig:
    """Stands for what a VAE's folder says of it."""

    spec: str
    factor: int = 8

    def check_encoder(self) -> None:
        pass

    def load(self, *_, **__) -> FakeVae:
        return FakeVae()


@contextlib.contextmanager
def watched(monkeypatch, tiny_model):
    """Stands for models, compilers, devices and pictures; yields what was asked of them."""
    asked: dict[str, list] = {}

    def note(name, answer=None):
        def called(*given, **named):
            asked.setdefault(name, []).append(repr((given, sorted(named.items()))))
            return answer(*given, **named) if callable(answer) else answer

        return called

    def load(*_, **__):
        return copy.deepcopy(tiny_model)

    rollout, batches = ReferenceTrajectory.rollout, data.numbered_batches

    def noting_rollout(self, cache, recompute=False, window=None):
        asked.setdefault("recompute", []).append(str(recompute))
        return rollout(self, cache, recompute, window)

    def noting_batches(*given):
        asked.setdefault("workers", []).append(str(given[-1]))
        return batches(*given[:-1], 0)

    def noting(function):
        def called(model, *_):
            del model
            asked.setdefault(function, []).append("")

        return called

    with monkeypatch.context() as patch, mock.patch.dict(os.environ):
        os.environ.pop("LOCAL_RANK", None)
        patch.setattr("backbones.settings.load_model", note("model", load))
        config = note("vae", lambda spec: None if spec == "none" else FakeConfig(spec))
        for module in ("backbones.settings", "training.rounds"):
            patch.setattr(f"{module}.read_vae_config", config)
        patch.setattr("common.distributed.start", note("device", Processes(0, 1, torch.device("cpu"))))
        patch.setattr("common.devices.choose_device", note("device", torch.device("cpu")))
        for name in ("compile_branches", "recompute_branches", "quantize"):
            patch.setattr(f"execution.{name}", noting(name))
        patch.setattr("torch.compile", lambda function, **_: function)
        patch.setattr("backbones.settings.find_checkpoint", lambda *_, **__: "official")
        patch.setattr("training.logs.start_wandb", note("wandb", mock.MagicMock()))
        patch.setattr("end_to_end.trajectory.ReferenceTrajectory.rollout", noting_rollout)
        patch.setattr("training.rounds.numbered_batches", noting_batches)
        patch.setattr("end_to_end.rounds.GROWTHS", 1)  # a search of four steps
        patch.setattr("end_to_end.rounds.EXCHANGES", 1)
        yield asked


def trained(words: list, folder, monkeypatch, tiny_model, resumed=None) -> Outcome:
    """Run a training in a folder of its own; its results lie there, or in the run that it resumed."""
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    with watched(monkeypatch, tiny_model) as asked:
        text = run("train_router.py", *words, status=ANY)
        local_rank = os.environ.get("LOCAL_RANK")
    outcome = Outcome(notes="\n".join(line for line in text.splitlines() if line.startswith("warning")))
    outcome["asked"], outcome["local rank"] = json.dumps(asked, sort_keys=True), str(local_rank)
    outcome["errors"] = "".join(re.findall("error: .*", text))
    for file in [*sorted(folder.rglob("*")), *sorted(resumed.rglob("*") if resumed else ())]:
        name = str(file.relative_to(folder if folder in file.parents else resumed.parent))
        if file.suffix == ".safetensors":
            facts = {k: v for k, v in load_router(file).info.items() if k not in ("path", "settings")}
            tensors = {k: v.tolist() for k, v in load_file(file).items()}
            outcome[name] = json.dumps([facts, tensors], sort_keys=True)
        elif file.name == "metrics.jsonl":
            rows = [json.loads(line) | {"steps_per_second": 0} for line in file.read_text().splitlines()]
            outcome[name] = json.dumps(rows)
        elif file.is_dir():
            outcome[name] = "folder"
    return outcome


class _Any:
    def __eq__(self, _):
        return True

    __hash__ = None


ANY = _Any()  # exit status: a flag that ends the command has an effect


QUICK = ("harmonica",)


@pytest.mark.parametrize(
    "training",
    [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow, pytest.mark.exhaustive])
        for name in TRAININGS
    ],
)
def test_every_flag_of_a_training_does_something_or_is_said_not_to(
    training, places, tmp_path, monkeypatch, tiny_model
):
    base = [*at(TRAININGS[training], places), "--num-sampling-steps", STEPS, "--log-every", 2]
    base = list(map(str, [*base, "--global-batch-size", 4, "--ckpt-every", 50]))
    start, first = tmp_path / "start", [] if "end-to-end" in base else ["--max-steps", 2]
    trained([*without(base, "--resume"), *first], start, monkeypatch, tiny_model)
    (ran,) = (start / "results").iterdir()

    def outcome(words: list, name: str) -> Outcome:
        """Of words that may name the run RUN, which stays as it is."""
        backup = shutil.copytree(ran, ran.with_name("backup"))
        own = [str(ran) if word == "RUN" else word for word in words]
        found = trained(own, tmp_path / name, monkeypatch, tiny_model, ran if "RUN" in words else None)
        shutil.rmtree(ran)
        backup.rename(ran)
        return found

    plain, wrong = outcome(base, "plain"), []
    for dest, action in flags_of("train_router", monkeypatch).items():
        flag, own_base, own_plain = action.option_strings[0], base, plain
        own_words = at(words_for(action, TRAIN_VALUES | {"method": method_other_than(base)}), places)
        if own_words == base[base.index(flag) :][: len(own_words)] if flag in base else False:
            continue  # it is there already
        if set(EXCLUDES.get(dest, [])) & set(base):
            for other in EXCLUDES[dest]:
                own_base = without(own_base, other)
            own_plain = outcome(own_base, f"plain for {dest}")
        wrong.append(check(own_plain, outcome([*own_base, *own_words], dest), dest))
    assert not list(filter(None, wrong))


def method_other_than(words: list[str]) -> str:
    return "harmonica" if "end-to-end" in words else "end-to-end"


# ---- sampling --------------------------------------------------------------------------------------

NEEDS = {"steps": 2, "interval": 2, "cur": 0.4, "path": "ROUTER", "full_steps": 2}
TOLERANCES = {"first-block": 1.1, "dbcache": 1.5, "teacache": 1.1, "magcache": 1.25}  # of the tiny model
SAME_PLAN = {("budcache", "plan_samples"), ("budcache", "evaluations")}  # the tiny model's best plan is clear
SMALLER = {"dbcache": ["--first-blocks", "1", "--warm-up", "2"]}  # its defaults are for deeper models
# Every schedule alone, and every kind of reuse under one of them: flags of both do not meet.
SAMPLED = [*METHODS, *(f"{reuse}-fora" for reuse in REUSES)]
SAMPLE_VALUES = {
    "model": "DiT-S/8", "ckpt": "x.pt", "image_size": 512, "num_classes": 7, "num_sampling_steps": "ddim5",
    "cfg_scale": 3, "seed": 7, "cache_dtype": "bf16", "labels": [1, 2], "batch_size": 1,
    "path": "OTHER_ROUTER", "thres": 0.6, "interval": 3, "anchor": "last",
    "cur": 0.6, "schedule_seed": 5, "steps": 1, "order": 2, "calibrate": 9, "terms": 1, "tolerance": 0.01,
    "full_steps": 4, "plan_samples": 1, "evaluations": 3,
    "most_reused": 1, "warm_up": 3, "rescale": 0, "most_skipped": 1, "retention": 0.6,
    "output": "y.png", "save_latents": "y.npz", "repeats": 1, "vae": "mse", "precision": "bf16",
    "device": "cpu", "local_rank": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def routers(places):
    """ROUTER and OTHER_ROUTER: schedules of six steps whose scores lie on both sides of 0.6."""
    for number, name in enumerate(("ROUTER", "OTHER_ROUTER")):
        logits = 4 * torch.randn(6, 4, generator=torch.Generator().manual_seed(number))
        save_router(places / f"{name}-6.safetensors", Router.from_logits(logits), method="l2c", threshold=0.1)
    return places


def needed_by(method: str, places) -> list[str]:
    """The flags that a method cannot do without."""
    words = ["--accelerate-method", method, *SMALLER.get(method, [])]
    for flag in flags_of_method(method):
        if flag.needed:
            words += [
                flag.option,
                str((NEEDS | {"tolerance": TOLERANCES.get(split_name(method)[1])})[flag.name]),
            ]
    words += ["--calibrate", "3"] if method.startswith("calibrated") else []  # quicker than the default
    return [str(places / f"{word}-6.safetensors") if "ROUTER" in word else word for word in words]


def sampled(words: list, folder, monkeypatch, tiny_model) -> Outcome:
    """Run sample.py; what it drew, and how it was asked to."""
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    drawn, batches = [], []

    def drawing(trajectory, labels, seed, batch_size, *others, **options):
        batches.append((len(labels), batch_size))
        return sampling.generate_seeded(trajectory, labels, seed, batch_size, *others, **options)

    with watched(monkeypatch, tiny_model) as asked, monkeypatch.context() as patch:
        patch.setattr("sample.generate_seeded", drawing)
        patch.setattr("sample.decode", lambda x_0, *_: torch.zeros(len(x_0), 8, 8, 1, dtype=torch.uint8))
        patch.setattr(
            "sample.save", lambda args, x_0, *_: drawn.append((x_0, args.output, args.save_latents))
        )
        text = run("sample.py", *words, status=ANY)
        local_rank = os.environ.get("LOCAL_RANK")
    outcome = Outcome(notes="\n".join(line for line in text.splitlines() if line.startswith("warning")))
    outcome["asked"], outcome["local rank"] = json.dumps(asked, sort_keys=True), str(local_rank)
    outcome["errors"], outcome["batches"] = "".join(re.findall("error: .*", text)), str(batches)
    for x_0, *files in drawn:
        outcome["files"] = str(files)
        outcome["drawn"] = json.dumps({name: one.tolist() for name, one in x_0.items()})
    outcome["sampler"] = "".join(re.findall("^DD.*", text, re.MULTILINE))
    return outcome


SWEEP = [pytest.mark.slow, pytest.mark.exhaustive]
QUICK_METHODS = (
    "none",
    "fewer-steps",
    "fora",
    "dynamiclayer",
    "first-block",
    "taylor-fora",
    "calibrated-fora",
)


@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=[] if name in QUICK_METHODS else SWEEP) for name in SAMPLED],
)
def test_every_flag_of_sampling_does_something_or_is_said_not_to(
    method, routers, tmp_path, monkeypatch, tiny_model
):
    base = [*needed_by(method, routers), "--num-sampling-steps", "6", "--repeats", "0"]
    plain, wrong = sampled(base, tmp_path / "plain", monkeypatch, tiny_model), []
    assert not plain["errors"]
    assert "drawn" in plain
    for dest, action in flags_of("sample", monkeypatch).items():
        another = "none" if method == "fewer-steps" else "fewer-steps"  # which lacks its --steps: an error
        words = words_for(action, SAMPLE_VALUES | {"accelerate_method": another})
        words = [str(routers / f"{word}-6.safetensors") if "ROUTER" in word else word for word in words]
        own = sampled([*base, *words], tmp_path / dest, monkeypatch, tiny_model)
        if (method, dest) not in SAME_PLAN:
            wrong.append(check(plain, own, dest))
    assert not list(filter(None, wrong))


def noted_by(module: str, words: list[str], monkeypatch) -> list[str]:
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", [module, *words])
        return importlib.import_module(module).parse_args().notes


@pytest.mark.parametrize("method", SAMPLED)
def test_all_sampling_commands_note_the_same(method, places, monkeypatch):
    """sample.py is run above; the others read the method's flags through the same function."""
    base = needed_by(method, places)
    commands = ("sample", "sample_ddp", "study.measure")
    flags = [flags_of(module, monkeypatch) for module in commands]
    for dest in (
        flags[0].keys() & flags[1].keys() & flags[2].keys() - {"accelerate_method", "p_sample", "sampler"}
    ):
        own = without(base, "--tolerance") if dest == "target_speedup" else base  # they exclude each other
        words = [*own, *words_for(flags[0][dest], SAMPLE_VALUES)]
        notes = [noted_by(module, words, monkeypatch) for module in commands]
        assert notes[0] == notes[1] == notes[2], dest


# ---- the others ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "words", "unread"),
    [
        ("benchmark", ["--cache-dtype", "bf16"], ["cache-dtype"]),
        ("benchmark", ["--methods", "fewer-steps:10", "none", "--cache-dtype", "bf16"], ["cache-dtype"]),
        ("benchmark", ["--methods", "none", "taylor-fora:2", "--cache-dtype", "bf16"], []),
        ("benchmark", ["--methods", "digits-T20-1.96x", "--cache-dtype", "fp32"], []),
        ("evaluate", ["x.npz", "--paired", "y.npz", "--features", "inception"], ["features"]),
        ("evaluate", ["x.npz", "--paired", "y.npz", "--device", "cpu"], ["device"]),
        ("evaluate", ["x.npz", "--paired", "y.npz", "--device", "cpu", "--lpips-weights", "w"], []),
        ("evaluate", ["x.npz", "--reference", "y.npz", "--lpips-weights", "w"], ["lpips-weights"]),
        ("evaluate", ["x.npz", "--reference", "y", "--features", "digits", "--inception-weights", "w"],
         ["inception-weights"]),
        ("evaluate", ["x.npz", "--save-statistics", "y.npz", "--inception-weights", "w"], []),
        ("sample_ddp", ["--random-weights", "--ckpt", "x.pt"], ["ckpt"]),
        ("sample_ddp", ["--cache-dtype", "fp16", "--thres", "0.1"], ["cache-dtype", "thres"]),
    ],
)  # fmt: skip
def test_other_commands_say_what_they_do_not_read(module, words, unread, monkeypatch):
    notes = noted_by(module, words, monkeypatch)
    assert [note.split()[0].removeprefix("--") for note in notes] == unread


def test_what_a_model_or_a_router_leaves_without_effect_is_said(tmp_path, monkeypatch, routers):
    """Only they know: a model that predicts eps alone, a router without a score between two thresholds."""
    model = DiT(input_size=4, hidden_size=24, depth=2, num_heads=2, num_classes=5, learn_sigma=False)
    model = model.eval().requires_grad_(False)
    base = ["--num-sampling-steps", 3, "--max-steps", 2, "--global-batch-size", 2]
    plain = trained(base, tmp_path / "plain", monkeypatch, model)
    own = trained([*base, "--data-loss", "eps"], tmp_path / "own", monkeypatch, model)
    assert check(plain, own, "data_loss") is None
    assert noted(own["notes"], "data_loss")
    binary = torch.where(fora_schedule(6, 4, 2).compute, 3.0, -3.0)
    save_router(tmp_path / "r.safetensors", Router.from_logits(binary), threshold=0.1)
    words = ["--accelerate-method", "dynamiclayer", "--num-sampling-steps", 6, "--repeats", 0]
    words += ["--vae", "none", "--path"]
    with watched(monkeypatch, model):
        for path, threshold, said in (
            (tmp_path / "r.safetensors", 0.6, True),
            (tmp_path / "r.safetensors", 0.1, False),  # its own, as in the published command
            (tmp_path / "r.safetensors", 0.99, False),
            (routers / "ROUTER-6.safetensors", 0.6, False),
        ):
            text = run("sample.py", *words, path, "--thres", threshold, "--output", tmp_path / "x.png")
            assert (f"--thres {threshold} has no effect: no score lies between" in text) == said


def test_a_flag_at_its_default_value_is_noted_too(monkeypatch):
    """And set back: what is not read does not differ between two runs that are the same."""
    words = ["--proxy", "none", "--lambda-c", "500"]
    assert noted_by("train_router", words, monkeypatch) == [
        "--lambda-c has no effect with --proxy none: lambda stays at 1"
    ]
    args = arguments.parse_args(["--method", "l2c", "--data", "digits", "--cfg-scale", "4"])
    assert args.cfg_scale == 1


def test_measuring_takes_the_same_defaults_with_and_without_an_unread_flag():
    plain = vars(measure.parse_args([]))
    noted = vars(measure.parse_args(["--thres", "0.4", "--cache-dtype", "bf16"]))
    assert {name for name in plain if plain[name] != noted[name]} == {"notes", "given"}
