"""The example that ships: data, committed weights and the judge."""

import pytest
import torch
from commands import run
from safetensors.torch import load_file

from backbones.loading import load_model
from diffusion import create_diffusion
from examples.digits import train_dit
from examples.digits.classifier import Judge
from examples.digits.data import digit_images, train_test_indices
from examples.digits.evaluate import nearest_distances
from sampling.loop import Trajectory, generate_seeded


@pytest.fixture(scope="module")
def judge():
    return Judge()


def test_data_is_the_whole_set_in_range():
    images, labels = digit_images()
    assert images.shape == (1797, 1, 8, 8)
    assert (images.min(), images.max()) == (-1, 1)
    assert torch.bincount(labels).min() > 170
    train, test = train_test_indices()
    assert sorted(torch.cat([train, test]).tolist()) == list(range(1797))


def test_classifier_recognises_images_it_never_saw(judge):
    images, labels = digit_images()
    _, test = train_test_indices()
    assert judge.accuracy(images[test], labels[test]) >= 0.99
    assert judge.accuracy(images[test], (labels[test] + 1) % 10) < 0.01


def test_digits_fid_tells_data_from_noise(judge):
    images, _ = digit_images()
    assert judge.digits_fid(images) == pytest.approx(0, abs=1e-6)
    assert judge.digits_fid(images[::2]) < 2
    assert judge.digits_fid(torch.rand_like(images) * 2 - 1) > 50


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_judge_refuses_samples_that_are_not_finite(judge, bad):
    """NaN would count as a 0 that is recognised, infinity as a white pixel."""
    images = torch.zeros(12, 1, 8, 8)
    images[5, 0, 3, 3] = bad
    for figure in (
        judge.digits_fid,
        lambda x: judge.accuracy(x, torch.zeros(12)),
        lambda x: nearest_distances(x, images[:3]),
    ):
        with pytest.raises(ValueError, match="samples hold NaN or infinity, the first in number 5"):
            figure(images)


@pytest.mark.slow
def test_committed_model_draws_the_digit_asked_for(judge):
    model, labels = load_model("DiT-digits/2"), torch.arange(60) % 10
    assert sum(p.numel() for p in model.parameters()) == 3_649_544
    x_0 = generate_seeded(Trajectory(model, create_diffusion("10"), 1.5), labels, seed=0)
    assert judge.accuracy(x_0, labels) >= 0.98
    assert judge.digits_fid(x_0) < judge.digits_fid(torch.randn_like(x_0)) / 10


def test_interrupted_training_ends_in_the_same_weights(tmp_path, monkeypatch):
    """Ctrl-C in the fourth iteration, a state saved after the second: the same command goes on from there."""
    arguments = ["--iterations", 6, "--batch-size", 4, "--save-every", 2, "--device", "cpu", "--output"]
    run("examples.digits.train_dit", *arguments, tmp_path / "whole.safetensors")
    iteration, calls = train_dit.train_iteration, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return iteration(*args)

    monkeypatch.setattr(train_dit, "train_iteration", interrupted)
    run("examples.digits.train_dit", *arguments, tmp_path / "parts.safetensors", status=130)
    assert not (tmp_path / "parts.safetensors").exists()
    run("examples.digits.train_dit", *arguments, tmp_path / "parts.safetensors")
    assert len(calls) == 4 + 4
    whole, parts = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
