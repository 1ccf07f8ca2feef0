"""The VAE between pixels and latents: its config, its weights, and the scale that models see.

All that a command needs to know comes from the config, before the first step: what the VAE's own class makes
of a latent is asked on the meta device, without a weight.
"""

import contextlib
import inspect
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from backbones import downloads
from backbones.contract import Backbone
from common.weights import check_values, find_weights, folder_of, read_config, read_weights

OFFICIAL = ("ema", "mse")
VAE_SCALE = 0.18215  # theirs
# diffusers' classes that decode latents (n, C, h, w) to images in [-1, 1] by `decode(latents).sample`; those
# of videos have latents (n, C, f, h, w) and frames (n, 3, F, H, W).
VIDEO_CLASSES = ("AutoencoderKLWan", "AutoencoderKLQwenImage")
CLASSES = (
    "AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "VQModel", *VIDEO_CLASSES
)  # fmt: skip
_PROBE = 8  # latents a side
# Names of attention layers in files that diffusers wrote before version 0.14, such as the official ones.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Scaling(NamedTuple):
    """A model's latents are scale * (z - shift) of the VAE's z; (C, 1, 1) where channels differ."""

    scale: float | Tensor = VAE_SCALE
    shift: float | Tensor = 0.0


@dataclass(frozen=True)
class VaeConfig:
    """The facts of a VAE that its config tells; the defaults are those of the official VAEs.

    factor: pixels per latent and side. frame_factor: frames per latent frame after the first one.
    latent_channels, image_channels: channels of a latent and of a decoded image. encodes: whether it encodes
    to a distribution, as Learning-to-Cache needs. folder, values: the folder and the content of its config;
    None for an official VAE, which is found or fetched when it is loaded.
    """

    spec: str
    folder: Path | None = None
    values: dict | None = None
    class_name: str = "AutoencoderKL"
    latent_channels: int = 4
    image_channels: int = 3
    factor: int = 8
    encodes: bool = True
    frame_factor: int = 1

    def check_model(self, model: Backbone) -> None:
        """Raise ValueError where the model's latents are not this VAE's."""
        if model.in_channels != self.latent_channels:
            raise ValueError(
                f"--vae {self.spec} has latents of {self.latent_channels} channels, the model of "
                f"{model.in_channels}; give the VAE that the model was trained with"
            )

    def check_encoder(self) -> None:
        if not self.encodes:
            raise ValueError(
                f"--vae {self.spec} is of class {self.class_name} and encodes RGB images to no distribution "
                "of latents; train with an AutoencoderKL"
            )

    def load(self, device: torch.device | str = "cpu", fetch: bool = True):
        """diffusers' autoencoder with its weights, frozen, in float32. Raises ValueError in one line.

        An absent official one is fetched, or with `fetch=False` (several processes would meet) a
        FileNotFoundError.
        """
        if self.folder is None:
            found = _read_config(self.spec, _official_folder(self.spec, fetch))
            if (found.latent_channels, found.factor) != (self.latent_channels, self.factor):
                raise ValueError(f"{found.folder} is not --vae {self.spec}; remove it, or give it as --vae")
            return found.load(device)
        file = find_weights(self.folder)
        state = read_weights(file)
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise ValueError(f"{file} holds no state dict of a VAE; give the folder of one")
        old = re.compile(rf"(?<=attentions\.0\.)({'|'.join(_OLD_NAMES)})(?=\.)")
        state = {old.sub(lambda match: _OLD_NAMES[match[0]], name): value for name, value in state.items()}
        with torch.random.fork_rng(devices=[]):
            vae = _build(self.class_name, self.values)
        expected = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
        shapes = {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
        faults = sorted(name for name in {**expected, **shapes} if expected.get(name) != shapes.get(name))
        if faults:
            raise ValueError(
                f"{file} does not fit {self.folder / 'config.json'}: {len(faults)} tensors are missing, "
                f"unknown or of another shape ({', '.join(faults[:3])}); fetch both again"
            )
        check_values(state, file)
        vae.load_state_dict(state)
        return vae.float().to(device).eval().requires_grad_(False)


def read_vae_config(spec: str) -> VaeConfig | None:
    """The config that `--vae` means, checked without its weights. None for `none`.

    spec: `ema`, `mse`, `none`, or a folder: a VAE's, a pipeline's, a model's in the Hub's cache. Raises
    FileNotFoundError or ValueError in one line.
    """
    if spec == "none":
        return None
    if spec in OFFICIAL:
        return VaeConfig(spec)
    return _read_config(spec, folder_of(Path(spec), "vae") if Path(spec).is_dir() else Path(spec))


def _read_config(spec: str, folder: Path) -> VaeConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"--vae {spec}: {path} does not exist; use ema, mse, none, or the folder of a VAE or a pipeline"
        )
    values = read_config(path)
    class_name = values.get("_class_name", CLASSES[0])
    if class_name not in CLASSES:
        raise ValueError(
            f"--vae {spec} is of class {class_name}; those of diffusers that decode to images here are "
            f"{', '.join(CLASSES)}"
        )
    is_video = class_name in VIDEO_CLASSES
    for needed in ("dim_mult", "z_dim") if is_video else ("block_out_channels", "latent_channels"):
        if not any(name.endswith(needed) for name in values):
            raise ValueError(
                f"--vae {spec}: {path} lacks {needed}, which diffusers' {class_name} has; add it"
            )
    _scaling(values, path)
    return VaeConfig(spec, folder, values, class_name, **_probe(class_name, values, spec))


