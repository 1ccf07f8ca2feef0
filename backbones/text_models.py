"""Text-to-image models by name, Hub id or folder: transformer, prompts and VAE, ready for every command.

`--model` is a name of `pixart_models.PIXART`, or a folder of diffusers: a pipeline's, with its `transformer`,
`vae`, `tokenizer` and `text_encoder`, or a transformer's alone. What is not there is looked for on the Hub.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from backbones.loading import transformer_folder
from backbones.pixart import PixArt, random_pixart, random_prompts
from backbones.pixart_models import PIXART
from backbones.prompts import Prompts, encode_prompts
from backbones.vae import VaeConfig, read_vae_config
from common import distributed
from common.files import first_line
from common.weights import read_config

SUPPORTED = "PixArtTransformer2DModel"  # of the families, those with a backbone


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
) -> tuple[PixArt, VaeConfig | None]:
    """The backbone with the prompts `texts`, and the config of its VAE; None for no VAE.

    ckpt: a transformer's folder or Hub id in place of the known one. text_encoder: a folder or Hub id; None:
    that of the model's pipeline. Several processes meet here: one of them encodes. Raises OSError or
    ValueError, in one line, for what cannot be had and for what does not fit.
    """
    known = PIXART.get(name)
    num_tokens = known.num_tokens if known else 120
    if random_weights:
        if known is None:
            raise ValueError(f"--random-weights: {name} is a folder; give one of {', '.join(PIXART)}")
        transformer = random_pixart(name)
        prompts = random_prompts(len(texts), num_tokens)
        vae_config = read_vae_config(vae) if vae else None
    else:
        folder = transformer_folder(Path(name))
        transformer = _load_transformer(ckpt or (known.hub if known else str(folder)), fetch)
        pipeline = known.parts if known else str(Path(name))
        prompts = _encode(texts, text_encoder or pipeline, num_tokens, device)
        vae_config = _vae_config(vae, pipeline, fetch)
    transformer.requires_grad_(False).to(device=device, dtype=dtype)
    model = PixArt(transformer, prompts, image_size)
    if vae_config is not None:
        vae_config.check_model(model)
    model.source = "" if random_weights else str(ckpt or (known.hub if known else folder))
    return model, vae_config


def _load_transformer(source: str, fetch: bool):
    from diffusers import PixArtTransformer2DModel  # slow to import

    subfolder = None if (Path(source) / "config.json").is_file() else "transformer"
    kind = _class_name(Path(source) / (subfolder or "") / "config.json")
    if kind not in (None, SUPPORTED):
        raise ValueError(
            f"{source} holds a {kind}; the commands take {SUPPORTED}, `apply_schedule` takes others"
        )
    try:
        return PixArtTransformer2DModel.from_pretrained(
            source, subfolder=subfolder, local_files_only=not fetch, torch_dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise OSError(
            f"the transformer {source} cannot be had ({first_line(error)}); fetch it with `hf download`, or "
            "give a folder with --ckpt, or --random-weights"
        ) from None


def _class_name(config: Path) -> str | None:
    return read_config(config).get("_class_name") if config.is_file() else None


def _encode(texts: Sequence[str], encoder: str, num_tokens: int, device: torch.device | str) -> Prompts:
    """On rank 0 first; the others find the embeddings on disk."""
    return distributed.main_first(lambda: encode_prompts(texts, encoder, num_tokens, device=device))


def _vae_config(given: str | None, pipeline: str, fetch: bool) -> VaeConfig | None:
    """What `--vae` names, else the pipeline's own."""
    if given is not None:
        return read_vae_config(given)
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
