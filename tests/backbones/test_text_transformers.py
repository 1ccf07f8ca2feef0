"""Every family of text-to-image transformers by its folder: diffusers' own numbers, sampling, training."""

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from commands import error_line, run
from PIL import Image
from tiny_pipeline import whole_pipeline

import execution
from backbones import hooks, prompts
from backbones.denoiser import sampler_for
from backbones.settings import ModelSettings
from backbones.vae import read_vae_config
from diffusion import create_diffusion
from objectives import train_trajectory
from router import Router, load_router
from sampling.decoding import decode, image_shape
from sampling.loop import generate

pytest.importorskip("transformers")
T, SIDE = 4, 64
TEXTS = ("a green heart", "red")
KINDS = ("sd3", "flux", "sana", "qwen", "wan")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a kind's pipeline, written when it is first asked for."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            whole_pipeline(kind).save_pretrained(made[kind])
        return made[kind]

    return folder


@pytest.fixture(scope="module", autouse=True)
def own_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "FOLDER", tmp_path_factory.mktemp("prompts"))
        yield


def load(folder: Path):
    model, _ = ModelSettings(model=str(folder), prompt=TEXTS, image_size=SIDE).load()
    return model


def noise_for(model, n: int = 2) -> torch.Tensor:
    return torch.randn(n, *model.sample_shape, generator=torch.Generator().manual_seed(1))


def by_pipeline(
    kind: str, pipe, model, noise: torch.Tensor, scale: float, num_frames: int = 1
) -> torch.Tensor:
    """The final latents of diffusers' pipeline with the embeddings of our prompts, in the shape of x."""
    states, mask = model.prompts.batch([0, 1, 2, 2])
    pooled = model.prompts.pooled_batch([0, 1, 2, 2])
    request = {"prompt_embeds": states[:2], "num_inference_steps": T, "height": SIDE, "width": SIDE}
    request |= {"output_type": "latent", "latents": noise.clone(), "guidance_scale": scale}
    negative = {"negative_prompt_embeds": states[2:]}
    if kind in ("flux", "qwen"):
        request["latents"] = model._packed(noise)
    if kind == "sd3":
        request |= negative | {
            "pooled_prompt_embeds": pooled[:2],
            "negative_pooled_prompt_embeds": pooled[2:],
        }
    elif kind == "flux":
        request |= {"pooled_prompt_embeds": pooled[:2]}
    elif kind == "sana":
        request |= negative | {"prompt_attention_mask": mask[:2], "negative_prompt_attention_mask": mask[2:]}
        request |= {"negative_prompt": None, "use_resolution_binning": False}
    elif kind == "qwen":
        request |= negative | {"prompt_embeds_mask": mask[:2], "negative_prompt_embeds_mask": mask[2:]}
        request |= {"true_cfg_scale": scale, "guidance_scale": None}
    elif kind == "wan":
        request |= negative | {"num_frames": num_frames}
    found = pipe(**request)
    found = found.frames if kind == "wan" else found.images
    return model._unpacked(found)


@pytest.mark.parametrize("kind", KINDS)
def test_the_commands_draw_what_the_pipeline_draws(folders, kind):
    """Text encoders, sigmas, guidance and packing: two roads from one folder to the same latents."""
    model = load(folders(kind))
    pipe = getattr(diffusers, json.loads((folders(kind) / "model_index.json").read_text())["_class_name"])
    pipe = pipe.from_pretrained(folders(kind))
    pipe.set_progress_bar_config(disable=True)
    noise, scale = noise_for(model), 1.0 if kind == "flux" else 3.0
    found = generate(model, create_diffusion(str(T)), torch.arange(2), noise, scale, "flow-euler")
    wanted = by_pipeline(kind, pipe, model, noise, scale)
    assert (found - noise).abs().max() > 0.1
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    model.close()


