"""Which model: its flags, and what loads it together with its VAE's config."""

import argparse
from dataclasses import dataclass

import torch

from backbones.loading import choose_vae, find_checkpoint, load_model
from backbones.vae import VaeConfig, read_vae_config
from common import cli, registry
from models import DiT

UNREAD = cli.Unread(("ckpt",), lambda args: args.random_weights, "with --random-weights")


@dataclass(frozen=True)
class ModelSettings:
    """A model by name, its weights and its VAE; None: the default of what the name stands for.

    ckpt: checkpoint file, index of shards or folder. image_size: pixels. class_dropout_prob: 0 for a model
    without a null label. vae: `ema`, `mse`, `none` or a folder.
    """

    model: str = "DiT-XL/2"
    ckpt: str | None = None
    random_weights: bool = False
    image_size: int | None = None
    num_classes: int | None = None
    class_dropout_prob: float = 0.1
    learn_sigma: bool = True
    vae: str | None = None

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> "ModelSettings":
        return cli.settings_from(cls, args)

    def load(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, fetch: bool = True
    ) -> tuple[DiT, VaeConfig | None]:
        """The model, ready to sample, and the config of its VAE; None for a model of pixels.

        fetch: download an absent official checkpoint; else (several processes would meet) it is refused.
        Raises ValueError or FileNotFoundError, in one line, for what does not exist or does not fit.
        """
        vae = read_vae_config(choose_vae(self.vae, self.model, self.random_weights))
        ckpt = self.ckpt
        if not ckpt and not self.random_weights:
            ckpt = find_checkpoint(self.model, self.image_size, fetch)
        model = load_model(
            self.model, ckpt, self.image_size, self.num_classes, device, dtype, self.random_weights,
            class_dropout_prob=self.class_dropout_prob, learn_sigma=self.learn_sigma, vae=vae,
        )  # fmt: skip
        return model, vae


def add_arguments(parser: argparse.ArgumentParser, with_vae: bool = False) -> None:
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", default="DiT-XL/2", help=f"DiT-XL/2 and its family, or {' or '.join(registry.presets())}"
    )
    model.add_argument(
        "--ckpt", help="checkpoint file, index of shards or folder (default: the official one)"
    )
    model.add_argument("--random-weights", action="store_true", help="no checkpoint: real speed, no meaning")
    model.add_argument("--image-size", type=cli.positive_int, help="pixels (default 256)")
    model.add_argument("--num-classes", type=cli.positive_int, help="default 1000")
    model.add_argument(
        "--class-dropout-prob", type=cli.below_one, default=0.1, metavar="P",
        help="what the model was trained with; 0: it has no null label (no guidance), else P changes nothing",
    )  # fmt: skip
    model.add_argument(
        "--no-learn-sigma", dest="learn_sigma", action="store_false",
        help="a model that predicts no variance; DDPM then takes the posterior's (fixed, the smaller one)",
    )  # fmt: skip
    if with_vae:
        model.add_argument(
            "--vae",
            help="ema, mse, none or a VAE's or pipeline's folder (default ema; pixel models have none)",
        )


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Note flags that have no effect under the others. args: as `cli.parse` returns them."""
    cli.note_unread(parser, args, [UNREAD])
