"""The methods: one row per value of `--accelerate-method`, with the flags that it reads and what builds it.

| value | schedule | flags |
|---|---|---|
| `none` | every branch computed | |
| `fewer-steps` | every branch of a shorter chain computed | `--steps N` |
| `fora` | every N-th step computed | `--interval N`, `--anchor A`, `--first-steps F` |
| `random` | a random share of the branches reused | `--cur X`, `--schedule-seed S` |
| `dynamiclayer` | a router's, however it was trained | `--path ROUTER`, `--thres X`, `--speedup X` |
| `l2c` | a Learning-to-Cache router's | `--path ROUTER`, `--thres X` |
| `dpcache` | K full steps, planned by dynamic programming | `--full-steps K`, `--plan-samples N` |
| `budcache` | K full steps, searched on the final error | the same, `--evaluations E` |
| `first-block` | decided while sampling, see `thresholds.py` | `--tolerance X`, `--per-sample` |
| `dbcache` | the same | also `--first-blocks F --last-blocks B --warm-up W --most-reused M --forecast` |
| `teacache` | the same | `--tolerance X`, `--per-sample`, `--rescale N` |
| `magcache` | steps reused by calibrated ratios | `--tolerance X`, `--most-skipped K`, `--retention X` |
| a prefix and a static one that caches | the same schedule with other weights of reuse | see below |

| prefix | reused branches are | flags |
|---|---|---|
| `taylor-` | extrapolated by Taylor polynomials | `--order 1` or `2` |
| `hermite-` | extrapolated in Hermite polynomials | `--order`, `--sigma X` |
| `chebyshev-` | fitted in Chebyshev polynomials | `--order`, `--ridge X` |
| `calibrated-` | fitted to the outputs under the schedule | `--calibrate N`, `--terms K` |
| `linear-` | fitted to the outputs of uncached trajectories | the same |
| `modes-` | extrapolated by their dynamic modes | `--calibrate N` |

`--calibrate` with one of those makes it `calibrated-`. `--target-speedup X` takes the place of `--tolerance`.

A router of `train_router.py --method end-to-end` holds its own weights of reuse; `dynamiclayer` uses them.

A new static schedule is one file with a function (num_steps, num_branches, flags...) -> Schedule, and one
row: its flags have the names of the function's parameters. A method that decides while it samples has a
function to a `dynamic.Rule` instead, and no prefix, for these need a schedule.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common import cli
from router import Schedule
from schedules.baselines import ANCHORS, fora_schedule, random_schedule
from schedules.calibrate import calibrated, dynamic_modes, linear
from schedules.dynamic import Rule
from schedules.forecasts import CHEBYSHEV_RIDGE, HERMITE_SCALE, chebyshev, hermite, taylor
from schedules.planned import bud_cache, dp_cache
from schedules.request import Request
from schedules.routed import routed_schedule
from schedules.thresholds import SAMPLES, dbcache, first_block, magcache, teacache


@dataclass(frozen=True)
class Flag:
    """One flag of a method. needed: what a flag takes that must be given, in words; "": it is optional.

    alone: its value where it is given without one; None: it takes a value; True: it takes none. instead: the
    flag that takes its place; exactly one of both is given.
    """

    name: str
    help: str
    type: Callable[[str], Any] = str
    default: Any = None
    choices: tuple | None = None
    metavar: str | None = None
    needed: str = ""
    alone: Any = None
    instead: str = ""

    @property
    def option(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    def add_to(self, parser: argparse._ActionsContainer, help: str) -> None:
        """Add it to a parser or a group of one."""
        if self.alone is True:
            parser.add_argument(self.option, action="store_true", help=help)
            return
        optional = {} if self.alone is None else {"nargs": "?", "const": self.alone}
        parser.add_argument(
            self.option, type=self.type, default=self.default, choices=self.choices, metavar=self.metavar,
            help=help, **optional,
        )  # fmt: skip


@dataclass(frozen=True)
class MethodRow:
    """A method. flags: those that it reads; `NAME:VALUE` gives the first one.

    schedule: (request, flags by name) -> Schedule, or, with `dynamic`, -> Rule; None: every branch is
    computed. respacing: (request, flags by name) -> the respacing of a shorter chain; None: the chain of the
    request. dynamic: whether a cache decides while it samples.
    """

    flags: tuple[Flag, ...] = ()
    schedule: Callable[..., Schedule | Rule] | None = None
    respacing: Callable[..., str] | None = None
    dynamic: bool = False


@dataclass(frozen=True)
class ReuseRow:
    """How reused branches get their output, under any schedule.

    apply: (request, schedule, flags by name) -> Schedule. by_sampling: whether it samples with the model.
    """

    flags: tuple[Flag, ...]
    apply: Callable[..., Schedule]
    by_sampling: bool = False


def static(build: Callable[..., Schedule]) -> Callable[..., Schedule]:
    """For a row: a schedule of (num_steps, num_branches, flags by name), which needs to know nothing else."""
    return lambda request, **flags: build(request.num_steps, request.model.num_branches, **flags)


def fewer_steps(request: Request, steps: int) -> str:
    """A respacing to `steps` steps, with the same kind of spacing as the request's."""
    if steps > request.num_steps:
        raise ValueError(f"--steps {steps} is more than --num-sampling-steps {request.num_steps}")
    ddim = "ddim" if str(request.sampling.num_sampling_steps).startswith("ddim") else ""
    return f"{ddim}{steps}"


