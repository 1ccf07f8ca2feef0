"""How to sample: steps, sampler, guidance, seed, batch size; from flags or by hand."""

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from backbones.contract import Backbone
from common import cli
from diffusion import SAMPLERS, GaussianDiffusion, create_diffusion
from router import Schedule
from sampling.loop import Rule, Trajectory


@dataclass(frozen=True)
class SamplingSettings:
    """num_sampling_steps: T, or a respacing such as "ddim50". sampler: a key of `diffusion.SAMPLERS`.

    eta: noise that DDIM adds, 0 .. 1. cfg_scale: guidance, 1 = off. seed: sample k depends on (seed, k)
    alone. batch_size: samples at once; None: all.
    """

    num_sampling_steps: str = "50"
    sampler: str = "ddim"
    eta: float = 0.0
    cfg_scale: float = 1.0
    seed: int = 0
    batch_size: int | None = None

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> "SamplingSettings":
        sampler = "ddpm" if args.p_sample else args.sampler or cls.sampler
        return dataclasses.replace(cli.settings_from(cls, args), sampler=sampler)

    def chain(self, model: Backbone) -> GaussianDiffusion:
        """The chain of the uncached trajectory. Raises ValueError for a respacing that does not fit."""
        return create_diffusion(self.num_sampling_steps, learn_sigma=model.learn_sigma)

    def trajectory(
        self, model: Backbone, chain: GaussianDiffusion, schedule: Schedule | Rule | None = None
    ) -> Trajectory:
        return Trajectory.of(model, chain, self.cfg_scale, self.sampler, schedule, self.eta)


def add_arguments(
    parser: argparse.ArgumentParser,
    defaults: SamplingSettings,
    batch_help: str,
    aliases: Mapping[str, str] | None = None,
) -> argparse._ArgumentGroup:
    """The flags of sampling; returns their group. aliases: other spellings, by the name of the setting."""
    group = parser.add_argument_group("sampling")

    def add(name: str, **options) -> None:
        spellings = [f"--{name.replace('_', '-')}", *filter(None, [(aliases or {}).get(name)])]
        group.add_argument(*spellings, default=getattr(defaults, name), **options)

    steps, scale = defaults.num_sampling_steps, defaults.cfg_scale
    add("num_sampling_steps", help=f"number of steps, or a respacing such as ddim50 (default {steps})")
    add("cfg_scale", type=cli.finite, help=f"guidance, 1 = off (default {scale:g})")
    group.add_argument("--sampler", choices=SAMPLERS, help=f"default {defaults.sampler}")
    group.add_argument("--ddim-sample", action="store_true", help="DDIM, eta 0 (the default)")
    group.add_argument("--p-sample", action="store_true", help="DDPM (ancestral)")
    add("seed", type=cli.seed, help=f"sample k depends on the seed and k alone (default {defaults.seed})")
    add("batch_size", type=cli.positive_int, help=batch_help)
    return group


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse two samplers at once."""
    given = {
        "--sampler ": args.sampler,
        "--ddim-sample": args.ddim_sample and "ddim",
        "--p-sample": args.p_sample and "ddpm",
    }
    flags = [flag for flag, sampler in given.items() if sampler]
    if len({given[flag] for flag in flags}) > 1:
        spelled = [f"{flag}{given[flag]}" if flag.endswith(" ") else flag for flag in flags]
        parser.error(f"{' and '.join(spelled)} exclude each other; give one")
