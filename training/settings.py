"""What a router's training does, as plain values: the method with its own, and what all methods share.

`TrainSettings` is built from the flags of `train_router.py` (`training/arguments.py`) or by hand. The
defaults are the published ones; those of end-to-end training are ours.
"""

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from backbones.loading import is_latent
from backbones.settings import ModelSettings
from common import cli, registry


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """What HarmoniCa and Learning-to-Cache share: each row of a router is trained by itself.

    ste_threshold: a branch is computed where its score is above. l1: weight beta of the regularization, or
    its start where the run has a target. cost: a branch counts as one (`count`) or by its MACs (`macs`).
    data_loss: a key of `objectives.DATA_LOSSES`. router_train: `soft` scores, or `ste`, thresholded
    with a straight-through gradient. epochs: trajectories, or passes of the data.
    """

    ste_threshold: float = 0.1
    l1: float
    cost: str = "count"
    data_loss: str = "all"
    router_train: str = "soft"
    lr: float
    epochs: int = 2000
    max_steps: int = 20000

    @property
    def without_effect(self) -> set[str]:
        """Names of settings that the others leave without effect."""
        return {"cost"} if self.l1 == 0 else set()


@dataclass(frozen=True, kw_only=True)
class HarmonicaSettings(RowSettings):
    """Step-wise denoising training with the image error proxy.

    proxy: definition of lambda, or `none`. lambda_c: train steps between its refreshes. rollout: `sdt`, or
    `one-step`. trajectories: their number in a round; None: as many as `global_batch_size` rows make.
    """

    name: ClassVar[str] = "harmonica"

    l1: float = 7e-8
    lr: float = 0.01
    cfg_scale: float = 1.5
    trajectories: int | None = None
    proxy: str = "released"
    lambda_c: int = 500
    rollout: str = "sdt"

    @property
    def without_effect(self) -> set[str]:
        return super().without_effect | ({"lambda_c"} if self.proxy == "none" else set())


@dataclass(frozen=True, kw_only=True)
class L2CSettings(RowSettings):
    """Learning-to-Cache, trained on data and without guidance.

    data: an image folder, an .npz of latents, or an example's name. groups: equal parts of a batch, each with
    a pair of steps of its own. every_row: train all rows, not the even ones alone. num_works: loading
    processes.
    """

    name: ClassVar[str] = "l2c"
    cfg_scale: ClassVar[float] = 1.0
    trajectories: ClassVar[None] = None

    l1: float = 1e-6
    lr: float = 0.001
    data: str
    groups: int = 8
    every_row: bool = False
    num_works: int = 0

    @property
    def has_images(self) -> bool:
        """Whether the data are an image folder, which a VAE encodes."""
        return self.data not in registry.data() and Path(self.data).is_dir()


@dataclass(frozen=True, kw_only=True)
class EndToEndSettings:
    """Training on the error of the final image.

    terms: last outputs that a reused branch combines; 0: the last one as it is. search: `linear`, or `grow`,
    the older one. search_samples: samples that `linear` looks at, rounded up to whole batches. any_speed: one
    router for every speed-up. init: a router whose schedule is the start of `grow`. pool: samples among which
    batches are drawn by importance. moments_weight: of the images' mean and variance in the loss. window:
    steps that gradients pass; None: all. open_share: share of cells that a step of `grow` asks about.
    keep_activations: do not recompute them for the gradient.
    """

    name: ClassVar[str] = "end-to-end"
    ste_threshold: ClassVar[float] = 0.1  # written into the router; every threshold means the same schedule

    lr: float = 0.05
    max_steps: int = 40
    cfg_scale: float = 1.5
    trajectories: int | None = None
    terms: int = 3
    search: str = "linear"
    search_samples: int = 128
    any_speed: bool = False
    init: str | None = None
    pool: int | None = None
    moments_weight: float = 0.0
    window: int | None = None
    open_share: float = 1.0
    keep_activations: bool = False

    @property
    def without_effect(self) -> set[str]:
        unread = set() if self.terms else {"window", "lr", "moments_weight"}
        return unread | ({"init", "open_share"} if self.search == "linear" else {"search_samples"})


