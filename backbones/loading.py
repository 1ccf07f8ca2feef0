"""Models by name: built, their checkpoints found and loaded, ready to sample."""

import warnings
from pathlib import Path

import torch

from backbones import downloads
from backbones.checkpoints import load_checkpoint
from backbones.contract import Backbone
from backbones.families import FAMILIES
from backbones.inputs import INPUTS
from backbones.pixart_models import PIXART
from backbones.vae import VaeConfig
from common import registry
from common.weights import read_config
from models import DiT, DiT_models

_OFFICIAL = {("DiT-XL/2", 256): "dit-256", ("DiT-XL/2", 512): "dit-512"}


def build_model(
    name: str,
    image_size: int | None = None,
    num_classes: int | None = None,
    class_dropout_prob: float = 0.1,
    learn_sigma: bool = True,
    vae: VaeConfig | None = None,
) -> DiT:
    """A model of the family with its initial weights, frozen and in eval mode.

    image_size: pixels (default 256); a latent model works on an eighth of it a side, or as the factor of
    `vae` says. class_dropout_prob: 0 for a model without a null label. A model of pixels has one size and
    number of classes: others are ignored with a warning. Raises ValueError for an unknown name or size, and
    for a VAE with latents of other channels.
    """
    options = {"class_dropout_prob": class_dropout_prob, "learn_sigma": learn_sigma}
    if not is_latent(name):
        own = DiT_models[name].keywords
        side, classes = own["input_size"], own["num_classes"]
        if image_size not in (None, side) or num_classes not in (None, classes):
            warnings.warn(
                f"{name} draws {side} x {side} pixels of {classes} classes; another size or number has no "
                "effect"
            )
        model = DiT_models[name](**options)
    else:
        factor = 8 if vae is None else vae.factor
        options |= {"input_size": input_size_of(name, 256 if image_size is None else image_size, factor)}
        model = DiT_models[name](num_classes=1000 if num_classes is None else num_classes, **options)
        model.vae_factor = factor
    if vae is not None:
        vae.check_model(model)
    return model.eval().requires_grad_(False)


def input_size_of(name: str, image_size: int, factor: int) -> int:
    """Side of the latents of `image_size` pixels. Raises ValueError for a size that patches do not fill."""
    patch_size = DiT_models[name].keywords["patch_size"]
    unit = factor * patch_size
    if image_size % unit:
        below = max(1, image_size // unit) * unit
        near = f"{below} or {below + unit}" if below < image_size else f"{below}"
        raise ValueError(
            f"--image-size {image_size}: {name} takes multiples of {unit} pixels (the VAE's factor {factor} "
            f"times patches of {patch_size}); try {near}"
        )
    return image_size // factor


def find_checkpoint(name: str, image_size: int | None, fetch: bool = True) -> Path:
    """The checkpoint that belongs to a model: an example's, or an official one.

    An absent official one is fetched, or with `fetch=False` (several processes would meet) a
    FileNotFoundError.
    """
    if (preset := registry.presets().get(name)) is not None:
        return preset.weights
    official = _OFFICIAL.get((name, image_size or 256))
    if official is None:
        raise ValueError(
            f"there is no official checkpoint of {name} at {image_size or 256} px; give one with --ckpt"
        )
    path = downloads.FOLDER / downloads.DOWNLOADS[official][0].path
    if not fetch and not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; fetch it with `python download.py {official}`, or give --ckpt"
        )
    return downloads.fetch(official)


def load_model(
    name: str,
    ckpt: str | Path | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    random_weights: bool = False,
    **options,
) -> DiT:
    """A model ready to sample: built, its weights loaded strictly, frozen, on `device` in `dtype`.

    options: those of `build_model` (class_dropout_prob, learn_sigma, vae).
    """
    if random_weights:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # the same in every process
            model = build_model(name, image_size, num_classes, **options)
        randomize(model)
    else:
        model = _build_empty(name, image_size, num_classes, **options)
        model.source = load_checkpoint(model, ckpt or find_checkpoint(name, image_size))
    return model.to(device=device, dtype=dtype)


def _build_empty(name: str, image_size: int | None, num_classes: int | None, **options) -> DiT:
    """As `build_model`, but the weights hold nothing yet: drawing initial ones takes longer than loading."""
    with torch.device("meta"):
        model = build_model(name, image_size, num_classes, **options)
    positions = model.pos_embed.detach()  # made by numpy, so they are there; a checkpoint may lack them
    model.to_empty(device="cpu")
    model.pos_embed.copy_(positions)
    return model


def randomize(model: DiT, seed: int = 0) -> None:
    """Give the layers that start at zero (gates, modulations, output) small random weights too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def is_latent(model: Backbone | str) -> bool:
    """Whether a model, or the one of a name, works on a VAE's latents rather than on pixels.

    Raises ValueError for an unknown name.
    """
    if isinstance(model, str):
        if is_diffusers_model(model):
            return True
        if (found := class_in(Path(model))) is not None:
            raise ValueError(
                f"--model {model} holds a {found}, which is not supported; supported are "
                f"{', '.join(FAMILIES)}"
            )
        if model not in DiT_models:
            names = ", ".join([*DiT_models, *PIXART, *registry.text_models()])
            raise ValueError(f"--model {model} is unknown; choose one of {names}, or a folder of diffusers")
        preset = registry.presets().get(model)
        return preset is None or not preset.in_pixels
    return model.vae_factor > 1


def is_text_model(name: str) -> bool:
    """Whether a value of `--model` takes prompts; folders are looked into."""
    return name in PIXART or name in registry.text_models() or class_in(Path(name)) in INPUTS


def is_video_model(name: str) -> bool:
    """Whether a value of `--model` draws videos."""
    kind = class_in(Path(name))
    return kind in INPUTS and INPUTS[kind].frames > 0


def is_diffusers_model(name: str) -> bool:
    """Whether a value of `--model` is a transformer of diffusers, by name or in a folder."""
    return is_text_model(name) or class_in(Path(name)) in FAMILIES


def transformer_folder(folder: Path) -> Path | None:
    """The folder of the transformer in a folder of diffusers, of whatever class; None where there is none."""
    for place in (folder / "transformer", folder):
        if (place / "config.json").is_file() and "_class_name" in read_config(place / "config.json"):
            return place
    return None


def class_in(folder: Path) -> str | None:
    """The class of the transformer in a folder of diffusers; None where there is none."""
    place = transformer_folder(folder)
    return None if place is None else read_config(place / "config.json")["_class_name"]


def pixels_of(model: Backbone) -> int:
    """Side of the images in pixels."""
    return model.input_size * model.vae_factor


def choose_vae(given: str | None, model: Backbone | str, random_weights: bool) -> str:
    """The spec for `load_vae`: what `--vae` gave, or its default; `none` for a model of pixels."""
    if is_latent(model):
        return given or ("none" if random_weights else "ema")
    if given not in (None, "none"):
        warnings.warn(f"--vae {given} has no effect: this model works on pixels", stacklevel=2)
    return "none"
