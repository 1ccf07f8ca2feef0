"""The emoji study on a model of no training: its plan, and two rows from the command to the report."""

import dataclasses
import json
import re

import pytest
import torch
from commands import ROOT, run

from backbones.prompts import read_prompts
from common import registry
from examples import emoji
from examples.emoji import data, judge, pipeline, train_judge, train_pixart, train_vae
from examples.emoji.state import write_folder
from study import emoji_plan, measure, plan, subjects
from study.measure import Measurement
from study.plan import Speed
from study.store import Study
from training.arguments import parse_args as parse_training

pytest.importorskip("transformers", reason="pip install transformers: diffusers' pipelines need it")


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The example with tiny models and a judge of no training."""
    torch.manual_seed(0)
    model = train_pixart.build_pixart(24, 2, 2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    train_vae.build_vae((8, 8, 8)).save_pretrained(tmp_path / "vae")
    write_folder(pipeline.assemble(model, tmp_path / "vae"), tmp_path / "pixart")
    own = dataclasses.replace(registry.text_models()[emoji.MODEL], folder=tmp_path / "pixart")
    monkeypatch.setattr(registry, "text_models", lambda: {emoji.MODEL: own})
    concepts = sorted({text.rpartition(",")[0] for text in read_prompts(judge.STUDY_PROMPTS)})
    places = torch.nn.functional.normalize(torch.randn(len(concepts), judge.TEXT_CHANNELS), dim=1)
    pictures = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8).numpy()
    known = data.EmojiData(pictures, None, None, torch.zeros(4).numpy(), concepts, concepts)
    train_judge.write(judge.ImageEncoder(), places, known, tmp_path / "judge.safetensors")
    monkeypatch.setattr(judge, "WEIGHTS", tmp_path / "judge.safetensors")
    caches = (subjects.parts, subjects.judge, subjects.fingerprint, plan.random_cur)
    for one in caches:
        one.cache_clear()
    yield
    for one in caches:
        one.cache_clear()


@pytest.mark.usefixtures("example")
@pytest.mark.parametrize("scale", [emoji_plan.FULL, emoji_plan.QUICK])
def test_plan_is_in_order_and_its_commands_are_understood(tmp_path, scale):
    tasks, known = emoji_plan.plan(tmp_path, scale), set()
    for task in tasks:
        assert set(task.needs) <= known
        assert task.id not in known
        known.add(task.id)
        if task.is_training:
            args = parse_training([*task.arguments, "--results-dir", str(tmp_path)])
            assert str(args.prompts).endswith("train.txt")
        else:
            asked = Measurement.from_arguments(measure.parse_args(task.arguments))
            assert (asked.subject, asked.sampling.cfg_scale) == (subjects.EMOJI, 4.5)
            assert asked.sampling.sampler == task.row.sampler
    rows = [task.row for task in tasks if task.row]
    methods = {"fewer-steps", "fora", "fora-released", "taylor2-fora", "random", "harmonica", "l2c"}
    methods |= {"harmonica-paper", "calibrated-harmonica", "end-to-end", emoji_plan.FORECAST}
    for num_steps, speeds in scale.speeds.items():
        for speed in speeds if num_steps != 100 else []:
            found = {row.method for row in rows if (row.num_steps, row.speed) == (num_steps, speed.name)}
            assert found >= methods - ({"l2c"} if speed.l2c_target is None else set())


@pytest.mark.slow
@pytest.mark.usefixtures("example")
def test_rows_are_measured_and_reported(tmp_path, monkeypatch):
    speed = Speed(2.0, "2", "2", 2)
    scale = dataclasses.replace(
        emoji_plan.QUICK, samples=6, samples_in_readme=6, updates={4: 1}, seeds={4: 1}, speeds={4: [speed]}
    )
    router = emoji_plan.step_by_step(scale, "harmonica", 4, speed.target, 0, emoji_plan.MAIN)
    facts = emoji_plan.COMMON | {"sampler": emoji_plan.MAIN}
    rows = [
        next(plan.untrained(4, speed, **facts)), plan.routed(router, "harmonica", 4, speed, 0, **facts)
    ]  # fmt: skip
    monkeypatch.setattr("study.emoji_plan.plan", lambda folder, _: plan.tasks(rows, folder, scale))
    monkeypatch.setattr("study.measure.LATENCY_BATCH", 2)
    monkeypatch.setattr("study.run.concurrent.futures.ProcessPoolExecutor", Here)
    monkeypatch.chdir(ROOT)
    run("study.run", "--example", "emoji", "--quick", "--results-dir", tmp_path / "s", "--processes", 1)
    found = json.loads((tmp_path / "s" / "study.json").read_text())
    assert found["model"] == "PixArt-emoji"
    uncached, fora, harmonica = found["rows"]
    for row in found["rows"]:
        assert (row["example"], row["samples"], row["cfg_scale"]) == ("emoji", 6, 4.5)
        assert {"retrieval", "retrieval_uncached", "clip", "fd_data", "fd_uncached", "style"} <= row.keys()
        assert row["latency_ms"] > 0
    assert uncached["mse"] == 0 < fora["mse"]
    assert harmonica["train_command"].startswith("python train_router.py --model PixArt-emoji --prompts")
    table = (tmp_path / "s" / "table.md").read_text()
    assert "| retrieval | style | CLIP |" in table
    assert "digits" not in table
    record = Study(tmp_path / "s").rows.read()[fora["id"]]
    assert measure.strip(subjects.EMOJI, record["images"]).shape == (6, 64, 64, 3)
    assert "Images" in (tmp_path / "s" / "report.html").read_text()
    words = fora["command"].split()[3:]
    again = json.loads(re.findall(r"^{.*}$", run("study.measure", *words, "--repeats", 0), re.MULTILINE)[-1])
    for figure in ("mse", "fd_uncached", "clip", "retrieval", "speedup_macs"):
        assert again[figure] == pytest.approx(fora[figure], rel=1e-3), figure


class Here:
    """The pool of processes as this process."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def submit(self, function, *arguments):
        from concurrent.futures import Future

        future = Future()
        future.set_result(function(*arguments))
        return future