METHODS = {one.name: one for one in (HarmonicaSettings, L2CSettings, EndToEndSettings)}


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """What a run leaves, and from which run it goes on; log_every and ckpt_every count train steps."""

    results_dir: Path = Path("results")
    log_every: int = 100
    ckpt_every: int = 1000
    resume: str | None = None
    wandb: bool = False


# The settings that decide a training's numbers, in the order in which a checkpoint records them.
_RECORDED = (
    "method", "model", "num_sampling_steps", "sampler", "cfg_scale", "ste_threshold", "l1", "target_cur",
    "target_speedup", "cost", "lambda_c", "proxy", "data_loss", "router_train", "rollout", "data",
    "every_row", "groups", "lr", "global_batch_size", "trajectories", "global_seed", "precision", "vae",
    "terms", "search", "search_samples", "any_speed", "init", "window", "pool", "moments_weight",
    "open_share", "max_steps",
)  # fmt: skip


@dataclass(frozen=True)
class TrainSettings:
    """One training of a router.

    num_sampling_steps: T, or a respacing such as `ddim50`. sampler: a key of `diffusion.SAMPLERS`;
    Learning-to-Cache has DDIM. target_cur, target_speedup: at most one of them.
    global_batch_size: rows of a forward pass over all processes; under guidance a trajectory has two.
    precision: `fp32`, `tf32` or `bf16`; None: the device's default. model.vae: encodes an image folder, and
    a VAE's folder says what the model's image size means.
    """

    method: HarmonicaSettings | L2CSettings | EndToEndSettings = HarmonicaSettings()
    model: ModelSettings = ModelSettings()
    num_sampling_steps: str = "10"
    sampler: str = "ddim"
    target_cur: float | None = None
    target_speedup: float | None = None
    global_batch_size: int = 64
    global_seed: int = 42
    precision: str | None = None
    compile: bool = False
    recompute_branches: bool = False
    output: OutputSettings = OutputSettings()

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> "TrainSettings":
        """The settings that the flags of `train_router.py` ask for, after `training.arguments.parse_args`."""
        method = cli.settings_from(METHODS[args.method], args)
        if method.trajectories is not None and "trajectories" not in args.given:
            method = dataclasses.replace(method, trajectories=None)
        parts = {"method": method, "model": ModelSettings.from_arguments(args)}
        parts["output"] = cli.settings_from(OutputSettings, args)
        others = [field.name for field in dataclasses.fields(cls) if field.name not in parts]
        return cls(**parts, **{name: getattr(args, name) for name in others})

    @property
    def num_samples(self) -> int:
        """Samples of a round over all processes: trajectories, for Learning-to-Cache images."""
        rows = 1 if self.method.cfg_scale == 1 else 2
        return self.method.trajectories or self.global_batch_size // rows

    @property
    def vae(self) -> str | None:
        """The VAE of the images that are trained on, or any that is given as a folder; None for no VAE."""
        given = self.model.vae
        if given is not None and Path(given).is_dir():
            return given
        has_images = isinstance(self.method, L2CSettings) and self.method.has_images
        return (given or "ema") if has_images else None

    @property
    def loaded_model(self) -> ModelSettings:
        """The model with the VAE whose latents it has; `none` where no VAE is read or it has pixels."""
        is_read = self.vae is not None and is_latent(self.model.model)
        return dataclasses.replace(self.model, vae=self.vae if is_read else "none")

    def record(self) -> dict[str, object]:
        """What decides the numbers, by flag: a resumed run must have the same, and the same model."""
        values = dataclasses.asdict(self.method) | {
            name: getattr(self, name)
            for name in ("num_sampling_steps", "sampler", "target_cur", "target_speedup")
        }
        values |= {"method": self.method.name, "model": self.model.model, "global_seed": self.global_seed}
        values |= {"precision": self.precision}
        if "trajectories" in values:
            values["trajectories"] = self.num_samples
        else:
            values["global_batch_size"] = self.global_batch_size
        if isinstance(self.method, L2CSettings):
            del values["sampler"]
        if self.vae is not None:
            values["vae"] = self.vae
        ends_early = isinstance(self.method, RowSettings)  # else the learning rate falls to 0 at the end
        unread = self.method.without_effect | ({"max_steps"} if ends_early else set())
        return {name: values[name] for name in _RECORDED if name in values and name not in unread}
