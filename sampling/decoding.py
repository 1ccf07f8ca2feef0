"""From x_0 to pictures: through a VAE, or as they are where the model works on pixels."""

import torch
from torch import Tensor

from backbones.contract import Backbone
from backbones.vae import VaeConfig, decoded, from_latents, read_vae_config
from common import cli


def load_vae(spec: str, device: torch.device | str = "cpu", fetch: bool = True):
    """diffusers' autoencoder for a spec, as `vae.read_vae_config` reads it. None for `none`."""
    config = read_vae_config(spec)
    return None if config is None else config.load(device, fetch)


def image_shape(model: Backbone, vae: VaeConfig | None) -> tuple[int, int, int]:
    """(H, W, C) of what `decode` returns."""
    channels, *frames, height, width = model.sample_shape
    latent_frames = frames[0] if frames else 1
    if vae is not None:
        shown = 1 + (latent_frames - 1) * vae.frame_factor
        return (height * vae.factor, shown * width * vae.factor, vae.image_channels)
    return (height, latent_frames * width, min(channels, 3))


def require_finite(x: Tensor, first: int = 0, what: str = "x_0") -> None:
    """Raise ValueError where a sample of x (n, ...) holds NaN or infinity; the samples count from `first`.

    Waits for the device: for after the loop.
    """
    if bool(x.isfinite().all()):
        return
    bad = (~x.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    others = f" (and {len(bad) - 1} more of {len(x)})" if len(bad) > 1 else ""
    raise cli.OneProcessError(
        f"sample {first + bad[0]}{others}: {what} is not finite (NaN or infinite), so nothing of it is kept; "
        "try --precision fp32, a --cfg-scale nearer to 1, or another checkpoint"
    )


@torch.no_grad()
def decode(x_0: Tensor, vae=None, batch_size: int = 8, first: int = 0) -> Tensor:
    """uint8 images (n, H, W, 3 or 1) of x_0 (n, C, H, W), the samples `first` and on.

    Frames of a video (n, C, F, H, W) stand side by side.

    With a VAE, latents are decoded; pixels (C < 4) are only scaled from [-1, 1]; latents without a VAE are
    previewed by their first three channels, the range -3 .. 3 shown from black to white. Raises ValueError
    where x_0 or an image is not finite, naming the sample.
    """
    require_finite(x_0, first)
    if vae is not None:
        parts = from_latents(x_0, vae).split(batch_size)
        x_0 = torch.cat([decoded(part, vae) for part in parts])
        require_finite(x_0, first, "the decoded image")
    elif x_0.shape[1] > 3:
        x_0 = x_0[:, :3] / 3.0
        if x_0.ndim == 5:  # (n, 3, F, H, W), frames side by side
            x_0 = x_0.permute(0, 1, 3, 2, 4).flatten(3)
    pixels = ((x_0.float() + 1) * 127.5).round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).cpu()
