"""Models of diffusers by name or folder: transformer, prompts and VAE, ready for every command.

`--model` is a name of `pixart_models.PIXART`, an example's, or a folder of diffusers: a pipeline's, with its
transformer, VAE, text encoders and scheduler, or a transformer's alone. For the names of `PIXART`, what is
not there is looked for on the Hub.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from backbones.captions import with_captions
from backbones.diffusers_dit import DiffusersDiT
from backbones.families import FAMILIES
from backbones.inputs import INPUTS
from backbones.loading import transformer_folder
from backbones.pixart import PixArt, random_pixart, random_prompts, with_random_weights
from backbones.pixart_models import PIXART, VAE_FACTOR
from backbones.prompts import Prompts, encode_by_pipeline, encode_prompts
from backbones.text_transformer import TextTransformer
from backbones.vae import VaeConfig, read_vae_config
from common import distributed, registry
from common.files import first_line
from common.weights import read_config

_PIXART = "PixArtTransformer2DModel"


def load_text_model(
    name: str,
    texts: Sequence[str],
    ckpt: str | None = None,
    random_weights: bool = False,
    image_size: int | None = None,
    text_encoder: str | None = None,
    vae: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    fetch: bool = True,
    num_frames: int = 1,
) -> tuple[TextTransformer, VaeConfig | None]:
    """The backbone with the prompts `texts`, and the config of its VAE; None for no VAE.

    ckpt: a transformer's folder or Hub id in place of the known one. text_encoder: a folder or Hub id; None:
    that of the model's pipeline. Several processes meet here: one of them encodes. Raises OSError or
    ValueError, in one line, for what cannot be had and for what does not fit.
    """
    known, own = PIXART.get(name), registry.text_models().get(name)
    if own is not None:
        name = _folder_of(name, own)
    pipeline = known.parts if known else name
    transformer, source = _transformer(name, ckpt, random_weights, fetch)
    config, kind = transformer.config, type(transformer).__name__
    row = INPUTS[kind]
    if random_weights:
        pooled = row.pooled and config[row.pooled]
        num_tokens = known.num_tokens if known else row.num_tokens
        prompts = random_prompts(len(texts), num_tokens, config[row.states], pooled=pooled)
    elif own is not None:
        prompts = _with_captions(texts, own, text_encoder, device)
    elif row.pipeline is None:
        prompts = _encode(
            texts, text_encoder or pipeline, known.num_tokens if known else row.num_tokens, device
        )
    else:
        prompts = distributed.main_first(
            lambda: encode_by_pipeline(texts, text_encoder or pipeline, row, config, device=device)
        )
    vae_config = _vae_config(vae, pipeline, fetch, random_weights)
    _cast(transformer.requires_grad_(False), dtype).to(device)
    options = {"factor": _factor(pipeline, vae_config), "scheduler": _scheduler(pipeline)}
    if row.frames:
        options["num_frames"] = num_frames
    cls = PixArt if kind == _PIXART else TextTransformer
    model = cls(transformer, prompts, image_size, **options)
    return _with_source(model, source, vae_config)


def _folder_of(name: str, model: registry.TextModel) -> str:
    """The folder of an example's model. Raises FileNotFoundError, with the remedy, where it is not there."""
    if not model.is_there:
        raise FileNotFoundError(f"the weights of {name} are not in {model.folder}; {model.remedy}")
    return str(model.folder)


def _with_captions(
    texts: Sequence[str], model: registry.TextModel, encoder: str | None, device: torch.device | str
) -> Prompts:
    """The prompts of an example's model: its own captions without an encoder, others by the one it names."""

    def encode(missing: list[str]) -> Prompts:
        try:
            return _encode(missing, encoder or model.find_encoder(), model.num_tokens, device)
        except OSError as error:
            raise OSError(f"{first_line(error)}; {model.encoder_remedy}") from None

    return with_captions(texts, model.captions, model.num_tokens, encode)


def load_class_model(
    name: str,
    ckpt: str | None = None,
    random_weights: bool = False,
    vae: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    fetch: bool = True,
) -> tuple[DiffusersDiT, VaeConfig | None]:
    """As `load_text_model`, for a `DiTTransformer2DModel` in a folder, which is given class labels."""
    transformer, source = _transformer(name, ckpt, random_weights, fetch)
    vae_config = _vae_config(vae, name, fetch, random_weights)
    _cast(transformer.requires_grad_(False), dtype).to(device)
    model = DiffusersDiT(transformer, _factor(name, vae_config) or VAE_FACTOR)
    return _with_source(model, source, vae_config)