def test_a_model_that_embeds_guidance_has_one_half(tmp_path):
    """FLUX.1-dev: the scale is an input of the transformer. FLUX.1-schnell is not guided at all."""
    pipe = whole_pipeline("flux", guidance_embeds=True)
    pipe.save_pretrained(tmp_path)
    model, rows = load(tmp_path), []
    model.transformer.register_forward_pre_hook(
        lambda _, __, given: rows.append(len(given["hidden_states"])), with_kwargs=True
    )
    noise = noise_for(model)
    found, other = (
        generate(model, create_diffusion(str(T)), torch.arange(2), noise, scale, "flow-euler")
        for scale in (3.5, 2.0)
    )
    assert set(rows) == {2}
    wanted = by_pipeline("flux", pipe, model, noise, 3.5)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (found - other).abs().max() > 1e-4
    model.close()


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_x_stays_in_float32(folders, kind):
    settings = ModelSettings(model=str(folders(kind)), prompt=TEXTS, image_size=SIDE)
    model, _ = settings.load(dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    noise, scale = noise_for(model), 1.0 if kind == "flux" else 3.0
    x_0 = generate(model, create_diffusion(str(T)), torch.arange(2), noise, scale, "flow-euler")
    assert x_0.isfinite().all()
    assert x_0.dtype == torch.float32
    assert not torch.equal(x_0, x_0.bfloat16().float())
    model.close()


def test_videos_of_several_frames(folders, tmp_path):
    """5 frames are 2 of latents: diffusers' numbers, and a picture with all frames in a row."""
    model, vae = ModelSettings(model=str(folders("wan")), prompt=TEXTS, image_size=SIDE, num_frames=5).load()
    assert model.sample_shape == (4, 2, 8, 8)
    assert image_shape(model, vae) == (SIDE, 5 * SIDE, 3)
    noise = noise_for(model)
    found = generate(model, create_diffusion(str(T)), torch.arange(2), noise, 3.0, "flow-euler")
    assert decode(found, vae.load()).shape == (2, SIDE, 5 * SIDE, 3)
    assert decode(found).shape == (2, 8, 2 * 8, 3)
    pipe = whole_pipeline("wan")
    wanted = by_pipeline("wan", pipe, model, noise, 3.0, num_frames=5)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    model.close()
    line = error_line(*sampling(folders("wan"), tmp_path, "--num-frames", 3))
    assert "--num-frames 3: the number must be one more than a multiple of 4; try 1" in line


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_branches_recomputed_for_the_gradient_give_the_same_router(folders, kind):
    """Activation checkpointing within the hooks, also of branches that return a pair."""
    noise, logits = None, []
    for recompute in (False, True):
        model = load(folders(kind))
        if recompute:
            execution.recompute_branches(model)
        noise, sampler = noise_for(model), sampler_for(model, "flow-euler", create_diffusion(str(T)))
        router = Router(T, model.num_branches, torch.Generator().manual_seed(0))
        optimizer = torch.optim.AdamW(router.parameters(), lr=0.1, weight_decay=0.0)
        scale = 1.0 if kind == "flux" else 3.0
        for _ in train_trajectory(
            model, sampler, router, optimizer, noise, torch.arange(2), scale, 0.1, torch.ones(T), 1e-5
        ):
            pass
        logits.append(router.logits)
        model.close()
    assert torch.equal(*logits)


def test_guidance_without_a_null_prompt_is_refused(folders):
    arguments = ["sample.py", "--model", folders("flux"), "--prompt", "red", "--image-size", SIDE]
    line = error_line(*arguments, "--sampler", "flow-euler", "--cfg-scale", 3.5)
    assert "guidance 3.5 needs a null label" in line
    assert "class-dropout" not in line


def sampling(folder: Path, output: Path, *more) -> list:
    return [
        "sample.py", "--model", folder, "--prompt", *TEXTS, "--image-size", SIDE, "--sampler", "flow-euler",
        "--num-sampling-steps", T, "--repeats", 0, "--output", output / "x.png", "--save-latents",
        output / "x.npz", *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "kind", [*KINDS[:2], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[2:])]
)
def test_training_and_sampling_with_its_router(folders, tmp_path, monkeypatch, kind):
    """HarmoniCa by the commands; the router's schedule computes as many branches as it says."""
    scale = 1.0 if kind == "flux" else 3.0
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    run(
        "train_router.py", "--model", folders(kind), "--prompts", tmp_path / "prompts.txt", "--image-size",
        SIDE, "--sampler", "flow-euler", "--num-sampling-steps", T, "--cfg-scale", scale, "--trajectories", 2,
        "--max-steps", 2 * T, "--l1", 0.05, "--lr", 2.0, "--results-dir", tmp_path / "results",
    )  # fmt: skip
    (folder,) = (tmp_path / "results").iterdir()
    router, calls = load_router(folder), []
    assert router.logits.isfinite().all()
    schedule = router.schedule(0.1)
    assert 0 < schedule.cur < 1
    compute = hooks._BranchHook.compute
    monkeypatch.setattr(
        hooks._BranchHook, "compute", lambda self, *a, **k: calls.append(self.index) or compute(self, *a, **k)
    )
    method = ["--accelerate-method", "dynamiclayer", "--path", folder, "--cfg-scale", scale]
    assert "wrote" in run(*sampling(folders(kind), tmp_path, *method))
    counts = [calls.count(branch) for branch in range(schedule.num_branches)]
    assert counts == schedule.compute.sum(0).tolist()
    assert Image.open(tmp_path / "x.png").height >= SIDE


