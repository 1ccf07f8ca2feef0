"""The Python blocks of docs/diffusers.md run, on tiny models in place of the published ones."""

import re
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from conftest import relative_error
from tiny_pipeline import PIPELINES, quiet, request, save_pipeline
from tiny_transformers import inputs, pixart

from backbones import apply_schedule
from backbones.families import FAMILIES, find_branches
from backbones.inputs import INPUTS
from router import Router, save_router

PAGE = Path(__file__).parents[2] / "docs" / "diffusers.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
TINY = {
    "PixArtSigmaPipeline": "pixart-sigma", "DiTPipeline": "dit", "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
}  # fmt: skip
STEPS = 20


@pytest.mark.parametrize("name", TINY)
def test_pipelines(name, tmp_path, monkeypatch):
    (block,) = [one for one in BLOCKS if f"import {name}\n" in one]
    pipe = quiet(PIPELINES[TINY[name]]())
    plain, drawn = request(pipe, steps=STEPS), []

    def called(self, _prompt, num_inference_steps):
        with monkeypatch.context() as patch:
            patch.setattr(kind, "__call__", original)
            drawn.append(request(self, steps=num_inference_steps))
        return SimpleNamespace(images=[drawn[-1]])

    kind = getattr(diffusers, name)
    original = kind.__call__
    monkeypatch.setattr(kind, "__call__", called)
    monkeypatch.setattr(kind, "from_pretrained", lambda *_, **__: pipe)
    monkeypatch.chdir(tmp_path)
    shape = (STEPS, len(find_branches(pipe.transformer)))
    router = Router.from_logits(4 * torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    save_router(tmp_path / "ROUTER.safetensors", router, method="test", threshold=0.5)
    exec(block, {})
    assert len(drawn) == 1
    assert not torch.equal(drawn[0], plain)
    registries = [vars(module).get("_diffusers_hook") for module in pipe.transformer.modules()]
    assert not any(registry.hooks for registry in registries if registry)  # Flux makes an empty one itself


def test_a_bare_transformer():
    (block,) = [one for one in BLOCKS if "session.start()" in one]
    transformer = pixart()
    outputs = []

    def denoise(model, timestep):
        with torch.no_grad():
            outputs.append(model(**inputs(model, timestep, len(outputs) % STEPS), return_dict=False)[0])

    exec(
        block,
        {
            "transformer": transformer,
            "timesteps": [1000.0 - 50 * k for k in range(STEPS)],
            "denoise": denoise,
        },
    )
    assert torch.equal(torch.stack(outputs[:STEPS]), torch.stack(outputs[STEPS:]))


def test_a_router_under_another_sampler(tmp_path, monkeypatch):
    (block,) = [one for one in BLOCKS if "calibrated-dynamiclayer" in one]
    for published, own in (
        ("PixArt-Sigma-1024", str(save_pipeline(tmp_path / "tiny"))), ('"cuda"', '"cpu"'),
        ("float16", "float32"),
    ):  # fmt: skip
        assert published in block
        block = block.replace(published, own)
    monkeypatch.setattr("backbones.prompts.FOLDER", tmp_path / "prompts")
    monkeypatch.chdir(tmp_path)
    router = Router.from_logits(4 * torch.randn(STEPS, 6, generator=torch.Generator().manual_seed(0)))
    save_router(tmp_path / "ROUTER.safetensors", router, method="test", threshold=0.5)
    pipe = quiet(PIPELINES["pixart-alpha"]())  # whose scheduler is DPM-Solver++
    plain, found = request(pipe, steps=STEPS), {"pipe": pipe}
    exec(block, found)
    assert found["schedule"].weights.shape == (STEPS, 6, 3)
    calibrated = request(pipe, steps=STEPS)
    apply_schedule(pipe, "ROUTER.safetensors")
    assert 0 < relative_error(calibrated, plain) < relative_error(request(pipe, steps=STEPS), plain)


def test_the_row_of_another_class(monkeypatch):
    """It is the one that the commands have; functions that are fields' defaults are the same objects."""
    (block,) = [one for one in BLOCKS if "INPUTS[" in one]
    row = INPUTS["SD3Transformer2DModel"]
    monkeypatch.delitem(INPUTS, "SD3Transformer2DModel")
    exec(block, {})
    assert INPUTS["SD3Transformer2DModel"] == row


def test_every_family_of_the_commands_is_in_the_page():
    assert set(INPUTS) == set(FAMILIES) - {"DiTTransformer2DModel"}
    table = PAGE.read_text().partition("| family | `--sampler` |")[2].partition("\n\n")[0]
    for name in ("PixArt", "SD3", "Flux", "Sana", "Qwen-Image", "Wan 2.1", "DiT"):
        assert f"\n| {name}" in table
