"""The flags of `train_router.py`: their defaults by method, and what does not go together."""

import argparse
import dataclasses
import math
from pathlib import Path

from backbones import settings as model_settings
from backbones.loading import is_latent
from common import cli, devices, registry
from common.cli import Unread
from diffusion import NUM_TIMESTEPS, SAMPLERS, space_timesteps
from objectives import DATA_LOSSES, PROXY_DEFINITIONS
from router import MAX_TERMS
from training.settings import METHODS, L2CSettings, OutputSettings, TrainSettings

# Train steps between lines of the log and between checkpoints where the usual ones are too many.
GROWN_LR = 0.1  # of weights that a grown schedule starts from
ANY_SPEED_STEPS = 120  # train steps by default of a router for every speed-up
INTERVALS = {"end-to-end": {"log_every": 5, "ckpt_every": 10}}
L2C_THRESHOLD_512 = 0.9
# Learning-to-Cache's beta by (T, pixels) where it was published; all others take `L2CSettings.l1`.
L2C_L1 = {(50, 256): 1e-6, (20, 256): 5e-6, (10, 256): 1e-6, (50, 512): 5e-6}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a caching router for a frozen DiT.")
    model_settings.add_arguments(parser)
    method = parser.add_argument_group("method (defaults: the published ones for T = 10)")
    method.add_argument("--method", choices=METHODS, default="harmonica", help="default harmonica")
    method.add_argument("--num-sampling-steps", default="10", help="T, or a respacing such as ddim50")
    method.add_argument(
        "--sampler", choices=SAMPLERS, default="ddim", help="of the trajectories (default ddim); not l2c"
    )
    method.add_argument("--cfg-scale", type=cli.finite, help="guidance, 1 = off (default 1.5); not l2c")
    method.add_argument(
        "--ste-threshold", type=cli.threshold,
        help="compute where score > threshold (default 0.1; l2c at 512 px 0.9)",
    )  # fmt: skip
    method.add_argument(
        "--lambda-c", type=cli.positive_int, default=500, help="train steps between proxy refreshes"
    )
    method.add_argument(
        "--proxy", choices=(*PROXY_DEFINITIONS, "none"), default="released",
        help="definition of lambda (none: all ones); it is a mean per element where the paper writes a sum, "
        "so --l1 differs from the paper's too",
    )  # fmt: skip
    method.add_argument(
        "--data-loss",
        choices=DATA_LOSSES,
        default="all",
        help="distance of outputs: mean square over all channels, or over those of the noise",
    )
    method.add_argument(
        "--router-train", choices=("soft", "ste"), default="soft",
        help="blend by the scores, or threshold them and pass the gradient straight through",
    )  # fmt: skip
    method.add_argument(
        "--rollout", choices=("sdt", "one-step"), default="sdt",
        help="train along the routed trajectory (sdt), or start each step from the uncached one",
    )  # fmt: skip
    speed = parser.add_argument_group("speed: a weight, or a target to which it is adjusted")
    speed.add_argument(
        "--l1", type=cli.non_negative,
        help="regularization weight beta, or its start with a target (default 7e-8; l2c by T and pixels as "
        "published: 5e-6 for 20 steps, 50 at 512 px too, else 1e-6)",
    )  # fmt: skip
    target = speed.add_mutually_exclusive_group()
    target.add_argument("--target-cur", type=cli.finite, metavar="X", help="share of branches reused, 0 .. 1")
    target.add_argument(
        "--target-speedup",
        type=cli.finite,
        metavar="X",
        help="speed-up by MACs; a run may go on for a quarter of its steps to meet it",
    )
    speed.add_argument(
        "--cost", choices=("count", "macs"), default="count", help="what beta counts: branches, or their MACs"
    )
    add_single_method_arguments(parser)
    add_run_arguments(parser)
    devices.add_arguments(parser)
    args = cli.parse(parser, arguments)
    complete_arguments(parser, args)
    return args


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Length, batch and output of a run."""
    training = parser.add_argument_group("training")
    training.add_argument("--lr", type=cli.positive, help="default 0.01, l2c 0.001, end-to-end 0.05")
    training.add_argument(
        "--epochs",
        type=cli.positive_int,
        default=2000,
        help="trajectories; l2c: passes of the data; not end-to-end",
    )
    training.add_argument(
        "--max-steps", type=cli.positive_int, help="train steps; ends the run (default 20000, end-to-end 40)"
    )
    batch = training.add_mutually_exclusive_group()
    batch.add_argument(
        "--global-batch-size", type=cli.positive_int, metavar="N",
        help="rows of a forward pass over all processes (default 64). Guidance needs a conditional and an "
        "unconditional row for each trajectory, so N / 2 trajectories; without guidance N. l2c: images",
    )  # fmt: skip
    batch.add_argument(
        "--trajectories", type=cli.positive_int, metavar="N",
        help="trajectories over all processes, instead of rows; not l2c",
    )  # fmt: skip
    training.add_argument("--compile", action="store_true", help="compile the branches (torch.compile)")
    training.add_argument(
        "--recompute-branches", action="store_true",
        help="activation checkpointing by branch, for large images: less memory, a third more time",
    )  # fmt: skip
    training.add_argument("--global-seed", type=cli.seed, default=42)
    output = parser.add_argument_group("output")
    output.add_argument("--results-dir", type=Path, default=Path("results"))
    output.add_argument("--log-every", type=cli.positive_int, help="default 100, end-to-end 5")
    output.add_argument("--ckpt-every", type=cli.positive_int, help="default 1000, end-to-end 10")
    output.add_argument(
        "--resume",
        metavar="PATH|auto",
        help="a run's folder or checkpoint; auto: the newest run with the same settings",
    )
    output.add_argument("--wandb", action="store_true", help="log to Weights & Biases too")


def add_single_method_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that only one method reads."""
    own = parser.add_argument_group("end-to-end")
    own.add_argument(
        "--terms", type=int, choices=range(MAX_TERMS + 1),
        help="number of last outputs that a reused branch combines (default 3); 0: the last one as it is",
    )  # fmt: skip
    own.add_argument(
        "--any-speed",
        action="store_true",
        help="train one router for every speed-up from 1.2 to 4, in place of a target",
    )
    own.add_argument(
        "--search", choices=("linear", "grow"),
        help="find the schedule from the linearised error of x_0 (default), or grow it cell by cell"
    )  # fmt: skip
    own.add_argument(
        "--search-samples",
        type=cli.positive_int,
        metavar="N",
        help="with --search linear: samples that the search looks at (default 128)",
    )
    own.add_argument(
        "--init",
        metavar="ROUTER",
        help="with --search grow: a router whose schedule is the start; its number of steps may differ",
    )
    own.add_argument(
        "--pool",
        type=cli.positive_int,
        metavar="N",
        help="draw batches from N samples by importance, more often samples with large errors, and search "
        "among schedules that compute the noisy steps often enough for them",
    )
    own.add_argument(
        "--moments-weight",
        type=cli.non_negative,
        metavar="W",
        help="add W times the error of the images' mean and variance to the loss of the reuse weights "
        "(default 0)",
    )
    own.add_argument(
        "--window",
        type=cli.positive_int,
        help="steps through which gradients of the weights pass (default: all)",
    )
    own.add_argument(
        "--open-share",
        type=cli.finite,
        help="with --search grow: share of the cells that a step of the search asks about (default 1)",
    )
    own.add_argument(
        "--keep-activations",
        action="store_true",
        help="keep the activations of all steps: a third faster, T times the memory",
    )
    data = parser.add_argument_group("data (l2c)")
    data.add_argument(
        "--data",
        "--data-path",
        help=f"an image folder, an .npz of latents and labels, or {' or '.join(registry.data())}",
    )
    data.add_argument(
        "--groups", type=cli.positive_int, metavar="N",
        help="equal parts of the batch; each draws its own pair of steps, and a train step updates the rows "
        "that they drew (default 8, or the largest divisor of 8 that divides the batch)",
    )  # fmt: skip
    data.add_argument(
        "--every-row", action="store_true", help="train all rows, not only the even ones (not in the paper)"
    )
    data.add_argument(
        "--vae",
        help="VAE that encodes an image folder: ema (default), mse or a folder; every method reads the "
        "downsampling factor of a VAE that is given as a folder",
    )
    data.add_argument(
        "--num-works", "--num-workers", type=cli.non_negative_int, help="number of loading processes"
    )


