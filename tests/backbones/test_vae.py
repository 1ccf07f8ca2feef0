"""The VAE, small ones in the real format: what its config decides before a step, its weights, its scale."""

import json

import numpy as np
import pytest
import torch
from commands import error_line, run
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    VQModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from backbones.loading import build_model
from backbones.vae import VaeConfig, read_vae_config
from router import load_router
from sampling.decoding import decode, image_shape, load_vae
from training.data import to_model_space

pytestmark = pytest.mark.usefixtures("small_dit")

BIAS = "decoder.conv_in.bias"
WEIGHTS = "diffusion_pytorch_model.safetensors"
SAMPLE = [
    "--model",
    "DiT-S/8",
    "--random-weights",
    "--image-size",
    64,
    "--num-sampling-steps",
    1,
    "--cfg-scale",
    1,
]


def small_vae(blocks: int = 4, **changes) -> AutoencoderKL:
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8,) * blocks, "norm_num_groups": 4}
    kinds = {
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
    }
    return AutoencoderKL(**sizes | kinds | changes).eval()


def pixels(decoded: torch.Tensor) -> np.ndarray:
    return (decoded.permute(0, 2, 3, 1).numpy() * 127.5 + 127.5).round().clip(0, 255)


@pytest.mark.parametrize(("blocks", "factor"), [(2, 2), (3, 4), (4, 8), (5, 16)])
def test_factor_decides_sizes(tmp_path, blocks, factor):
    small_vae(blocks).save_pretrained(tmp_path)
    config = read_vae_config(str(tmp_path))
    assert (config.factor, config.latent_channels, config.image_channels) == (factor, 4, 3)
    assert config.encodes
    model = build_model("DiT-S/8", 128, vae=config)
    assert model.input_size == 128 // factor
    assert image_shape(model, config) == (128, 128, 3)
    assert decode(torch.randn(1, 4, 4, 4), config.load()).shape == (1, 4 * factor, 4 * factor, 3)


def test_npz_is_of_what_is_decoded(tmp_path):
    """Factor 4: a header of factor 8 made a file that numpy could not read."""
    small_vae(3).save_pretrained(tmp_path / "vae")
    output = tmp_path / "x.npz"
    run("sample_ddp.py", *SAMPLE, "--vae", tmp_path / "vae", "--num-samples", 3, "--output", output)
    with np.load(output) as file:
        assert file["arr_0"].shape == (3, 64, 64, 3)
    facts = json.loads((tmp_path / "x.npz.settings.json").read_text())
    assert facts["image_size"] == 64
    small_vae(3, layers_per_block=2).save_pretrained(tmp_path / "vae")
    line = error_line(
        "sample_ddp.py", *SAMPLE, "--vae", tmp_path / "vae", "--num-samples", 3, "--output", output
    )
    assert "says vae_weights" in line


def test_grey_images_have_one_channel(tmp_path):
    small_vae(out_channels=1).save_pretrained(tmp_path / "vae")
    run(
        "sample_ddp.py",
        *SAMPLE,
        "--vae",
        tmp_path / "vae",
        "--num-samples",
        1,
        "--output",
        tmp_path / "x.npz",
    )
    with np.load(tmp_path / "x.npz") as file:
        assert file["arr_0"].shape == (1, 64, 64, 1)


@pytest.mark.parametrize("script", ["sample.py", "sample_ddp.py", "train_router.py"])
def test_latents_of_other_channels_are_refused_before_the_first_step(tmp_path, script):
    small_vae(latent_channels=16).save_pretrained(tmp_path / "vae")
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.effect_noise((70, 70), 50).save(tmp_path / "images" / "a" / "0.png")
    own = ["--output", tmp_path / "out" / ("x.npz" if "ddp" in script else "x.png")]
    if script == "train_router.py":
        own = [
            "--method",
            "l2c",
            "--data",
            tmp_path / "images",
            "--num-classes",
            1,
            "--results-dir",
            tmp_path / "out",
        ]
    arguments = SAMPLE[:-2] if script == "train_router.py" else SAMPLE
    line = error_line(script, *arguments, "--vae", tmp_path / "vae", *own)
    assert "has latents of 16 channels, the model of 4" in line
    assert not [*tmp_path.glob("out/*")]


