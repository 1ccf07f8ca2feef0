"""Text-to-image models through the commands: sampling, training, resuming, many samples."""

import itertools
import json
import os
import shutil
import signal
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from commands import error_line, run
from ranks import run_on_ranks
from tiny_pipeline import save_pipeline

from backbones import prompts
from backbones.settings import ModelSettings
from router import load_router
from training.checkpoints import write_checkpoint

pytest.importorskip("transformers")
T = 4


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def encoded(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("prompts")


@pytest.fixture(autouse=True)
def _own_folder(encoded, monkeypatch):
    monkeypatch.setattr(prompts, "FOLDER", encoded)


@pytest.fixture
def texts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a green heart\nred apple\n\na heart style\n")
    return path


def training(pipeline: Path, texts: Path, results: Path, *more) -> list:
    return [
        "train_router.py", "--model", pipeline, "--prompts", texts, "--num-sampling-steps", T,
        "--cfg-scale", 4.5, "--trajectories", 2, "--results-dir", results, "--log-every", 4,
        "--ckpt-every", 8, *more,
    ]  # fmt: skip


def logits(results: Path) -> torch.Tensor:
    (folder,) = results.iterdir()
    return load_router(folder).logits


@pytest.mark.parametrize("sampler", ["dpm-solver++", "ddim", "iddpm", "sa-solver"])
def test_sampling(pipeline, tmp_path, sampler):
    output = run(
        "sample.py", "--model", pipeline, "--prompt", "a green heart", "red apple", "--sampler", sampler,
        "--num-sampling-steps", T, "--cfg-scale", 4.5, "--accelerate-method", "fora", "--interval", 2,
        "--compare", "--repeats", 0, "--output", tmp_path / "x.png", "--save-latents", tmp_path / "x.npz",
    )  # fmt: skip
    assert "attn1 4 / 8, attn2 4 / 8, ff 4 / 8" in output
    assert sampler.upper() in output
    assert np.load(tmp_path / "x.npz")["latents"].shape == (2, 4, 8, 8)


@pytest.mark.parametrize("method", ["harmonica", pytest.param("end-to-end", marks=pytest.mark.slow)])
@pytest.mark.parametrize("sampler", ["dpm-solver++", "sa-solver"])
def test_training_and_resuming(pipeline, texts, tmp_path, method, sampler):
    more = ["--sampler", sampler, "--method", method]
    own = {
        "harmonica": ["--lr", 0.1, "--max-steps", 12],
        "end-to-end": ["--target-speedup", 1.3, "--max-steps", 19],
    }
    more += own[method]
    run(*training(pipeline, texts, tmp_path / "whole", *more))
    (folder,) = (tmp_path / "whole").iterdir()
    files = sorted((folder / "checkpoints").glob("*.safetensors"))
    shutil.copytree(folder, tmp_path / "parts" / folder.name)
    for late in files[1:]:
        (tmp_path / "parts" / folder.name / "checkpoints" / late.name).unlink()
    run(*training(pipeline, texts, tmp_path / "parts", *more, "--resume", "auto"))
    assert torch.equal(logits(tmp_path / "whole"), logits(tmp_path / "parts"))
    assert load_router(folder).info["sampler"] == sampler


def killed_at_a_checkpoint(number: int, arguments: list) -> int:
    """The exit status of a command in a process of its own, killed before it writes this checkpoint."""
    child = os.fork()
    if child == 0:
        calls = itertools.count(1)

        def write(*given, **named):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return write_checkpoint(*given, **named)

        try:
            with mock.patch("training.run.write_checkpoint", write):
                run(*arguments)
        finally:
            os._exit(1)  # it was not killed
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
def test_two_processes_or_a_killed_one_train_what_one_does(pipeline, texts, tmp_path):
    """Three trajectories: alone, on two processes, and killed with kill -9 after the first and resumed."""
    more = ["--sampler", "sa-solver", "--max-steps", 12, "--device", "cpu"]
    run(*training(pipeline, texts, tmp_path / "one", *more))
    run_on_ranks(2, *training(pipeline, texts, tmp_path / "two", *more))
    assert torch.allclose(logits(tmp_path / "one"), logits(tmp_path / "two"), atol=1e-5)
    again = training(pipeline, texts, tmp_path / "killed", *more, "--resume", "auto")
    assert killed_at_a_checkpoint(2, again) == -signal.SIGKILL
    (folder,) = (tmp_path / "killed").iterdir()
    assert [one.name for one in folder.glob("checkpoints/*.safetensors")] == ["0000008.safetensors"]
    run(*again)
    assert torch.equal(logits(tmp_path / "one"), logits(tmp_path / "killed"))


def test_a_router_for_another_sampler_is_noted(pipeline, texts, tmp_path):
    run(*training(pipeline, texts, tmp_path / "r", "--max-steps", 4, "--sampler", "sa-solver"))
    arguments = [
        "sample.py", "--model", pipeline, "--prompt", "a heart", "--num-sampling-steps", T,
        "--cfg-scale", 4.5, "--accelerate-method", "dynamiclayer", "--path", next((tmp_path / "r").iterdir()),
        "--repeats", 0, "--output", tmp_path / "x.png",
    ]  # fmt: skip
    note = "note: the router was trained at sampler sa-solver, this samples at ddim"
    assert f"{note}; --calibrate fits" in run(*arguments)
    output = run(*arguments, "--calibrate", 4)
    assert f"{note}\n" in output
    assert ", calibrated)" in output


def test_many_samples_of_a_prompt_set(pipeline, texts, tmp_path):
    arguments = [
        "sample_ddp.py", "--model", pipeline, "--prompts", texts, "--num-samples", 6, "--labels", "uniform",
        "--num-sampling-steps", T, "--sampler", "dpm-solver++", "--cfg-scale", 4.5,
    ]  # fmt: skip
    assert "no effect" not in run(*arguments, "--output", tmp_path / "a.npz", "--batch-size", 16)
    run(*arguments, "--output", tmp_path / "b.npz", "--batch-size", 32)
    first, second = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in "ab")
    assert first.shape == (6, 64, 64, 3)
    assert np.array_equal(first, second)
    assert not np.array_equal(first[0], first[3])  # the same prompt, other noise
    settings = json.loads((tmp_path / "a.npz.settings.json").read_text())
    beside = tmp_path / "a.npz.prompts.txt"
    assert beside.read_text().splitlines() == ["a green heart", "red apple", "a heart style"] * 2
    beside.unlink()
    assert "holds these samples already" in run(*arguments, "--output", tmp_path / "a.npz")
    assert beside.is_file()
    texts.write_text("red apple\na heart\na green heart\n")
    assert settings["conditions"]
    assert settings["labels"] == "uniform"
    run(*arguments, "--output", tmp_path / "c.npz")
    assert not np.array_equal(np.load(tmp_path / "c.npz")["arr_0"], first)
    assert json.loads((tmp_path / "c.npz.settings.json").read_text())["conditions"] != settings["conditions"]


