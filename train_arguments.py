"""The flags of `train_router.py`: their defaults by method, and what does not go together."""

import argparse
import math
from pathlib import Path

import cli
from end_to_end import MAX_TERMS
from objectives import PROXY_DEFINITIONS

# Published, but for end-to-end, which is ours.
DEFAULTS = {
    "harmonica": {"lr": 0.01, "l1": 7e-8, "max_steps": 20000, "log_every": 100, "ckpt_every": 1000},
    "l2c": {"lr": 0.001, "l1": 5e-6, "max_steps": 20000, "log_every": 100, "ckpt_every": 1000},
    "end-to-end": {
        "lr": 0.1, "max_steps": 100, "log_every": 5, "ckpt_every": 10, "terms": 3, "open_share": 1.0,
        "moments_weight": 0.0,
    },
}  # fmt: skip


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a caching router for a frozen DiT.")
    cli.add_model_arguments(parser)
    method = parser.add_argument_group("method (defaults: the published ones for T = 10)")
    method.add_argument("--method", choices=DEFAULTS, default="harmonica", help="default harmonica")
    method.add_argument("--num-sampling-steps", default="10", help="T, or a respacing such as ddim50")
    method.add_argument("--cfg-scale", type=cli.finite, help="guidance, 1 = off (default 1.5); not l2c")
    method.add_argument(
        "--ste-threshold", type=cli.threshold, default=0.1, help="compute where score > threshold"
    )
    method.add_argument(
        "--lambda-c", type=cli.positive_int, default=500, help="train steps between proxy refreshes"
    )
    method.add_argument(
        "--proxy", choices=(*PROXY_DEFINITIONS, "none"), default="released", help="lambda; none: all ones"
    )
    method.add_argument(
        "--data-loss", choices=("all", "eps"), default="all", help="compare all channels, or eps alone"
    )
    method.add_argument(
        "--router-train", choices=("soft", "ste"), default="soft",
        help="blend by the scores, or threshold them and pass the gradient straight through",
    )  # fmt: skip
    method.add_argument(
        "--rollout", choices=("sdt", "one-step"), default="sdt",
        help="train along the routed trajectory, or each step from an uncached one",
    )  # fmt: skip
    speed = parser.add_argument_group("speed: a weight, or the target that it is adjusted to")
    speed.add_argument("--l1", type=float, help="regularization weight beta (7e-8, l2c 5e-6); or its start")
    target = speed.add_mutually_exclusive_group()
    target.add_argument("--target-cur", type=cli.finite, metavar="X", help="share of branches reused, 0 .. 1")
    target.add_argument(
        "--target-speedup",
        type=cli.finite,
        metavar="X",
        help="speed-up by MACs; a run may go on for a quarter of its steps to meet it",
    )
    speed.add_argument(
        "--cost", choices=("count", "macs"), default="count", help="what beta weighs a branch by"
    )
    add_single_method_arguments(parser)
    add_run_arguments(parser)
    cli.add_device_arguments(parser)
    args = parser.parse_args(arguments)
    complete_arguments(parser, args)
    return args


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """How long and how a run trains, and what it leaves."""
    training = parser.add_argument_group("training")
    training.add_argument("--lr", type=cli.positive, help="default 0.01, l2c 0.001, end-to-end 0.1")
    training.add_argument(
        "--epochs",
        type=cli.positive_int,
        default=2000,
        help="trajectories; l2c: passes of the data; not end-to-end",
    )
    training.add_argument(
        "--max-steps", type=cli.positive_int, help="train steps; ends the run (default 20000, end-to-end 100)"
    )
    training.add_argument(
        "--global-batch-size", type=cli.positive_int, default=64, help="samples of all processes"
    )
    training.add_argument("--compile", action="store_true", help="compile the branches (torch.compile)")
    training.add_argument(
        "--recompute-branches", action="store_true",
        help="activation checkpointing by branch, for large images: less memory, a third more time",
    )  # fmt: skip
    training.add_argument("--global-seed", type=cli.non_negative_int, default=42)
    output = parser.add_argument_group("output")
    output.add_argument("--results-dir", type=Path, default=Path("results"))
    output.add_argument("--log-every", type=cli.positive_int, help="default 100, end-to-end 5")
    output.add_argument("--ckpt-every", type=cli.positive_int, help="default 1000, end-to-end 10")
    output.add_argument(
        "--resume", metavar="PATH|auto", help="a run's folder or checkpoint; auto: the newest like this"
    )
    output.add_argument("--wandb", action="store_true", help="log to Weights & Biases too")