def fitted(fit: Callable[..., Schedule]) -> Callable[..., Schedule]:
    """For a row: weights that `fit` solves along trajectories of the request, (trajectory, K, samples)."""
    return lambda request, schedule, calibrate, terms: fit(request.trajectory(schedule), terms, calibrate)


def planned_by_costs(request: Request, full_steps: int, plan_samples: int) -> Schedule:
    return dp_cache(request.trajectory(), full_steps, plan_samples)


def searched(request: Request, full_steps: int, plan_samples: int, evaluations: int) -> Schedule:
    return bud_cache(request.trajectory(), full_steps, plan_samples, evaluations, progress=True)


A_ROUTER = "a router file or a folder that holds one"
PATH = Flag("path", "router file, or a folder that holds one", needed=A_ROUTER)
THRESHOLD = Flag(
    "thres", "compute where score > thres (default: the router's own threshold, else 0.1)", cli.threshold
)
SPEEDUP = Flag(
    "speedup", "of a router for every speed-up: the one to sample at, by MACs", cli.positive, metavar="X"
)

TOLERANCE = Flag(
    "tolerance",
    "threshold: reuse while what has changed stays below X; 0 computes all",
    cli.tolerance,
    needed="a number, or --target-speedup",
    instead="target_speedup",
)
TARGET_SPEEDUP = Flag(
    "target_speedup",
    f"find the tolerance that reaches this speed-up by MACs, on {SAMPLES} samples apart",
    cli.positive,
)
PER_SAMPLE = Flag("per_sample", "decide for every sample alone, not for the batch", bool, False, alone=True)
DECIDED = (TOLERANCE, TARGET_SPEEDUP, PER_SAMPLE)

CALIBRATED, CALIBRATION_SAMPLES = "calibrated", 64
CALIBRATE = Flag(
    "calibrate",
    "solve the weights of reuse for this model, sampler and guidance, on N samples drawn at once (default "
    f"{CALIBRATION_SAMPLES})",
    cli.positive_int,
    default=CALIBRATION_SAMPLES,
    metavar="N",
    alone=CALIBRATION_SAMPLES,
)

FULL_STEPS = Flag("full_steps", "number of full steps", cli.positive_int, metavar="K", needed="a number")
PLAN_SAMPLES = Flag(
    "plan_samples", "plan on N samples, drawn at once (default 10)", cli.positive_int, default=10, metavar="N"
)
ORDER = Flag("order", "order of the forecast (default 1)", int, default=1, choices=(1, 2))
TERMS = Flag(
    "terms",
    "number of last outputs that a reused branch combines (default 3)",
    int,
    default=3,
    choices=(1, 2, 3),
)