def _with_source(model, source: str, vae_config: VaeConfig | None):
    if vae_config is not None:
        vae_config.check_model(model)
    model.source = source
    return model, vae_config


# ---- transformers


def _transformer(name: str, ckpt: str | None, random_weights: bool, fetch: bool) -> tuple[nn.Module, str]:
    """The transformer, frozen by its caller, and where its weights come from; "" for random ones."""
    known, folder = PIXART.get(name), transformer_folder(Path(name))
    if random_weights:
        return (random_pixart(name) if known else _random_transformer(folder)), ""
    if (Path(name) / "transformer_2").is_dir():
        raise ValueError(
            f"{name} has two transformers, for which there are no commands; apply_schedule takes one of them"
        )
    source = ckpt or (known.hub if known else str(folder))
    return _load_transformer(source, _PIXART if known else _class_name(folder / "config.json"), fetch), source


def _random_transformer(folder: Path) -> nn.Module:
    """A transformer of the config in a folder, with seeded random weights."""
    import diffusers  # slow to import

    values = read_config(folder / "config.json")
    return with_random_weights(lambda: getattr(diffusers, values["_class_name"]).from_config(values))


def _load_transformer(source: str, expected: str, fetch: bool) -> nn.Module:
    import diffusers  # slow to import

    subfolder = None if (Path(source) / "config.json").is_file() else "transformer"
    kind = _class_name(Path(source) / (subfolder or "") / "config.json")
    if kind not in (None, expected):
        raise ValueError(
            f"{source} holds a {kind}, --model is a {expected}; supported are {', '.join(FAMILIES)}"
        )
    try:
        return getattr(diffusers, expected).from_pretrained(
            source, subfolder=subfolder, local_files_only=not fetch, torch_dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise OSError(
            f"the transformer {source} cannot be had ({first_line(error)}); fetch it with `hf download`, or "
            "give a folder with --ckpt, or --random-weights"
        ) from None


def _cast(transformer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Bring it to a dtype as diffusers loads it: what its class names stays in float32."""
    kept = set(getattr(transformer, "_keep_in_fp32_modules", None) or ())
    for name, tensor in [*transformer.named_parameters(), *transformer.named_buffers()]:
        if tensor.is_floating_point() and not kept & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return transformer


def _class_name(config: Path) -> str | None:
    return read_config(config).get("_class_name") if config.is_file() else None


# ---- what a pipeline has beside its transformer


def _encode(texts: Sequence[str], encoder: str, num_tokens: int, device: torch.device | str) -> Prompts:
    """On rank 0 first; the others find the embeddings on disk."""
    return distributed.main_first(lambda: encode_prompts(texts, encoder, num_tokens, device=device))


def _scheduler(pipeline: str) -> dict | None:
    """The config of a pipeline's scheduler; None where there is none."""
    file = Path(pipeline) / "scheduler" / "scheduler_config.json"
    return read_config(file) if file.is_file() else None


def _factor(pipeline: str, vae_config: VaeConfig | None) -> int | None:
    """Pixels per latent: those of the VAE, also where it is not asked for; None where it is not there."""
    if vae_config is None and (Path(pipeline) / "vae" / "config.json").is_file():
        vae_config = read_vae_config(pipeline)
    return None if vae_config is None else vae_config.factor


def _vae_config(given: str | None, pipeline: str, fetch: bool, random_weights: bool) -> VaeConfig | None:
    """What `--vae` names, else the pipeline's own; for random weights only what is named."""
    if given is not None or random_weights:
        return read_vae_config(given or "none")
    if Path(pipeline).is_dir():
        return read_vae_config(pipeline)
    try:
        from huggingface_hub import snapshot_download

        folder = snapshot_download(pipeline, allow_patterns=["vae/*"], local_files_only=not fetch)
    except (OSError, ValueError) as error:
        raise OSError(
            f"the VAE of {pipeline} cannot be had ({first_line(error)}); give its folder with --vae, or none"
        ) from None
    return read_vae_config(folder)