def test_decoded_pictures_are_the_pipelines(folders):
    """VAEs of images and of videos, with their scale and shift."""
    for kind in ("sd3", "sana", "qwen", "wan"):
        pipe = whole_pipeline(kind)
        vae = read_vae_config(str(folders(kind))).load()
        x_0 = torch.randn(1, 4, *[1] * (kind == "wan"), 8, 8, generator=torch.Generator().manual_seed(0))
        config = pipe.vae.config
        with torch.no_grad():
            if kind in ("qwen", "wan"):
                z = x_0.reshape(1, 4, 1, 8, 8) * 1.5 + 0.1
                wanted = pipe.vae.decode(z).sample[:, :, 0]
            else:
                wanted = pipe.vae.decode(x_0 / config.scaling_factor + config.get("shift_factor", 0)).sample
        pixels = ((wanted + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1)
        assert (decode(x_0, vae).float() - pixels).abs().max() <= 1, kind


def test_labels_by_folder(tmp_path):
    """diffusers' DiT is given class labels, and draws what our DiT's sampler makes of its output."""
    whole_pipeline("dit").save_pretrained(tmp_path / "dit")
    output = run(
        "sample.py", "--model", tmp_path / "dit", "--labels", 1, 7, "--num-sampling-steps", T, "--compare",
        "--accelerate-method", "fora", "--interval", 2, "--repeats", 0, "--output", tmp_path / "x.png",
        "--save-latents", tmp_path / "x.npz",
    )  # fmt: skip
    assert "attn1 4 / 8, ff 4 / 8" in output
    assert "no effect" not in output
    assert np.load(tmp_path / "x.npz")["latents"].shape == (2, 4, 8, 8)
    run(
        "train_router.py", "--model", tmp_path / "dit", "--num-sampling-steps", T, "--trajectories", 2,
        "--max-steps", T, "--results-dir", tmp_path / "results",
    )  # fmt: skip
    (folder,) = (tmp_path / "results").iterdir()
    assert load_router(folder).logits.isfinite().all()
    assert "has no effect" in run(
        "sample.py", "--model", tmp_path / "dit", "--prompt", "red", "--num-sampling-steps", 2, "--labels", 1,
        "--repeats", 0, "--output", tmp_path / "x.png",
    )  # fmt: skip


def changed(folder: Path, to: Path, **entries) -> Path:
    """A copy of a pipeline's folder whose transformer's config has other entries."""
    shutil.copytree(folder, to)
    config = to / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | entries))
    return to


@pytest.mark.parametrize(
    ("kind", "entries", "words"),
    [
        (
            "sd3",
            {"_class_name": "LTXVideoTransformer3DModel"},
            "holds a LTXVideoTransformer3DModel, which is not",
        ),
        ("flux", {"in_channels": 32, "out_channels": 16}, "has 32 input channels for 16 of output"),
        ("wan", {"image_dim": 8}, "has image_dim"),
        ("sana", {"guidance_embeds": True}, "has guidance_embeds"),
    ],
)
def test_other_classes_and_variants_are_refused(folders, tmp_path, kind, entries, words):
    folder = changed(folders(kind), tmp_path / "changed", **entries)
    line = error_line("sample.py", "--model", folder, "--prompt", "red", "--random-weights", "--output",
                      tmp_path / "x.png")  # fmt: skip
    assert words in line
    if "not" in words:
        assert "SD3Transformer2DModel, FluxTransformer2DModel" in line


def test_two_transformers_are_refused(folders, tmp_path):
    shutil.copytree(folders("wan"), tmp_path / "wan")
    shutil.copytree(folders("wan") / "transformer", tmp_path / "wan" / "transformer_2")
    assert "has two transformers" in error_line("sample.py", "--model", tmp_path / "wan", "--prompt", "red")


def test_a_sampler_of_noise_is_refused_with_the_right_one(folders, tmp_path):
    line = error_line(
        "sample.py", "--model", folders("sd3"), "--prompt", "red", "--image-size", SIDE, "--output",
        tmp_path / "x.png",
    )  # fmt: skip
    assert "take another --sampler, flow-euler" in line


def test_random_weights_need_nothing_but_the_transformers_config(folders, tmp_path):
    (tmp_path / "transformer").mkdir()
    shutil.copy(folders("sd3") / "transformer" / "config.json", tmp_path / "transformer")
    assert "RANDOM WEIGHTS" in run(*sampling(tmp_path, tmp_path, "--random-weights"))


def test_flow_shift_of_another_scheduler_is_read(folders, tmp_path):
    """Sana and Wan come with multi-step schedulers that name the shift otherwise."""
    shutil.copytree(folders("sana"), tmp_path / "sana")
    scheduler = tmp_path / "sana" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({"_class_name": "UniPCMultistepScheduler", "flow_shift": 5.0}))
    model = load(tmp_path / "sana")
    wanted = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    wanted.set_timesteps(3)
    assert model.sigmas(3) == wanted.sigmas.tolist()
    model.close()