def add_single_method_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that one method alone reads."""
    beyond = parser.add_argument_group("end-to-end")
    beyond.add_argument(
        "--terms", type=int, choices=range(MAX_TERMS + 1),
        help="last outputs that a reused branch combines (default 3); 0: it takes the last one as it is",
    )  # fmt: skip
    beyond.add_argument("--init", metavar="ROUTER", help="start from its schedule, of any number of steps")
    beyond.add_argument(
        "--pool",
        type=cli.positive_int,
        metavar="N",
        help="draw batches from N samples by importance: more of those that errors lead astray; and search "
        "among schedules that compute noisy steps often enough for them",
    )
    beyond.add_argument(
        "--moments-weight",
        type=cli.finite,
        metavar="W",
        help="count what reuse does to the images' mean and variance too, W times, while weights are trained "
        "(default 0)",
    )
    beyond.add_argument(
        "--window", type=cli.positive_int, help="steps that gradients of the weights pass (default: all)"
    )
    beyond.add_argument(
        "--open-share",
        type=cli.finite,
        help="share of the cells that a step of the search asks about (default 1)",
    )
    beyond.add_argument(
        "--keep-activations", action="store_true", help="of all steps: a third faster, T times the memory"
    )
    data = parser.add_argument_group("data (l2c)")
    data.add_argument("--data", help="an image folder, an .npz of latents and labels, or `digits`")
    data.add_argument(
        "--every-row", action="store_true", help="train all rows, not the even ones alone (not in the paper)"
    )
    data.add_argument(
        "--vae", help="encodes an image folder (default ema); of a VAE's folder every method reads the factor"
    )
    data.add_argument("--num-works", "--num-workers", type=cli.non_negative_int, help="loading processes")


def complete_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in what the method decides, refuse what it cannot do, warn of what it does not read."""
    args.notes = []
    changed = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    for name in UNREAD[args.method]:
        if name == "vae" and args.vae is not None and Path(args.vae).is_dir():
            continue  # its factor says what --image-size means
        if name in changed:
            args.notes.append(f"--{name.replace('_', '-')} has no effect with --method {args.method}")
            setattr(args, name, parser.get_default(name))
    if args.method == "l2c" and not args.data:
        parser.error("--method l2c needs --data, an image folder, an .npz of latents or `digits`")
    has_target = args.target_cur is not None or args.target_speedup is not None
    if args.method == "end-to-end" and not has_target:
        parser.error("--method end-to-end needs --target-speedup or --target-cur, such as --target-speedup 2")
    if args.l1 is not None and not 0 <= args.l1 < math.inf:
        parser.error(f"--l1 {args.l1:g} is no weight; give 0 or more")
    for name, value in DEFAULTS[args.method].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.l1 == 0 and has_target:
        parser.error("--l1 0 cannot be adjusted to a target; leave it out")
    if args.open_share is not None and not 0 < args.open_share <= 1:
        parser.error(f"--open-share {args.open_share:g} is outside (0, 1]")
    if args.moments_weight is not None and args.moments_weight < 0:
        parser.error(f"--moments-weight {args.moments_weight:g} is no weight; give 0 or more")
    if args.moments_weight and args.terms == 0:
        args.notes.append("--moments-weight has no effect with --terms 0: there are no weights to train")
    if args.pool is not None and args.pool < args.global_batch_size:
        parser.error(f"--pool {args.pool} is less than a batch; give --global-batch-size or more")
    if args.method == "l2c":
        args.cfg_scale, args.vae, args.num_works = 1.0, args.vae or "ema", args.num_works or 0
    elif args.cfg_scale is None:
        args.cfg_scale = 1.5


# Flags of others that a method does not read.
_OF_L2C = ("data", "every_row", "vae", "num_works")
_OF_HARMONICA = ("proxy", "lambda_c", "rollout")
_OF_BEYOND = ("terms", "init", "pool", "moments_weight", "window", "open_share", "keep_activations")
UNREAD = {
    "harmonica": (*_OF_L2C, *_OF_BEYOND),
    "l2c": ("cfg_scale", *_OF_HARMONICA, *_OF_BEYOND),
    "end-to-end": (
        *_OF_L2C,
        *_OF_HARMONICA,
        "epochs",
        "l1",
        "cost",
        "data_loss",
        "router_train",
        "ste_threshold",
    ),
}