@pytest.mark.parametrize(
    ("changes", "to_vae"),
    [
        ({"scaling_factor": 0.5}, lambda x: x / 0.5),
        ({"scaling_factor": 1.5, "shift_factor": 0.25}, lambda x: x / 1.5 + 0.25),
        (
            {
                "scaling_factor": 0.5,
                "latents_mean": [0.1, 0.2, 0.3, 0.4],
                "latents_std": [1.0, 2.0, 3.0, 4.0],
            },
            lambda x: (
                x * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None] / 0.5
                + torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None, None]
            ),
        ),
    ],
)
def test_scale_is_the_configs_in_both_directions(tmp_path, changes, to_vae):
    vae = small_vae(**changes)
    vae.save_pretrained(tmp_path)
    loaded, latents = load_vae(str(tmp_path)), torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        expected = pixels(vae.decode(to_vae(latents)).sample)
    assert np.abs(decode(latents, loaded).numpy() - expected).max() <= 1
    loaded.encode = lambda _: type(
        "Out", (), {"latent_dist": type("P", (), {"mean": to_vae(latents), "std": 0 * latents})}
    )
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    generators = [torch.Generator().manual_seed(k) for k in range(2)]
    torch.testing.assert_close(to_model_space(images, loaded, generators), latents)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"scaling_factor": None}, "scaling_factor None is no scale"),
        ({"scaling_factor": 0.0}, "scaling_factor 0.0 is no scale"),
        ({"scaling_factor": float("nan")}, "scaling_factor nan is no scale"),
        ({"shift_factor": "0.1"}, "shift_factor '0.1' is no scale"),
        ({"latents_mean": [0.0, 0.0, 0.0, 0.0]}, "latents_mean and latents_std must be 4 finite numbers"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0, 1.0, 0.0, 1.0]}, "std above 0"),
        ({"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}, "must be 4 finite numbers"),
        ({"_class_name": "AutoencoderKLLTXVideo"}, "those of diffusers that decode"),
        ({"_class_name": "AutoencoderKLWan"}, "lacks dim_mult, which diffusers' AutoencoderKLWan has"),
        ({"_class_name": "DiTTransformer2DModel"}, "is of class DiTTransformer2DModel"),
        ({"latent_channels": "4"}, "its config.json makes no AutoencoderKL that decodes"),
        ({"out_channels": 4}, "to 4 x 64 x 64; squares of whole multiples in one or three channels"),
    ],
)
def test_config_that_decides_nothing_is_refused(tmp_path, entries, words):
    small_vae().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | entries))
    with pytest.raises(ValueError) as info:  # noqa: PT011
        read_vae_config(str(tmp_path))
    assert words in str(info.value)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("field", ["block_out_channels", "latent_channels"])
def test_config_without_a_needed_field_is_refused(tmp_path, field):
    small_vae().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config[field]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"lacks {field}"):
        read_vae_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is no config of diffusers"):
        read_vae_config(str(tmp_path))


def asymmetric() -> AsymmetricAutoencoderKL:
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    widths = {"down_block_out_channels": (8,) * 3, "up_block_out_channels": (8, 8, 16)}
    return AsymmetricAutoencoderKL(norm_num_groups=4, **kinds, **widths)


def deep_compression() -> AutoencoderDC:
    widths = {f"{part}_block_out_channels": (8, 8, 16) for part in ("encoder", "decoder")}
    layers = {f"{part}_layers_per_block": (1, 1, 1) for part in ("encoder", "decoder")}
    scales = {f"{part}_qkv_multiscales": ((), (), ()) for part in ("encoder", "decoder")}
    return AutoencoderDC(
        latent_channels=4, attention_head_dim=8, scaling_factor=0.4, **widths, **layers, **scales
    )


def quantising() -> VQModel:
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return VQModel(block_out_channels=(32, 32), latent_channels=4, num_vq_embeddings=8, **kinds)


def tiny() -> AutoencoderTiny:
    return AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)


@pytest.mark.parametrize(
    ("build", "factor", "encodes"),
    [(asymmetric, 4, True), (deep_compression, 4, False), (quantising, 2, False), (tiny, 8, False)],
)
def test_other_autoencoders_decode_as_their_class_does(tmp_path, build, factor, encodes):
    torch.manual_seed(0)
    vae = build().eval()
    vae.save_pretrained(tmp_path)
    config = read_vae_config(str(tmp_path))
    assert (config.factor, config.encodes) == (factor, encodes)
    latents = torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        expected = pixels(vae.decode(latents / vae.config.scaling_factor).sample)
    assert np.abs(decode(latents, config.load()).numpy() - expected).max() <= 1
    if not encodes:
        with pytest.raises(ValueError, match="encodes RGB images to no distribution"):
            config.check_encoder()