METHODS = {
    "none": MethodRow(),
    "fewer-steps": MethodRow(
        (Flag("steps", "number of denoising steps", cli.positive_int, needed="a number"),),
        respacing=fewer_steps,
    ),
    "fora": MethodRow(
        (
            Flag("interval", "compute every N-th step; 3/2 is two of three", cli.interval, needed="a number"),
            Flag(
                "anchor",
                "count intervals from the first executed step (the default), or from the last one as the "
                "released FORA does",
                default="first",
                choices=ANCHORS,
            ),
            Flag(
                "first_steps",
                "always compute the first F steps (default 1; the released TaylorSeer: 2)",
                cli.positive_int,
                default=1,
                metavar="F",
            ),
        ),
        static(fora_schedule),
    ),
    "random": MethodRow(
        (
            Flag("cur", "share of branches reused, 0 .. 1", cli.finite, needed="a number"),
            Flag("schedule_seed", "seed of the random draw (default 0)", cli.seed, default=0),
        ),
        static(lambda *size, cur, schedule_seed: random_schedule(*size, cur, schedule_seed)),
    ),
    "dynamiclayer": MethodRow((PATH, THRESHOLD, SPEEDUP), routed_schedule),
    "l2c": MethodRow(
        (PATH, THRESHOLD), lambda request, **flags: routed_schedule(request, **flags, trained_by="l2c")
    ),
    "first-block": MethodRow(DECIDED, first_block, dynamic=True),
    "dbcache": MethodRow(
        (
            *DECIDED,
            Flag(
                "first_blocks", "first blocks always computed (default 8)", cli.positive_int, 8, metavar="F"
            ),
            Flag(
                "last_blocks", "last blocks always computed (default 0)", cli.non_negative_int, 0, metavar="B"
            ),
            Flag("warm_up", "leading steps computed (default 8)", cli.positive_int, 8, metavar="W"),
            Flag(
                "most_reused",
                "steps in a row reused at most (default: no limit)",
                cli.positive_int,
                metavar="M",
            ),
            Flag("forecast", "extrapolate reused outputs linearly (TaylorSeer)", bool, False, alone=True),
        ),
        dbcache,
        dynamic=True,
    ),
    "teacache": MethodRow(
        (
            *DECIDED,
            Flag(
                "rescale",
                f"samples to fit the rescaling on; 0: none (default {SAMPLES})",
                cli.non_negative_int,
                SAMPLES,
                metavar="N",
            ),
        ),
        teacache,
        dynamic=True,
    ),
    "magcache": MethodRow(
        (
            TOLERANCE,
            TARGET_SPEEDUP,
            Flag(
                "most_skipped", "steps in a row reused at most (default 3)", cli.positive_int, 3, metavar="K"
            ),
            Flag("retention", "share of first steps computed (default 0.2)", cli.tolerance, 0.2),
        ),
        magcache,
    ),
    "dpcache": MethodRow((FULL_STEPS, PLAN_SAMPLES), planned_by_costs),
    "budcache": MethodRow(
        (
            FULL_STEPS,
            PLAN_SAMPLES,
            Flag("evaluations", "plans to look at (default 200)", cli.positive_int, default=200, metavar="E"),
        ),
        searched,
    ),
}

REUSES = {
    "taylor": ReuseRow((ORDER,), lambda _, schedule, order: taylor(schedule, order)),
    "hermite": ReuseRow(
        (
            ORDER,
            Flag("sigma", "scale of the polynomials (default 0.5)", cli.positive, default=HERMITE_SCALE),
        ),
        lambda _, schedule, **flags: hermite(schedule, **flags),
    ),
    "chebyshev": ReuseRow(
        (
            ORDER,
            Flag(
                "ridge",
                "weight of the coefficients' squares (default 0.001)",
                cli.non_negative,
                default=CHEBYSHEV_RIDGE,
            ),
        ),
        lambda _, schedule, **flags: chebyshev(schedule, **flags),
    ),
    CALIBRATED: ReuseRow((CALIBRATE, TERMS), fitted(calibrated), by_sampling=True),
    "linear": ReuseRow((CALIBRATE, TERMS), fitted(linear), by_sampling=True),
    "modes": ReuseRow(
        (CALIBRATE,),
        lambda request, schedule, calibrate: dynamic_modes(request.trajectory(schedule), calibrate),
        by_sampling=True,
    ),
}


def names() -> list[str]:
    """All values of `--accelerate-method`."""
    cached = [name for name, method in METHODS.items() if method.schedule and not method.dynamic]
    return [*METHODS, *(f"{reuse}-{name}" for reuse in REUSES for name in cached)]


def split_name(name: str) -> tuple[str, str]:
    """`taylor-fora` as ("taylor", "fora"), `fora` as ("", "fora")."""
    reuse, _, base = name.partition("-")
    return (reuse, base) if reuse in REUSES else ("", name)


def flags_of(name: str) -> tuple[Flag, ...]:
    """The flags that a value of `--accelerate-method` reads."""
    reuse, base = split_name(name)
    return METHODS[base].flags + (REUSES[reuse].flags if reuse else ())