def complete_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in the method's defaults, refuse what it cannot do, note what it does not read."""
    cli.note_unread(parser, args, UNREAD)
    if args.method == "l2c" and not args.data:
        names = " or ".join(registry.data())
        parser.error(f"--method l2c needs --data, an image folder, an .npz of latents or {names}")
    has_target = args.target_cur is not None or args.target_speedup is not None
    if args.method == "end-to-end" and not has_target and not args.any_speed:
        parser.error(
            "--method end-to-end needs --target-speedup or --target-cur, such as --target-speedup 2, or "
            "--any-speed"
        )
    if args.method == "end-to-end" and args.any_speed:
        for given, flag in ((has_target, "a target"), (args.search == "grow", "--search grow")):
            if given:
                parser.error(f"--any-speed and {flag} exclude each other; give one")
        if args.terms == 0:
            parser.error("--any-speed needs weights of reuse; leave out --terms 0")
        args.max_steps = args.max_steps or ANY_SPEED_STEPS
    try:
        defaults = _defaults(args)
    except ValueError as error:  # an unknown respacing
        parser.error(str(error))
    for name, value in defaults.items():
        if getattr(args, name, value) is None:
            setattr(args, name, value)
    if args.l1 == 0 and has_target:
        parser.error("--l1 0 cannot be adjusted to a target; leave it out")
    if args.open_share is not None and not 0 < args.open_share <= 1:
        parser.error(f"--open-share {args.open_share:g} is outside (0, 1]")
    _count_samples(parser, args)
    if args.pool is not None and args.pool < args.trajectories:
        parser.error(f"--pool {args.pool} is less than a batch ({args.trajectories}); give as many or more")


