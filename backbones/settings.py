"""Which model: its flags, and its loading together with its VAE's config."""

import argparse
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from backbones.contract import Backbone
from backbones.loading import (
    choose_vae,
    find_checkpoint,
    is_diffusers_model,
    is_text_model,
    is_video_model,
    load_model,
)
from backbones.prompts import read_prompts
from backbones.vae import VaeConfig, read_vae_config
from common import cli, registry

UNREAD = (
    cli.Unread(("ckpt", "text_encoder"), lambda args: args.random_weights, "with --random-weights"),
    cli.Unread(
        ("prompt", "prompts", "text_encoder"),
        lambda args: not is_text_model(args.model),
        "with --model {model}",
    ),
    cli.Unread(
        ("num_classes", "class_dropout_prob", "learn_sigma"),
        lambda args: is_diffusers_model(args.model),
        "with --model {model}: its config says what it is given",
    ),
    cli.Unread(("num_frames",), lambda args: not is_video_model(args.model), "with --model {model}"),
    cli.Unread(
        ("image_size",),
        lambda args: is_diffusers_model(args.model) and not is_text_model(args.model),
        "with --model {model}: it draws one size",
    ),
)


@dataclass(frozen=True)
class ModelSettings:
    """A model by name, its weights and its VAE. None means the default for this name.

    ckpt: checkpoint file, index of shards or folder. image_size: pixels. class_dropout_prob: 0 for a model
    without a null label. vae: `ema`, `mse`, `none` or a folder. For text-to-image models: the prompts
    themselves, or a file with one a line; and the folder or Hub id of their encoder. num_frames: of a video.
    """

    model: str = "DiT-XL/2"
    ckpt: str | None = None
    random_weights: bool = False
    image_size: int | None = None
    num_classes: int | None = None
    class_dropout_prob: float = 0.1
    learn_sigma: bool = True
    vae: str | None = None
    prompt: tuple[str, ...] | None = None
    prompts: Path | None = None
    text_encoder: str | None = None
    num_frames: int = 1

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> "ModelSettings":
        settings = cli.settings_from(cls, args)
        return dataclasses.replace(settings, prompt=settings.prompt and tuple(settings.prompt))

    @property
    def texts(self) -> list[str]:
        """The prompts that the model is given."""
        return read_prompts(self.prompts) if self.prompts else list(self.prompt or ())

    def load(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, fetch: bool = True
    ) -> tuple[Backbone, VaeConfig | None]:
        """The model, ready to sample, and the config of its VAE; None for a model of pixels.

        fetch: download an absent official checkpoint; else (several processes would meet) it is refused.
        Raises ValueError or FileNotFoundError, in one line, for what does not exist or does not fit.
        """
        if is_diffusers_model(self.model):
            return self._load_transformer(device, dtype, fetch)
        vae = read_vae_config(choose_vae(self.vae, self.model, self.random_weights))
        ckpt = self.ckpt
        if not ckpt and not self.random_weights:
            ckpt = find_checkpoint(self.model, self.image_size, fetch)
        model = load_model(
            self.model, ckpt, self.image_size, self.num_classes, device, dtype, self.random_weights,
            class_dropout_prob=self.class_dropout_prob, learn_sigma=self.learn_sigma, vae=vae,
        )  # fmt: skip
        return model, vae

    def _load_transformer(
        self, device: torch.device | str, dtype: torch.dtype, fetch: bool
    ) -> tuple[Backbone, VaeConfig | None]:
        from backbones.text_models import load_class_model, load_text_model  # bring diffusers, slow to import

        if not is_text_model(self.model):
            return load_class_model(
                self.model, self.ckpt, self.random_weights, self.vae, device, dtype, fetch
            )
        return load_text_model(
            self.model, self.texts, self.ckpt, self.random_weights, self.image_size, self.text_encoder,
            self.vae, device, dtype, fetch, self.num_frames,
        )  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser, with_vae: bool = False) -> None:
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        default="DiT-XL/2",
        help=f"DiT-XL/2 and its family, {', '.join([*registry.presets(), *registry.text_models()])}, a "
        "PixArt such as PixArt-Sigma-512, or a folder of diffusers with PixArt, SD3, Flux, Sana, Qwen-Image, "
        "Wan or DiT (default DiT-XL/2)",
    )
    model.add_argument(
        "--ckpt", help="checkpoint file, index of shards or folder (default: the official one)"
    )
    model.add_argument(
        "--random-weights",
        action="store_true",
        help="load no checkpoint: the speed is real, the pictures are noise",
    )
    model.add_argument("--image-size", type=cli.positive_int, help="pixels a side (default 256)")
    model.add_argument("--num-classes", type=cli.positive_int, help="number of classes (default 1000)")
    model.add_argument(
        "--class-dropout-prob", type=cli.below_one, default=0.1, metavar="P",
        help="label dropout that the model was trained with; 0: it has no null label, so no guidance; all "
        "other values mean the same (default 0.1)",
    )  # fmt: skip
    model.add_argument(
        "--no-learn-sigma", dest="learn_sigma", action="store_false",
        help="for a model that predicts no variance; DDPM then uses the posterior's variance",
    )  # fmt: skip
    text = parser.add_argument_group("text-to-image models")
    prompts = text.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", nargs="+", metavar="TEXT", help="one image per prompt")
    prompts.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line")
    text.add_argument(
        "--text-encoder",
        metavar="FOLDER",
        help="folder or Hub id of their encoder, or of a pipeline with it (default: the model's)",
    )
    text.add_argument(
        "--num-frames", type=cli.positive_int, default=1, help="of a video, for Wan: 1, 5, 9, ... (default 1)"
    )
    if with_vae:
        model.add_argument(
            "--vae",
            help="ema, mse, none, or the folder of a VAE or a pipeline (default ema; models of pixels have "
            "none)",
        )


def check_arguments(
    parser: argparse.ArgumentParser, args: argparse.Namespace, unread: Iterable[cli.Unread] = ()
) -> None:
    """Note flags that have no effect under the others; refuse a text model without prompts.

    args: as `cli.parse` returns them. unread: a command's own such flags.
    """
    cli.note_unread(parser, args, [*UNREAD, *unread])
    if is_text_model(args.model) and not (args.prompt or args.prompts):
        parser.error(f"--model {args.model} needs --prompt TEXT or --prompts FILE")
