"""The values of `--accelerate-method`: their flags, and the schedule and reuse that each one means.

| value | schedule | flags |
|---|---|---|
| `none` | every branch computed | |
| `fewer-steps` | every branch computed, of a shorter chain | `--steps N` |
| `fora` | every N-th step computed | `--interval N`, `--anchor A`, `--first-steps F` |
| `random` | a random share reused | `--cur X`, `--schedule-seed S` |
| `dynamiclayer` | a router's, whatever trained it | `--path ROUTER`, `--thres X` |
| `l2c` | a Learning-to-Cache router's | `--path ROUTER`, `--thres X` |
| `taylor-` and one of the last four | the same, reused branches extrapolated | and `--order 1` or `2` |
| `calibrated-` and one of those | the same, weights of reuse solved here | and `--calibrate N`, `--terms K` |

A router of `train_router.py --method end-to-end` holds the weights of its reuse, and `dynamiclayer` uses
them.
"""

import argparse
import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from backbones import settings as model_settings
from backbones.loading import pixels_of
from common import cli
from common.cli import Unread
from diffusion import GaussianDiffusion, create_diffusion
from models import DiT
from router import Schedule, load_router
from sampling.loop import Trajectory
from schedules.baselines import ANCHORS, fora_schedule, forecast, random_schedule
from schedules.calibrate import calibrated

_FLAGS = {
    "none": (),
    "fewer-steps": ("steps",),
    "fora": ("interval", "anchor", "first_steps"),
    "random": ("cur", "schedule_seed"),
    "dynamiclayer": ("path", "thres"),
    "l2c": ("path", "thres"),
}
_CACHING = ("fora", "random", "dynamiclayer", "l2c")
_REUSE = {"taylor": ("order",), "calibrated": ("calibrate", "terms")}  # how reused branches get their output
_OF_CACHING = ("cache_dtype",)  # of `execution.py`: there is nothing to store where all is computed
_OPTIONAL = ("anchor", "first_steps", "schedule_seed", "thres", "order", "calibrate", "terms")
METHODS = (*_FLAGS, *(f"{reuse}-{name}" for reuse in _REUSE for name in _CACHING))
CALIBRATION_SAMPLES = 64


@dataclass(frozen=True)
class Method:
    """What a sampler needs to know: the chain, which branches to compute, how to reuse the others.

    schedule None: all are computed.
    """

    name: str
    diffusion: GaussianDiffusion
    schedule: Schedule | None

    def trajectory(self, model: DiT, cfg_scale: float = 1.0, sampler: str = "ddim") -> Trajectory:
        """On `model`, with its guidance and sampler."""
        return Trajectory.of(model, self.diffusion, cfg_scale, sampler, self.schedule)

    def speedup_macs(self, model: DiT, num_steps: int) -> float:
        """MACs of the uncached chain of `num_steps` over this method's."""
        cached = 1.0 if self.schedule is None else self.schedule.speedup_macs(model)
        return cached * num_steps / self.diffusion.num_timesteps

    def with_weights(self, weights: Tensor | None) -> "Method":
        """The same with these weights of reuse (T, B, K); None: as it is."""
        if weights is None:
            return self
        return dataclasses.replace(self, schedule=dataclasses.replace(self.schedule, weights=weights))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("caching")
    group.add_argument("--accelerate-method", default="none", help=f"one of {', '.join(METHODS)}")
    group.add_argument("--path", help="dynamiclayer, l2c: router file, or a folder that holds one")
    group.add_argument(
        "--thres", type=cli.threshold, help="compute where score > thres (default: the router's, else 0.1)"
    )
    group.add_argument(
        "--interval", type=cli.interval, help="fora: compute every N-th step; 3/2 is two of three"
    )
    group.add_argument(
        "--anchor", choices=ANCHORS,
        help="fora: count intervals from the first executed step (the default), or from the last as the "
        "released FORA does",
    )  # fmt: skip
    group.add_argument(
        "--first-steps", type=cli.positive_int, metavar="F",
        help="fora: compute the first F steps in any case (default 1; the released TaylorSeer: 2)",
    )  # fmt: skip
    group.add_argument("--cur", type=cli.finite, help="random: share of branches reused, 0 .. 1")
    group.add_argument("--schedule-seed", type=cli.seed, help="random: of the draw (default 0)")
    group.add_argument("--steps", type=cli.positive_int, help="fewer-steps: denoising steps instead")
    group.add_argument("--order", type=int, choices=(1, 2), help="taylor-*: of the forecast (default 1)")
    group.add_argument(
        "--calibrate", type=cli.positive_int, metavar="N",
        help="calibrated-*: samples, drawn at once, on which the weights of reuse are solved (default 64)",
    )  # fmt: skip
    group.add_argument(
        "--terms",
        type=int,
        choices=(1, 2, 3),
        help="calibrated-*: last outputs that are combined (default 3)",
    )


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse an unknown method and a missing flag; note flags that it does not read (of `cli.parse`)."""
    name = args.accelerate_method
    if name not in METHODS:
        parser.error(f"--accelerate-method {name!r} is unknown; choose one of {', '.join(METHODS)}")
    reuse, base = split_name(name)
    read = _FLAGS[base] + _REUSE.get(reuse, ())
    for flag in read:
        if flag not in _OPTIONAL and getattr(args, flag) is None:
            what = "a router file or a folder that holds one" if flag == "path" else "a number"
            parser.error(f"--accelerate-method {name} needs --{flag}, {what}")
    every = {flag for flags in (*_FLAGS.values(), *_REUSE.values(), _OF_CACHING) for flag in flags}
    read += _OF_CACHING if base in _CACHING else ()
    unread = Unread(every.difference(read), lambda _: True, "with --accelerate-method {accelerate_method}")
    cli.note_unread(parser, args, [unread, model_settings.UNREAD])


def spec_flags(spec: str) -> dict[str, str]:
    """Flags of a method as one word: `none`, `fora:2`, `random:0.375`, `l2c:ROUTER`, or a router alone."""
    name, _, value = spec.partition(":")
    if name not in METHODS:
        return {"accelerate_method": "dynamiclayer", "path": spec}
    flags = _FLAGS[split_name(name)[1]]
    if bool(value) != bool(flags):
        example = f"{name}:{flags[0].upper()}" if flags else name
        raise ValueError(f"method {spec!r} does not read; write {example}")
    return {"accelerate_method": name} | ({flags[0]: value} if flags else {})


def caches(spec: str) -> bool:
    """Whether the method that `spec_flags` reads stores branch outputs."""
    return split_name(spec_flags(spec)["accelerate_method"])[1] in _CACHING


def load_spec(spec: str, model: DiT, /, **setting) -> Method:
    """The method that `spec_flags` reads. setting: what else `load_method` wants in its arguments."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = [word for flag, value in spec_flags(spec).items() for word in (flag, value)]
    words[::2] = [f"--{flag.replace('_', '-')}" for flag in words[::2]]
    return load_method(argparse.Namespace(**vars(parser.parse_args(words)) | setting), model)


