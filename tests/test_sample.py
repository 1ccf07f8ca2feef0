"""The sampling command, on the digits model with random weights and a router made for it."""

import argparse
import re

import numpy as np
import pytest
import torch
from commands import error_line, run
from PIL import Image

from router import Router, load_router, save_router
from sample import choose_labels

SAMPLE = ["sample.py", "--model", "DiT-digits/2", "--random-weights", "--num-sampling-steps", 5]
CACHED = [*SAMPLE, "--accelerate-method", "dynamiclayer", "--thres", 0.1]


@pytest.fixture
def router(tmp_path):
    logits = torch.full((5, 24), 3.0)
    logits[:2, ::2] = -4.0  # the attention of the last two steps is reused: 24 of 120 cells
    path = tmp_path / "router.safetensors"
    save_router(path, Router.from_logits(logits), model="DiT-digits/2", cfg_scale=1.5, threshold=0.1)
    return path


def test_cached_run_says_what_it_does(tmp_path, router):
    picture = tmp_path / "out" / "cached.png"
    output = run(
        *CACHED, "--path", router, "--ddim-sample", "--cfg-scale", 1.5, "--output", picture, "--repeats", 2
    )
    assert "96 / 120 branches computed (attn 36 / 60, mlp 60 / 60), CUR 20.00 %" in output
    assert re.search(r"theoretical speed-up 1\.\d+x", output)
    assert re.search(r"latency cached: [\d.]+ ms per batch of 10 \(median of 2 after a warm-up", output)
    assert "RANDOM WEIGHTS" in output
    with Image.open(picture) as image:
        assert image.width > 8 * 64


def test_saved_latents_are_what_the_picture_shows(tmp_path, router):
    from diffusion import create_diffusion
    from sampling import generate_seeded, load_model

    for method, arguments in (("none", SAMPLE), ("cached", [*CACHED, "--path", router])):
        file = tmp_path / f"{method}.npz"
        options = ["--labels", 3, 1, "--seed", 5, "--cfg-scale", 2, "--repeats", 0, "--batch-size", 1]
        run(*arguments, *options, "--save-latents", file, "--output", tmp_path / "x.png")
        latents = np.load(file)["latents"]
        assert latents.shape == (2, 1, 8, 8)
        model, labels = load_model("DiT-digits/2", random_weights=True), torch.tensor([3, 1])
        schedule = None if method == "none" else load_router(router).schedule(0.1)
        setting = {"cfg_scale": 2.0, "schedule": schedule}
        again = generate_seeded(model, create_diffusion("5"), labels, 5, 1, **setting)
        np.testing.assert_allclose(latents, again.numpy(), atol=1e-5)


def test_compare_prints_the_distance_to_uncached(tmp_path, router):
    output = run(*CACHED, "--path", router, "--compare", "--output", tmp_path / "c.png", "--repeats", 1)
    assert re.search(r"MSE of x_0 \d\.\d+e-\d+, PSNR of the images (inf|[\d.]+) dB", output)
    assert re.search(r"measured speed-up \d+\.\d+x", output)
    everything = torch.full((5, 24), 5.0)
    save_router(router, Router.from_logits(everything), model="DiT-digits/2")
    output = run(*CACHED, "--path", router, "--compare", "--output", tmp_path / "c.png", "--repeats", 0)
    assert "MSE of x_0 0.000e+00, PSNR of the images inf dB" in output


def test_folder_of_a_training_is_a_path(tmp_path, router):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    router.rename(tmp_path / "run" / "checkpoints" / "0000100.safetensors")
    output = run(*CACHED, "--path", tmp_path / "run", "--output", tmp_path / "x.png", "--repeats", 0)
    assert "0000100.safetensors" in output


def test_samplers(tmp_path):
    arguments = ["--repeats", 0, "--output", tmp_path / "x.png"]
    assert "DDIM (the default)" in run(*SAMPLE, *arguments)
    assert "DDPM" in run(*SAMPLE, *arguments, "--p-sample")
    assert "exclude each other" in error_line(*SAMPLE, *arguments, "--p-sample", "--ddim-sample")


def test_published_labels_are_harmonicas(tmp_path, monkeypatch):
    """The eight classes of its sample.py: two of them are not those of DiT's."""
    seen = []
    monkeypatch.setattr("sample.load_model", lambda *_: argparse.Namespace(num_classes=1000))
    monkeypatch.setattr("sample.methods.load_method", lambda args, model: seen.append((args, model)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("sample.py", "--output", tmp_path / "x.png")
    assert choose_labels(*seen[0]).tolist() == [207, 992, 387, 974, 142, 979, 417, 279]


def test_option_without_effect_is_said(tmp_path):
    output = run(*SAMPLE, "--thres", 0.2, "--vae", "ema", "--repeats", 0, "--output", tmp_path / "x.png")
    assert "warning: --thres has no effect with --accelerate-method none" in output
    assert "warning: --vae ema has no effect" in output


def test_wrong_uses_end_in_one_line(tmp_path, router):
    other = tmp_path / "other.safetensors"
    save_router(other, Router(5, 56), model="DiT-XL/2")
    evil = tmp_path / "evil.pt"
    evil.write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    cases = [
        ([*CACHED, "--path", router, "--num-sampling-steps", 7], "num_steps 5, not 7"),
        ([*CACHED, "--path", other], "model DiT-XL/2, not DiT-digits/2"),
        ([*CACHED, "--path", tmp_path / "absent"], "absent does not exist"),
        ([*CACHED, "--path", evil], "was refused"),
        ([*CACHED, "--path", router, "--thres", 1.5], "1.5 is outside [0, 1)"),
        (CACHED, "needs --path"),
        ([*SAMPLE, "--accelerate-method", "magic"], "'magic' is unknown"),
        ([*SAMPLE, "--labels", 10], "--labels 10 is outside 0 .. 9"),
        ([*SAMPLE, "--compare"], "--compare needs a caching method"),
        ([*SAMPLE, "--output", "/proc/no/x.png"], "/proc/no"),
        (["sample.py", "--model", "DiT-S/2"], "no official checkpoint of DiT-S/2"),
        ([*SAMPLE, "--output", tmp_path / "x.psd"], "x.psd cannot be written: .psd is not of"),
    ]
    for arguments, words in cases:
        extra = [] if "--output" in arguments else ["--output", tmp_path / "never.png"]
        assert words in error_line(*arguments, *extra), arguments
    assert not (tmp_path / "never.png").exists()
