"""Train the emoji VAE, diffusers' AutoencoderKL: 64 x 64 x 3 pixels to 16 x 16 x 4 latents and back.

    python -m examples.emoji.train_vae

Loss: L1 + L2 + a little KL, on the training split with flips. At the end each latent channel is given mean 0
and spread 1 over the training pictures. The two numbers of a channel go into the 1 x 1 convolutions on either
side of the latents, so `scaling_factor` is 1 and every diffusers pipeline takes the folder as it is.

Run the same command again to go on after an interruption: every iteration draws from its own seed, so an
interrupted training ends in the same weights as an uninterrupted one. `--iterations` may be raised or lowered
when it goes on.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from common import cli
from examples.emoji import data
from examples.emoji.state import TrainingState, iteration_seed, write_folder

CHANNELS = (16, 32, 64)


def build_vae(channels: tuple[int, ...] = CHANNELS, layers: int = 1):
    """A fresh AutoencoderKL that halves the picture once for every entry of `channels` but the first."""
    from diffusers import AutoencoderKL  # slow to import

    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=layers,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=data.SIZE,
        scaling_factor=1.0,
    )


def to_float(images: Tensor) -> Tensor:
    """uint8 (n, H, W, 3) -> float (n, 3, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def vae_loss(vae, x: Tensor, kl_weight: float) -> Tensor:
    """L1 + L2 + KL, each a mean over its values, of x (n, 3, H, W)."""
    posterior = vae.encode(x).latent_dist
    restored = vae.decode(posterior.sample()).sample
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return F.l1_loss(restored, x) + F.mse_loss(restored, x) + kl_weight * kl


@torch.no_grad()
def psnr(vae, images: Tensor, batch_size: int = 32) -> Tensor:
    """PSNR (n,) in dB of uint8 images (n, H, W, 3) after encoding (the mean) and decoding (to uint8)."""
    parts = []
    for batch in images.split(batch_size):
        restored = vae.decode(vae.encode(to_float(batch)).latent_dist.mode()).sample
        restored = (restored.clamp(-1, 1) * 127.5 + 127.5).round().permute(0, 2, 3, 1)
        parts.append((restored - batch.float()).square().flatten(1).mean(1))
    return 10 * torch.log10(255.0**2 / torch.cat(parts).clamp(min=1e-3))


@torch.no_grad()
def encode(vae, images: Tensor, batch_size: int = 32) -> Tensor:
    """Latents (n, 4, H/4, W/4) of uint8 images (n, H, W, 3): the means, without sampling."""
    return torch.cat([vae.encode(to_float(batch)).latent_dist.mode() for batch in images.split(batch_size)])


@torch.no_grad()
def normalise_latents(vae, latents: Tensor) -> None:
    """Give each latent channel mean 0 and spread 1 over `latents` (n, 4, h, w), as the VAE encodes them now.

    What it decodes stays the same: the inverse goes into `post_quant_conv`.
    """
    channels = latents.shape[1]
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    before, after = vae.quant_conv, vae.post_quant_conv
    before.bias[:channels] = (before.bias[:channels] - mean) / std
    before.bias[channels:] -= 2 * std.log()  # of the log variance
    before.weight[:channels] /= std[:, None, None, None]
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std[None, :, None, None]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the emoji VAE.")
    parser.add_argument("--data", type=Path, default=data.FOLDER / "emoji.npz")
    parser.add_argument("--iterations", type=cli.positive_int, default=2_000)
    parser.add_argument("--batch-size", type=cli.positive_int, default=8)
    parser.add_argument("--lr", type=cli.positive, default=2e-3, help="peak; linear to 0")
    parser.add_argument("--kl-weight", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=cli.positive_int, default=250, help="iterations")
    parser.add_argument("--output", type=Path, default=data.FOLDER / "vae", help="folder to write")
    return parser.parse_args()


def learning_rate(iteration: int, args: argparse.Namespace) -> float:
    return args.lr * min(1.0, (iteration + 1) / 200) * (1 - iteration / args.iterations)


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    emoji = data.load(args.data)
    images, split = torch.from_numpy(emoji.images), torch.from_numpy(emoji.split)
    train, held_out = images[split == data.TRAIN], images[split != data.TRAIN]
    vae = build_vae()
    options = {"lr": args.lr, "weight_decay": 0.0, "betas": (0.9, 0.99), "fused": True}
    optimizer = torch.optim.AdamW(vae.parameters(), **options)
    names = ("batch_size", "lr", "kl_weight", "seed")
    state = TrainingState(
        args.output.with_suffix(".training.pt"),
        {name: getattr(args, name) for name in names},
        {"model": vae, "optimizer": optimizer},
    )
    state.resume()
    began, losses = time.monotonic() - state.seconds, []
    for iteration in range(state.iteration, args.iterations):
        torch.manual_seed(iteration_seed(args.seed, iteration))
        optimizer.param_groups[0]["lr"] = learning_rate(iteration, args)
        x = to_float(train[torch.randint(len(train), (args.batch_size,))])
        flipped = torch.rand(len(x), 1, 1, 1) < 0.5
        loss = vae_loss(vae, torch.where(flipped, x.flip(3), x), args.kl_weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        done = iteration + 1
        if done % args.save_every == 0 or done == args.iterations:
            seconds = time.monotonic() - began
            mean = torch.stack(losses).mean().item()
            losses.clear()
            state.save(done, seconds)
            held = psnr(vae, held_out[::8]).mean().item()
            figures = f"loss {mean:.4f}, held-out PSNR {held:.2f} dB, {seconds:.0f} s"
            print(f"iteration {done}: {figures}", flush=True)
    normalise_latents(vae, encode(vae, train))
    write_folder(vae, args.output)
    values = psnr(vae, held_out)
    figures = {
        "held_out_psnr_db": round(values.mean().item(), 3),
        "held_out_psnr_of_mean_error_db": round(-10 * torch.log10((10 ** (-values / 10)).mean()).item(), 3),
        "parameters": sum(p.numel() for p in vae.parameters()),
        "seconds": round(state.seconds),
    }
    print(f"wrote {args.output}: {json.dumps(figures)}")


if __name__ == "__main__":
    cli.run(main, parse_args())