def split_name(name: str) -> tuple[str, str]:
    """`taylor-fora` as ("taylor", "fora"), `fora` as ("", "fora")."""
    reuse, _, base = name.partition("-")
    return (reuse, base) if reuse in _REUSE else ("", name)


def uncached(args: argparse.Namespace, model: DiT) -> Method:
    """What every method is compared with."""
    return Method("none", create_diffusion(args.num_sampling_steps, learn_sigma=model.learn_sigma), None)


def load_method(args: argparse.Namespace, model: DiT, solve: bool = True) -> Method:
    """Resolve the arguments (`num_sampling_steps`, `cfg_scale` and those above) for a model.

    solve: the weights of reuse of a calibrated method too; else `solved` does that. Raises ValueError or
    FileNotFoundError where they do not fit it, in one line.
    """
    reuse, base = split_name(args.accelerate_method)
    diffusion = uncached(args, model).diffusion
    size, schedule = (diffusion.num_timesteps, model.num_branches), None
    if base == "fewer-steps":
        if args.steps > diffusion.num_timesteps:
            raise ValueError(
                f"--steps {args.steps} is more than --num-sampling-steps {diffusion.num_timesteps}"
            )
        ddim = "ddim" if str(args.num_sampling_steps).startswith("ddim") else ""  # the same spacing
        diffusion = create_diffusion(f"{ddim}{args.steps}", learn_sigma=model.learn_sigma)
    elif base == "fora":
        schedule = fora_schedule(*size, args.interval, args.anchor or "first", args.first_steps or 1)
    elif base == "random":
        schedule = random_schedule(*size, args.cur, args.schedule_seed or 0)
    elif base in ("dynamiclayer", "l2c"):
        schedule = _router_schedule(args, model, diffusion, base)
    if reuse == "taylor":
        schedule = forecast(schedule, args.order or 1)
    method = Method(args.accelerate_method, diffusion, schedule)
    return solved(args, model, method) if solve and calibration(args) else method


def calibration(args: argparse.Namespace) -> dict[str, int]:
    """What the weights of a calibrated method are solved from and for; empty for any other."""
    if split_name(args.accelerate_method)[0] != "calibrated":
        return {}
    return {"calibrate": args.calibrate or CALIBRATION_SAMPLES, "terms": args.terms or 3}


def solved(args: argparse.Namespace, model: DiT, method: Method) -> Method:
    """A calibrated method with its weights of reuse."""
    num_samples, num_terms = calibration(args).values()
    trajectory = method.trajectory(model, args.cfg_scale, "ddpm" if args.p_sample else "ddim")
    return dataclasses.replace(method, schedule=calibrated(trajectory, num_terms, num_samples))


def _router_schedule(
    args: argparse.Namespace, model: DiT, diffusion: GaussianDiffusion, base: str
) -> Schedule:
    router = load_router(args.path, args.model, diffusion.num_timesteps, model.num_branches)
    trained_by = router.info.get("method", "")
    if base == "l2c" and not trained_by.startswith("l2c"):
        raise ValueError(
            f"{router.info['path']} was trained by {trained_by or 'an unknown method'}, not l2c; "
            "use --accelerate-method dynamiclayer"
        )
    here = {"image_size": pixels_of(model), "cfg_scale": args.cfg_scale}
    here["respacing"] = args.num_sampling_steps
    for fact, value in here.items():
        if str(router.info.get(fact, value)) != str(value):
            print(f"note: the router was trained at {fact} {router.info[fact]}, this samples at {value}")
    print(f"router {router.info['path']}")
    own = router.info.get("threshold", 0.1)
    schedule = router.schedule(own if args.thres is None else args.thres)
    if args.thres not in (None, own) and torch.equal(schedule.compute, router.schedule(own).compute):
        print(f"note: --thres {args.thres:g} has no effect: no score lies between it and {own:g}")
    return schedule