def _defaults(args: argparse.Namespace) -> dict[str, object]:
    """What flags that are not given mean for this method. Raises ValueError for an unknown respacing."""
    method = METHODS[args.method]
    own = {field.name: field.default for field in dataclasses.fields(method)}
    own = {
        name: value for name, value in own.items() if value is not dataclasses.MISSING and name != "groups"
    }
    output = {"log_every": OutputSettings.log_every, "ckpt_every": OutputSettings.ckpt_every}
    defaults = own | output | INTERVALS.get(args.method, {})
    defaults |= {"cfg_scale": method.cfg_scale, "ste_threshold": method.ste_threshold}
    if args.search == "grow":
        defaults["lr"] = GROWN_LR
    if method is L2CSettings:
        num_steps = len(space_timesteps(NUM_TIMESTEPS, args.num_sampling_steps))
        pixels = (args.image_size or 256) if is_latent(args.model) else None
        defaults["l1"] = L2C_L1.get((num_steps, pixels), L2CSettings.l1)
        if pixels == 512:
            defaults["ste_threshold"] = L2C_THRESHOLD_512
    return defaults


def _count_samples(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Set `global_batch_size` (rows or images), and `trajectories` or Learning-to-Cache's `groups`."""
    rows = 1 if args.cfg_scale == 1 else 2  # rows of a trajectory in a forward pass
    if args.trajectories is not None:
        args.global_batch_size = rows * args.trajectories
    size = args.global_batch_size = args.global_batch_size or TrainSettings.global_batch_size
    if size % rows:
        parser.error(
            f"--global-batch-size {size} is odd: under guidance a trajectory is two rows, conditional and "
            "unconditional; give an even number, or --trajectories"
        )
    if args.method != "l2c":
        args.trajectories = size // rows
        return
    if args.groups is None:
        args.groups = math.gcd(size, L2CSettings.groups)
        if args.groups < L2CSettings.groups:
            args.notes.append(
                f"{L2CSettings.groups} groups do not share --global-batch-size {size}: {args.groups} do"
            )
    if size % args.groups:
        parser.error(
            f"--global-batch-size {size} is no multiple of --groups {args.groups}; groups are of one size"
        )


def _names_a_folder(args: argparse.Namespace) -> bool:
    """Whether --vae is a VAE's folder. Its downsampling factor says what --image-size means."""
    return args.vae is not None and Path(args.vae).is_dir()


# Flags without effect, and when the other flags make them so.
_L2C = ("data", "every_row", "groups", "num_works")
_HARMONICA = ("proxy", "lambda_c", "rollout")
_END_TO_END = (
    "terms",
    "search",
    "search_samples",
    "any_speed",
    "init",
    "pool",
    "moments_weight",
    "window",
    "open_share",
    "keep_activations",
)
_ROWS = ("epochs", "l1", "cost", "data_loss", "router_train", "ste_threshold")
_TRAJECTORIES = ("cfg_scale", "trajectories", "sampler")
UNREAD = (
    Unread(_L2C, lambda args: args.method != "l2c", "with --method {method}"),
    Unread(_HARMONICA, lambda args: args.method != "harmonica", "with --method {method}"),
    Unread(_END_TO_END, lambda args: args.method != "end-to-end", "with --method {method}"),
    Unread(_ROWS, lambda args: args.method == "end-to-end", "with --method {method}"),
    Unread(_TRAJECTORIES, lambda args: args.method == "l2c", "with --method {method}"),
    Unread(("lambda_c",), lambda args: args.proxy == "none", "with --proxy none: lambda stays at 1"),
    Unread(("cost",), lambda args: args.l1 == 0, "with --l1 0"),
    Unread(("search_samples",), lambda args: args.search == "grow", "with --search grow"),
    Unread(("init", "open_share"), lambda args: args.search in (None, "linear"), "with --search linear"),
    Unread(
        ("max_steps", "log_every", "ckpt_every"),
        lambda args: args.method == "end-to-end" and args.terms == 0 and args.search in (None, "linear"),
        "with --terms 0 and --search linear: the search ends the run",
    ),
    Unread(
        ("window", "lr", "moments_weight"),
        lambda args: args.terms == 0,
        "with --terms 0: there are no weights to train",
    ),
    Unread(
        ("vae",), lambda args: args.method != "l2c" and not _names_a_folder(args), "with --method {method}"
    ),
    Unread(
        ("vae",),
        lambda args: args.data and not Path(args.data).is_dir() and not _names_a_folder(args),
        "with --data {data}",
    ),
    Unread(("results_dir",), lambda args: args.resume not in (None, "auto"), "with --resume {resume}"),
    *model_settings.UNREAD,
)