@pytest.mark.parametrize("where", ["pipeline", "models--a--vae", "fp16", "bin", "shards"])
def test_places_that_a_vae_is_in(tmp_path, where):
    vae = small_vae()
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    vae.save_pretrained(tmp_path / "models--a--vae" / "snapshots" / "0123")
    vae.save_pretrained(tmp_path / "fp16")
    (tmp_path / "fp16" / WEIGHTS).rename(tmp_path / "fp16" / WEIGHTS.replace(".safe", ".fp16.safe"))
    vae.save_pretrained(tmp_path / "bin", safe_serialization=False)
    vae.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    latents = torch.randn(1, 4, 4, 4)
    assert torch.equal(decode(latents, load_vae(str(tmp_path / where))), decode(latents, vae))


def test_official_files_name_their_attention_as_diffusers_did(tmp_path):
    """sd-vae-ft-*: query, key, value, proj_attn; no scale in the config."""
    vae, old = small_vae(), {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    vae.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    for new, name in old.items():
        state = {
            key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): value
            for key, value in state.items()
        }
    assert any("proj_attn" in name for name in state)
    save_file(state, tmp_path / WEIGHTS)
    config = json.loads((tmp_path / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in ("scaling_factor", "shift_factor")}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    latents = torch.randn(1, 4, 4, 4)
    assert torch.equal(decode(latents, load_vae(str(tmp_path))), decode(latents, vae))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state | {BIAS: state[BIAS] * torch.nan}, "not finite"),
        (lambda state: state | {BIAS: state[BIAS].to(torch.int8)}, "is int8"),
        (lambda state: {k: v for k, v in state.items() if k != BIAS}, "1 tensors are missing, unknown or"),
        (lambda state: state | {"decoder.extra": torch.ones(2)}, "(decoder.extra); fetch both again"),
        (lambda state: state | {BIAS: torch.ones(3)}, f"({BIAS})"),
    ],
)
def test_weights_that_are_not_the_vaes_are_refused(tmp_path, change, words):
    """diffusers itself draws at random what a file lacks, and only logs it."""
    small_vae().save_pretrained(tmp_path)
    save_file(change(load_file(tmp_path / WEIGHTS)), tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=WEIGHTS) as info:
        load_vae(str(tmp_path))
    assert words in str(info.value)
    assert "\n" not in str(info.value)


def test_what_is_absent_is_named(tmp_path):
    small_vae().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"a config\.json without the weights"):
        load_vae(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="the folder of a VAE or a pipeline"):
        read_vae_config(str(tmp_path / WEIGHTS))


def test_latents_of_other_channels_are_not_decoded():
    with pytest.raises(ValueError, match="decodes latents of 16 channels, not of 4"):
        decode(torch.zeros(1, 4, 4, 4), small_vae(latent_channels=16))


def test_official_ones_are_known_without_a_file():
    assert read_vae_config("ema") == VaeConfig("ema")
    assert (VaeConfig("mse").factor, VaeConfig("mse").latent_channels) == (8, 4)
    assert read_vae_config("none") is None


@pytest.mark.parametrize(("blocks", "pixels"), [(3, 32), (4, 64)])
@pytest.mark.parametrize("method", ["l2c", "harmonica"])
def test_training_takes_the_vaes_factor(tmp_path, method, blocks, pixels):
    """Eight latents a side either way: `--image-size` is in pixels in training as in sampling."""
    small_vae(blocks).save_pretrained(tmp_path / "vae")
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.effect_noise((70, 70), 50).save(tmp_path / "images" / "a" / "0.png")
    arguments = ["--model", "DiT-S/8", "--random-weights", "--image-size", pixels, "--num-classes", 1]
    arguments += ["--num-sampling-steps", 2, "--global-batch-size", 1, "--max-steps", 1, "--method", method]
    arguments += ["--data", tmp_path / "images"] if method == "l2c" else ["--cfg-scale", 1]
    results = tmp_path / "results"
    text = run("train_router.py", *arguments, "--vae", tmp_path / "vae", "--results-dir", results)
    assert "finished 1 train steps" in text
    assert "--vae" not in text
    assert load_router(next(results.iterdir())).info["image_size"] == pixels