def _official_folder(spec: str, fetch: bool) -> Path:
    name = f"vae-{spec}"
    folder = downloads.FOLDER / Path(downloads.DOWNLOADS[name][0].path).parent
    if not fetch and not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} does not exist; fetch it with `python download.py {name}`, or give --vae FOLDER"
        )
    return downloads.fetch(name)


def _build(class_name: str, values: dict):
    """diffusers' autoencoder of a config, its weights as they come."""
    import diffusers  # slow to import, and only latent models need it

    cls = getattr(diffusers, class_name)
    known = inspect.signature(cls.__init__).parameters
    return cls(**{name: value for name, value in values.items() if name in known})


def _probe(class_name: str, values: dict, spec: str) -> dict:
    """The shapes that the class makes of a latent and of an image, without computing values."""
    is_video = class_name in VIDEO_CLASSES
    channels, frames = values["z_dim" if is_video else "latent_channels"], 1
    try:
        with torch.device("meta"), torch.no_grad():
            vae = _build(class_name, values).eval()
            shape = tuple(decoded(torch.empty(1, channels, _PROBE, _PROBE), vae).shape)
            if is_video:
                frames = vae.decode(torch.empty(1, channels, 2, _PROBE, _PROBE)).sample.shape[2] - 1
    except Exception as error:  # a config can be wrong in as many ways as it has entries
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"--vae {spec}: its config.json makes no {class_name} that decodes ({reason})"
        ) from None
    _, image_channels, height, width = shape
    if height != width or height % _PROBE or image_channels not in (1, 3):
        raise ValueError(
            f"--vae {spec} decodes {_PROBE} x {_PROBE} latents to {image_channels} x {height} x {width}; "
            "squares of whole multiples in one or three channels are needed"
        )
    encodes = False
    with contextlib.suppress(Exception), torch.device("meta"), torch.no_grad():
        mean = vae.encode(torch.empty(1, 3, height, width)).latent_dist.mean
        encodes = tuple(mean.shape) == (1, channels, _PROBE, _PROBE)
    facts = {"latent_channels": channels, "image_channels": image_channels, "encodes": encodes}
    return facts | {"factor": height // _PROBE, "frame_factor": frames}


def _scaling(config: dict, where: Path | str = "the VAE's config") -> Scaling:
    """The scale and shift of a config, by its class's convention. Raises ValueError for what is none."""

    def number(name: str, default: float) -> float:
        value = config.get(name, default)
        value = default if value is None and name == "shift_factor" else value
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or (name == "scaling_factor" and value <= 0):
            raise ValueError(f"{where}: {name} {value!r} is no scale; give the VAE's own")
        return float(value)

    plain = VAE_SCALE if config.get("_class_name", CLASSES[0]) in _SCALED else 1.0
    scale, shift = number("scaling_factor", plain), number("shift_factor", 0.0)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None and std is None:
        return Scaling(scale, shift)
    channels = config.get("latent_channels", config.get("z_dim"))
    try:
        mean, std = (torch.tensor(values, dtype=torch.float32) for values in (mean, std))
        fits = mean.shape == std.shape == (channels,) and bool(mean.isfinite().all() and (std > 0).all())
    except (TypeError, ValueError, RuntimeError):
        fits = False
    if not fits or not bool(torch.as_tensor(std).isfinite().all()) or shift:
        raise ValueError(
            f"{where}: latents_mean and latents_std must be {channels} finite numbers each, std above 0, and "
            "stand without a shift_factor"
        )
    return Scaling(scale / std[:, None, None], mean[:, None, None])


_SCALED = ("AutoencoderKL", "AsymmetricAutoencoderKL", "VQModel")  # by VAE_SCALE where a config says nothing


def scaling_of(vae) -> Scaling:
    """A loaded VAE's; one without a config counts as the official ones."""
    config = getattr(vae, "config", None)
    if config is None:
        return Scaling()
    known = {"_class_name": type(vae).__name__} if type(vae).__name__ in CLASSES else {}
    return _scaling(known | dict(config))


def decoded(z: Tensor, vae) -> Tensor:
    """Images (n, 3 or 1, H, W) of the VAE's z (n, C, h, w); of a video's (n, C, f, h, w), frames in a row."""
    if type(vae).__name__ not in VIDEO_CLASSES:
        return vae.decode(z).sample
    frames = vae.decode(z if z.ndim == 5 else z[:, :, None]).sample  # (n, 3, F, H, W)
    return frames.permute(0, 1, 3, 2, 4).flatten(3)


def to_latents(z: Tensor, vae) -> Tensor:
    """Latents (n, C, h, w) as the model denoises them, from the VAE's z."""
    scale, shift = (value.to(z) if isinstance(value, Tensor) else value for value in scaling_of(vae))
    return scale * (z - shift)


def from_latents(x_0: Tensor, vae) -> Tensor:
    """The VAE's z (n, C, h, w) from a model's x_0. Raises ValueError for another C."""
    config = getattr(vae, "config", None)
    channels = getattr(config, "latent_channels", getattr(config, "z_dim", x_0.shape[1]))
    if channels != x_0.shape[1]:
        raise ValueError(f"the VAE decodes latents of {channels} channels, not of {x_0.shape[1]}")
    scale, shift = (
        value.to(x_0).reshape(-1, *[1] * (x_0.ndim - 2)) if isinstance(value, Tensor) else value
        for value in scaling_of(vae)
    )
    return x_0 / scale + shift
