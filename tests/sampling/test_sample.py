"""The sampling command, on the digits model with random weights and a router made for it."""

import argparse
import json
import re

import numpy as np
import pytest
import torch
from commands import error_line, run
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from backbones.loading import build_model, find_checkpoint, randomize
from common.identity import weights_fingerprint
from router import Router, load_router, save_router
from sample import choose_labels

pytestmark = pytest.mark.usefixtures("small_dit")

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
    assert re.search(r"latency cached: [\d.,]+ ms per batch of 10 \(median of 2 after a warm-up", output)
    assert "RANDOM WEIGHTS" in output
    with Image.open(picture) as image:
        assert image.width > 8 * 64


def test_saved_latents_are_what_the_picture_shows(tmp_path, router):
    from backbones.loading import load_model
    from diffusion import create_diffusion
    from sampling.loop import Trajectory, generate_seeded

    for method, arguments in (("none", SAMPLE), ("cached", [*CACHED, "--path", router])):
        file = tmp_path / f"{method}.npz"
        options = ["--labels", 3, 1, "--seed", 5, "--cfg-scale", 2, "--repeats", 0, "--batch-size", 1]
        run(*arguments, *options, "--save-latents", file, "--output", tmp_path / "x.png")
        latents = np.load(file)["latents"]
        assert latents.shape == (2, 1, 8, 8)
        model, labels = load_model("DiT-digits/2", random_weights=True), torch.tensor([3, 1])
        schedule = None if method == "none" else load_router(router).schedule(0.1)
        trajectory = Trajectory(model, create_diffusion("5"), 2.0, schedule)
        again = generate_seeded(trajectory, labels, 5, 1)
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


def test_published_labels_are_harmonicas():
    """The eight classes of its sample.py: two of them are not those of DiT's."""
    model = argparse.Namespace(num_classes=1000)
    assert choose_labels(None, model).tolist() == [207, 992, 387, 974, 142, 979, 417, 279]


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


LATENT = ["--model", "DiT-S/8", "--image-size", 64, "--num-classes", 10, "--vae", "none"]
LATENT += ["--num-sampling-steps", 2, "--cfg-scale", 1]


def save_model(path, model) -> None:
    randomize(model)
    save_file(model.state_dict(), path)


@pytest.mark.parametrize("script", ["sample.py", "sample_ddp.py"])
def test_weights_that_are_not_finite_draw_nothing(tmp_path, script):
    """One NaN in a checkpoint; and weights so large that x_0 overflows, which only sampling can tell."""
    state = load_file(find_checkpoint("DiT-digits/2", None))
    setting = ["--model", "DiT-digits/2", "--num-sampling-steps", 2, "--cfg-scale", 1]
    output = tmp_path / "out" / ("x.npz" if "ddp" in script else "x.png")
    own = (
        ["--num-samples", 4]
        if "ddp" in script
        else ["--compare", "--accelerate-method", "fora", "--interval", 2]
    )
    for name, value, words in (
        ("nan", torch.nan, "blocks.3.mlp.fc1.weight has 128 of 65536 values that are not finite"),
        ("large", 3e38, "sample 0 (and "),
    ):
        state["blocks.3.mlp.fc1.weight"][0] = value
        save_file(state, tmp_path / f"{name}.safetensors")
        line = error_line(
            script, *setting, *own, "--ckpt", tmp_path / f"{name}.safetensors", "--output", output
        )
        assert words in line
        assert not list(tmp_path.glob("out/*.npz")) + list(tmp_path.glob("out/*.png"))


