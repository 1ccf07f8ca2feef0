"""PixArt models by download.py: a function stands for the Hub, with the parts of a small pipeline."""

import fnmatch
import shutil
from pathlib import Path

import pytest
import torch
from commands import error_line, run
from tiny_pipeline import save_pipeline

from backbones import prompts
from backbones.downloads import HubPart, find_part, hub_parts
from backbones.pixart_models import ALPHA_PIPELINE, PIXART, T5_PARAMETERS, VAE_PARAMETERS
from backbones.settings import ModelSettings

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def hub(pipeline, tmp_path, monkeypatch):
    """The Hub, whose every repository is the pipeline; `allowed` files are sent before the line breaks."""

    class Hub:
        allowed, asked = 100, 0

    def snapshot(repository, allow_patterns=(), ignore_patterns=(), local_dir=None, local_files_only=False):
        place = Path(local_dir or tmp_path / "cache" / repository)
        if local_files_only:
            if not place.is_dir():
                raise FileNotFoundError(f"{repository} is not in the cache")
            return str(place)
        Hub.asked += 1
        for file in sorted(pipeline.rglob("*")):
            name = str(file.relative_to(pipeline))
            wanted = any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
            if file.is_dir() or not wanted or any(fnmatch.fnmatch(name, one) for one in ignore_patterns):
                continue
            if Hub.allowed == 0:
                raise ConnectionError("the line broke\nsomewhere")
            Hub.allowed -= 1
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place / name)
        return str(place)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return Hub


def test_parts_come_into_the_cache_and_are_shared(hub, tmp_path):
    hub.allowed = 3  # config and weights of the transformer, config of the VAE
    line = error_line("download.py", "PixArt-alpha-256")
    assert "vae of PixArt-alpha/PixArt-XL-2-1024-MS cannot be had from the Hub (the line broke); run" in line
    hub.allowed = 100
    text = run("download.py", "PixArt-alpha-256")
    assert "about 19.4 GB to fetch if its parts are stored in float32" in text  # without the transformer
    asked = hub.asked
    assert "about 0.0 GB" in run("download.py", "PixArt-alpha-256")
    assert hub.asked == asked
    shown = {tuple(line.split()[:3]) for line in run("download.py", "--list").splitlines()}
    assert ("PixArt-alpha-256", "present", "transformer") in shown
    assert ("PixArt-alpha-512", "absent", "transformer") in shown
    assert ("PixArt-alpha-512", "present", "text_encoder") in shown
    assert ("PixArt-Sigma-512", "absent", "text_encoder") in shown
    assert find_part(HubPart(ALPHA_PIPELINE, "vae", 1)) == tmp_path / "cache" / ALPHA_PIPELINE / "vae"


def test_a_folder_becomes_a_pipelines(hub, tmp_path, monkeypatch):
    assert not hub.asked
    text = run("download.py", "PixArt-Sigma-512", "--folder", tmp_path / "models")
    place = tmp_path / "models" / "PixArt-Sigma-512"
    assert f"use it as --model {place}" in text
    monkeypatch.setattr(prompts, "FOLDER", tmp_path / "prompts")
    model, vae = ModelSettings(model=str(place), prompt=("a heart",)).load()
    assert (model.num_classes, vae.factor) == (1, 8)
    model.close()


def test_weights_in_shards_must_all_be_there(tmp_path):
    part, place = HubPart("a/b", "text_encoder", 1), tmp_path / "text_encoder"
    place.mkdir()
    (place / "config.json").write_text("{}")
    assert find_part(part, tmp_path) is None
    (place / "model.safetensors.index.json").write_text(
        '{"weight_map": {"x": "1.safetensors", "y": "2.safetensors"}}'
    )
    (place / "1.safetensors").touch()
    assert find_part(part, tmp_path) is None
    (place / "2.safetensors").touch()
    assert find_part(part, tmp_path) == place


def test_the_numbers_of_parameters_are_those_of_the_configs():
    from diffusers import AutoencoderKL, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    def count(model) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    with torch.device("meta"):
        for name in ("PixArt-alpha-256", "PixArt-alpha-1024", "PixArt-Sigma-2048"):
            assert count(PixArtTransformer2DModel(**PIXART[name].config())) == hub_parts(name)[0].parameters
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        t5 = T5Config(
            vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
            feed_forward_proj="gated-gelu",
        )  # fmt: skip
        assert (count(vae), count(T5EncoderModel(t5))) == (VAE_PARAMETERS, T5_PARAMETERS)


def test_the_encoder_of_a_pipeline_is_found_by_its_id(pipeline, monkeypatch):
    import transformers

    for name in ("AutoTokenizer", "AutoConfig", "AutoModelForTextEncoding"):
        kind = getattr(transformers, name)

        def load(source, own=kind.from_pretrained, **options):
            return own(pipeline if source == "user/pipeline" else source, **options)

        monkeypatch.setattr(kind, "from_pretrained", load)
    tokenizer, encoder = prompts.load_encoder("user/pipeline")
    assert type(encoder).__name__ == "T5EncoderModel"
    assert tokenizer("red").input_ids