def test_calibrated_weights_of_prompts_lie_with_the_samples(pipeline, texts, tmp_path):
    """And --calibrate means the same as a method's name that begins with it."""
    arguments = [
        "sample_ddp.py", "--model", pipeline, "--prompts", texts, "--num-samples", 3, "--interval", 2,
        "--num-sampling-steps", T, "--sampler", "sa-solver", "--cfg-scale", 4.5, "--calibrate", 4,
        "--accelerate-method",
    ]  # fmt: skip
    run(*arguments, "fora", "--output", tmp_path / "a.npz")
    assert "holds these samples" in run(*arguments, "calibrated-fora", "--output", tmp_path / "a.npz")
    settings = json.loads((tmp_path / "a.npz.settings.json").read_text())
    assert (settings["accelerate_method"], settings["calibrate"]) == ("calibrated-fora", 4)
    run(*arguments, "calibrated-fora", "--output", tmp_path / "b.npz")
    again = json.loads((tmp_path / "b.npz.settings.json").read_text())
    assert again["reuse_weights"] == settings["reuse_weights"]


def test_other_prompts_are_another_training(pipeline, texts, tmp_path):
    run(*training(pipeline, texts, tmp_path / "r", "--max-steps", 4))
    (folder,) = (tmp_path / "r").iterdir()
    texts.write_text("style\n")
    line = error_line(*training(pipeline, texts, tmp_path / "r", "--max-steps", 8, "--resume", folder))
    assert "it was trained with other prompts" in line


def test_wrong_uses_are_one_line(pipeline, tmp_path):
    assert "needs --prompt TEXT or --prompts FILE" in error_line("sample.py", "--model", "PixArt-alpha-256")
    assert "is unknown; choose one of" in error_line("sample.py", "--model", "PixArt-gamma", "--prompt", "x")
    shutil.copytree(pipeline, tmp_path / "damaged")
    (tmp_path / "damaged" / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 99)
    line = error_line("sample.py", "--model", tmp_path / "damaged", "--prompt", "x")
    assert "cannot be had" in line
    nowhere = error_line("sample.py", "--model", pipeline, "--prompts", tmp_path / "none.txt")
    assert "none.txt" in nowhere


def test_settings_by_hand(pipeline):
    model, vae = ModelSettings(model=str(pipeline), prompt=("a heart",)).load()
    assert model.num_classes == 1
    assert vae.factor == 8
    model.close()
