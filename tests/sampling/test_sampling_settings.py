"""How to sample: flags of the commands, and what a new sampler takes."""

import argparse
from pathlib import Path

import pytest
import torch
from commands import run

from common import cli
from diffusion import SAMPLERS, ChainSampler, State, create_diffusion
from sampling import settings as sampling_settings
from sampling.loop import sample
from sampling.settings import SamplingSettings


def parsed(*words, defaults: SamplingSettings = SamplingSettings(), **options) -> SamplingSettings:  # noqa: B008
    parser = argparse.ArgumentParser()
    sampling_settings.add_arguments(parser, defaults, "images at once", **options)
    args = cli.parse(parser, [*map(str, words)])
    sampling_settings.check_arguments(parser, args)
    return SamplingSettings.from_arguments(args)


def test_defaults_are_the_commands():
    own = SamplingSettings("ddim5", cfg_scale=1.5, seed=7, batch_size=3)
    assert parsed(defaults=own) == own
    assert parsed("--num-sampling-steps", 4, "--cfg-scale", 2, "--seed", 1, "--batch-size", 9) == (
        SamplingSettings("4", cfg_scale=2.0, seed=1, batch_size=9)
    )
    assert parsed("--other-seed", 4, aliases={"seed": "--other-seed"}).seed == 4


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "ddim"), (["--ddim-sample"], "ddim"), (["--p-sample"], "ddpm"), (["--sampler", "ddpm"], "ddpm"),
        (["--sampler", "ddim", "--ddim-sample"], "ddim"), (["--sampler", "ddpm", "--p-sample"], "ddpm"),
    ],
)  # fmt: skip
def test_sampler_flags(words, name):
    assert parsed(*words).sampler == name


@pytest.mark.parametrize(
    "words", [["--ddim-sample", "--p-sample"], ["--sampler", "ddim", "--p-sample"], ["--sampler", "euler"]]
)
def test_two_samplers_or_an_unknown_one_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        parsed(*words)
    text = capsys.readouterr().err
    assert "exclude each other; give one" in text or "invalid choice: 'euler'" in text


class Euler(ChainSampler):
    """A new solver: an Euler step of dx / d sigma = eps at unit signal, which is DDIM at eta 0."""

    def step(self, output, state, step, noise=None):  # noqa: ARG002
        chain, eps = self.chain, output.chunk(2, dim=1)[0] if self.chain.learn_sigma else output
        alpha, previous = float(chain.alphas_cumprod[step]), float(chain.alphas_cumprod_prev[step])
        sigma, target = ((1 - a) ** 0.5 / a**0.5 for a in (alpha, previous))
        return State(previous**0.5 * (state.x / alpha**0.5 + (target - sigma) * eps))


def test_a_new_sampler_is_a_class_and_a_row(monkeypatch, tmp_path, tiny_model, tiny_batch):
    monkeypatch.setitem(SAMPLERS, "euler", Euler)
    noise, labels = tiny_batch
    chain, drawn = create_diffusion("5"), {}
    for name in ("ddim", "euler"):
        trajectory = SamplingSettings("5", name, cfg_scale=1.5).trajectory(tiny_model, chain)
        drawn[name] = sample(trajectory, labels, noise)
    torch.testing.assert_close(drawn["euler"], drawn["ddim"], rtol=1e-4, atol=1e-4)
    words = ["--model", "DiT-digits/2", "--num-sampling-steps", 3, "--sampler", "euler"]
    text = run("sample.py", *words, "--labels", 1, "--repeats", 0, "--output", tmp_path / "x.png")
    assert "EULER, 3 steps" in text
    run("sample_ddp.py", *words, "--num-samples", 2, "--device", "cpu", "--output", tmp_path / "x.npz")
    assert '"sampler": "euler"' in Path(tmp_path / "x.npz.settings.json").read_text()


def test_the_chain_is_the_models(tiny_model):
    assert SamplingSettings("7").chain(tiny_model).num_timesteps == 7
    assert SamplingSettings("7").chain(tiny_model).learn_sigma
    with pytest.raises(ValueError, match="asks for 2000 of 1000"):
        SamplingSettings("2000").chain(tiny_model)