def test_model_of_other_flags_loads_and_is_recorded(tmp_path):
    """Ten classes without a null label, no learned variance: refused with the flags, sampled with them."""
    ckpt, output = tmp_path / "w.safetensors", tmp_path / "x.npz"
    save_model(ckpt, build_model("DiT-S/8", 64, 10, class_dropout_prob=0.0, learn_sigma=False))
    command = ["sample_ddp.py", *LATENT, "--num-samples", 2, "--output", output, "--ckpt", ckpt]
    line = error_line(*command)
    assert "no learned variance (--no-learn-sigma)" in line
    assert "10 classes without a null label (--num-classes 10 --class-dropout-prob 0, no guidance)" in line
    flags = ["--no-learn-sigma", "--class-dropout-prob", 0]
    text = run(*command, *flags, "--p-sample")
    assert f"weights: {ckpt}; 10 rows of labels: 10 classes without a null label" in text
    facts = json.loads(output.with_name("x.npz.settings.json").read_text())
    assert facts["null_label"] is False
    assert facts["learn_sigma"] is False
    as_null = [*command, "--no-learn-sigma", "--p-sample", "--num-classes", 9]
    assert "says null_label False, this command True" in error_line(
        *as_null
    )  # the same weights, read otherwise
    assert "needs a null label" in error_line(*command, *flags, "--cfg-scale", 2)
    text = run("sample.py", *LATENT, "--ckpt", ckpt, *flags, "--repeats", 0, "--output", tmp_path / "x.png")
    assert "without a null label" in text


def test_samples_of_other_weights_are_not_taken_for_these(tmp_path):
    """The rows of the label table in another order; and settings of before, with the old fingerprint."""
    model = build_model("DiT-S/8", 64, 10)
    save_model(tmp_path / "a.safetensors", model)
    table = model.y_embedder.embedding_table.weight
    table[1:] = table[1:].flip(0).clone()
    save_file(model.state_dict(), tmp_path / "b.safetensors")
    output = tmp_path / "x.npz"
    command = ["sample_ddp.py", *LATENT, "--num-samples", 2, "--output", output, "--ckpt"]
    run(*command, tmp_path / "a.safetensors")
    assert "says weights" in error_line(*command, tmp_path / "b.safetensors")
    facts = output.with_name("x.npz.settings.json")
    old = json.loads(facts.read_text())
    for name in ("null_label", "learn_sigma", "vae_weights"):
        del old[name]
    facts.write_text(json.dumps(old | {"weights": old["weights"][:16]}))
    assert "holds these samples already" in run(*command, tmp_path / "a.safetensors")


def test_training_records_what_the_model_is(tmp_path):
    model = build_model("DiT-S/8", 64, 10, class_dropout_prob=0.0, learn_sigma=False)
    save_model(tmp_path / "w.safetensors", model)
    command = [
        "train_router.py",
        *LATENT[:6],
        "--ckpt",
        tmp_path / "w.safetensors",
        "--num-sampling-steps",
        2,
    ]
    command += ["--results-dir", tmp_path / "results", "--trajectories", 1, "--max-steps", 2]
    command += ["--no-learn-sigma", "--class-dropout-prob", 0]
    line = error_line(*command)  # its guidance is 1.5 by default
    assert "guidance 1.5 needs a null label" in line
    assert not (tmp_path / "results").exists()
    assert "10 classes without a null label" in run(*command, "--cfg-scale", 1)
    settings = load_router(next((tmp_path / "results").iterdir())).info["settings"]
    assert (settings["null_label"], settings["learn_sigma"]) == (False, False)
    assert settings["weights"] == weights_fingerprint(model)
    assert "resuming from" in run(*command, "--cfg-scale", 1, "--resume", "auto")


def test_training_of_before_goes_on(tmp_path):
    """Its checkpoints hold the old fingerprint and none of the settings that came later."""
    command = ["train_router.py", "--model", "DiT-digits/2", "--num-sampling-steps", 3, "--cfg-scale", 1]
    command += ["--results-dir", tmp_path, "--trajectories", 1, "--max-steps", 3]
    run(*command)
    [path] = tmp_path.glob("*/checkpoints/*.safetensors")
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    settings = json.loads(metadata["settings"])
    del settings["null_label"], settings["learn_sigma"]
    settings["weights"] = settings["weights"][:16]
    save_file(tensors, path, metadata=metadata | {"settings": json.dumps(settings)})
    assert "resuming from" in run(*command, "--resume", "auto")
    assert len([*tmp_path.iterdir()]) == 1
