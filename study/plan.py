"""What the digits study trains and measures, as data: speeds, trainings, rows, and the order of it all.

A `Row` is one measurement: a method with its settings at one number of steps, and the `Training` that its
router comes from. Each section of the study (`comparison`, `recipe`, ...) is a function that lists rows.
`plan` takes the sections in order and makes tasks of them: the rows, their trainings and the uncached rows
beside them, each once and after what it needs. Settings are the values of a command's flags by name:
{"cfg_scale": 1.5} is `--cfg-scale 1.5` of `train_router.py` or of `study.measure`.
"""

import bisect
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from examples.digits import MODEL
from schedules.baselines import fora_schedule, random_schedule
from study.subjects import DIGITS, ROOT, Subject, parts
from study.tables import (
    FORECAST,
    FORECAST_EVEN_BATCHES,
    FORECAST_NO_MOMENTS,
    FRESH_SAMPLES,
    FULL_LENGTH,
    MAIN_SPEED,
    RIVALS,
    SAMPLERS_GROUP,
    SECOND_SAMPLES,
)

EVIDENCE = DIGITS.evidence  # the committed study
RESULTS, QUICK_RESULTS = DIGITS.results(), DIGITS.results(quick=True)
ROUTERS = "routers.safetensors"  # all routers of a study, by name

# ---- how much --------------------------------------------------------------------------------------

RECIPE_STEPS = README_STEPS = 10  # both at MAIN_SPEED; the README's rows have more samples
SAMPLERS_STEPS, COMPARED_SAMPLERS = 20, ("ddim", "dpm-solver++", "sa-solver", "ddpm")
# Seeds of other samples than those on which settings were chosen; SECOND_SAMPLES were looked at once before.
SAMPLE_SEEDS = {FRESH_SAMPLES: 20261129, SECOND_SAMPLES: 20261127}
SAMPLES_FACTOR = {20: 3}  # samples flip most at T = 20: rows of SAMPLE_SEEDS have three times as many there


@dataclass(frozen=True)
class Speed:
    """One speed-up by MACs at which methods are compared, and the settings that reach it without training.

    interval: FORA's and TaylorSeer's. released_interval: the same by the rules of the released codes, with as
    many computed rows. steps: of the shorter chain; None: no number of steps is near enough. l2c_target: the
    speed that Learning-to-Cache is asked for, which trains even rows alone; None: out of its reach.
    """

    target: float
    interval: str
    released_interval: str
    steps: int | None
    l2c_target: float | None = None

    @property
    def name(self) -> str:
        return f"{self.target:g}"


SPEEDS = {
    10: [
        Speed(1.25, "1.25", "4/3", 8, 1.25),
        Speed(1.42, "4/3", "3/2", 7, 1.42),
        Speed(1.96, "2", "5/2", 5, 1.92),
        Speed(2.44, "3", "3", 4),
        Speed(3.1, "10/3", "5", None),
    ],
    20: [
        Speed(1.25, "1.25", "5/4", 16, 1.25),
        Speed(1.52, "1.5", "8/5", 13, 1.52),
        Speed(1.96, "2", "9/4", 10, 1.92),
        Speed(2.77, "3", "7/2", 7),
        Speed(3.1, "10/3", "4", None),
    ],
    50: [
        Speed(1.25, "1.25", "5/4", 40, 1.25),
        Speed(1.5, "1.5", "17/11", 33, 1.5),
        Speed(1.96, "2", "25/12", 25, 1.92),
        Speed(2.77, "3", "16/5", 18),
        Speed(3.1, "10/3", "7/2", 16),
    ],
}
MILD_SPEED = 1.25  # added for Learning-to-Cache, which reuses every other step at most; not for all methods
FORECAST_RECIPE_SPEEDS = (1.96, 2.77)  # at which FRESH_SAMPLES tell what the flags of a training are worth


@dataclass(frozen=True)
class EndToEndScale:
    """End-to-end training at one number of steps. forecast: further settings of FORECAST."""

    train_steps: int
    batch_size: int
    forecast: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Scale:
    """How much is trained and measured.

    seeds: training seeds, by T. updates: of each router row, by T; longer: where those miss a speed, by
    (name, T) or (name, T, speed). repeats: of the latency.
    """

    samples: int
    samples_in_readme: int
    seeds: Mapping[int, int]
    speeds: Mapping[int, list[Speed]]
    updates: Mapping[int, int]
    lr: float
    repeats: int
    ablations: bool
    end_to_end: Mapping[int, EndToEndScale]
    longer: Mapping[tuple, int] = field(default_factory=dict)

    def samples_of(self, row: "Row") -> int:
        """How many samples a row is measured on."""
        chain = (row.num_steps, row.sampler, row.cfg_scale)
        compared = row.group in (None, RIVALS)
        at_main_speed = row.method == "uncached" or (row.speed == MAIN_SPEED and compared)
        if at_main_speed and chain == (README_STEPS, "ddim", 1):
            return self.samples_in_readme
        return self.samples * (SAMPLES_FACTOR.get(row.num_steps, 1) if row.group in SAMPLE_SEEDS else 1)

    def updates_of(self, name: str, num_steps: int, speed: float) -> int:
        for key in ((name, num_steps, speed), (name, num_steps)):
            if key in self.longer:
                return self.longer[key]
        return self.updates[num_steps]


FULL = Scale(
    samples=2000,
    samples_in_readme=5000,
    seeds={10: 3, 20: 3, 50: 1},
    speeds=SPEEDS,
    updates={10: 100, 20: 50, 50: 40},
    lr=0.1,
    repeats=9,
    ablations=True,
    end_to_end={
        10: EndToEndScale(57, 24),
        20: EndToEndScale(77, 24, {"pool": 1024, "moments_weight": 1}),
        50: EndToEndScale(47, 8),
    },
    longer={
        ("l2c", 20): 100, ("l2c", 50): 80, ("harmonica-paper", 50): 80,
        ("harmonica-paper", 20, 2.77): 100, ("harmonica-paper", 20, 3.1): 100,
    },
)  # fmt: skip
QUICK = Scale(
    samples=200,
    samples_in_readme=200,
    seeds={10: 1, 20: 1, 50: 1},
    speeds={num_steps: speeds[2:3] for num_steps, speeds in SPEEDS.items()},
    updates={10: 30, 20: 20, 50: 12},
    lr=0.2,
    repeats=1,
    ablations=False,
    end_to_end={10: EndToEndScale(37, 8), 20: EndToEndScale(27, 4), 50: EndToEndScale(22, 4)},
)

# ---- trainings -------------------------------------------------------------------------------------

# What each training by steps adds to the settings that all of them share; its name is that of the method.
STEP_BY_STEP = {
    "harmonica": {},
    "harmonica-paper": {"proxy": "paper"},
    "harmonica-no-proxy": {"proxy": "none"},
    "harmonica-ste": {"router_train": "ste"},
    "harmonica-eps": {"data_loss": "eps"},
    "harmonica-macs": {"cost": "macs"},
    "harmonica-one-step": {"rollout": "one-step"},
    "harmonica-lr0.3": {"lr": 0.3, "max_steps": 1000},
    "harmonica-lr0.03": {"lr": 0.03, "max_steps": 3300},
    "harmonica-20k": {"lr": 0.01, "max_steps": 20000},  # the published length and learning rate
}
# The same of trainings end to end; FORECAST itself has those of the scale.
END_TO_END = {
    "end-to-end": {"terms": 0, "max_steps": 22},
    FORECAST_NO_MOMENTS: {"pool": 1024},
    FORECAST_EVEN_BATCHES: {},
    f"{FORECAST}-one-term": {"terms": 1},
    f"{FORECAST}-two-terms": {"terms": 2},
    f"{FORECAST}-fitted-only": {"max_steps": 17},
    f"{FORECAST}-window-5": {"window": 5},
    f"{FORECAST}-window-2": {"window": 2},
    f"{FORECAST}-open-share-0.25": {"open_share": 0.25},
    f"{FORECAST}-pool-1024": {"pool": 1024},
    f"{FORECAST}-moments": {"moments_weight": 1},
    f"{FORECAST}-from-50-steps": {},  # from the schedule of another training
}


@dataclass(frozen=True)
class Training:
    """A router to be trained. settings: flags of train_router.py; init: the router from which it starts."""

    id: str
    settings: Mapping[str, object] = field(hash=False)
    init: "Training | None" = None


def step_by_step(
    scale: Scale,
    name: str,
    num_steps: int,
    seed: int,
    speed: float | None = None,
    cur: float | None = None,
    cfg_scale: float = 1.0,
    sampler: str = "ddim",
) -> Training:
    """A training of HarmoniCa or Learning-to-Cache, asked for a speed or for a CUR."""
    kind, value = ("cur", cur) if speed is None else ("speedup", speed)
    is_l2c = name.startswith("l2c")
    trained_rows = num_steps // 2 if name == "l2c" else num_steps
    settings = {
        "model": MODEL,
        "num_sampling_steps": num_steps,
        f"target_{kind}": value,
        "global_seed": seed,
        "lr": scale.lr,
        "max_steps": scale.updates_of(name, num_steps, value) * trained_rows,
        # 8 trajectories with guidance and without: under guidance the batch would count twice as many rows
        "global_batch_size" if cfg_scale == 1 else "trajectories": 8,
    }
    if is_l2c:
        settings |= {"method": "l2c", "data": "digits", "l1": l2c_first_weight(name, num_steps, value)}
        settings |= {"groups": 1, "every_row": name == "l2c-every-row"}
    else:  # refreshing lambda costs T trajectories: every T / 2 of them, or every ten where T is small
        settings |= {"cfg_scale": cfg_scale, "l1": 1e-6, "lambda_c": num_steps * max(10, num_steps // 2)}
    settings |= {"log_every": 5 * num_steps, "ckpt_every": 500} | STEP_BY_STEP.get(name, {})
    settings |= {"sampler": sampler} if sampler != "ddim" else {}
    chain = chain_suffix(cfg_scale, sampler)
    return Training(f"{name}-T{num_steps}-{kind}{value:g}-s{seed}{chain}", settings)


def chain_suffix(cfg_scale: float, sampler: str) -> str:
    """Guidance and sampler as the end of an id; nothing for DDIM without guidance."""
    guidance = "" if cfg_scale == 1 else f"-cfg{cfg_scale:g}"
    return guidance + ("" if sampler == "ddim" else f"-{sampler}")


def l2c_first_weight(name: str, num_steps: int, speed: float) -> float:
    """The weight of the regularization that Learning-to-Cache begins with.

    A speed near all that even rows can save needs a strong pull from the start. Elsewhere the more steps, the
    smaller is the error of one, and a pull that is too strong at first is not made good later: logits that
    have reached their limit hardly come back.
    """
    if name == "l2c" and speed > 1.9:
        return 0.1
    return 1e-4 if num_steps < 50 else 5e-6


def end_to_end(
    scale: Scale,
    num_steps: int,
    speed: Speed,
    seed: int = 0,
    name: str = FORECAST,
    sampler: str = "ddim",
) -> Training:
    """A training on the error of the final image."""
    size = scale.end_to_end[num_steps]
    init = end_to_end(scale, 50, SPEEDS[50][2]) if name.endswith("from-50-steps") else None
    settings = {
        "method": "end-to-end",
        "search": "grow",
        "model": MODEL,
        "num_sampling_steps": num_steps,
        "cfg_scale": 1,
        "target_speedup": speed.target,
        "global_seed": seed,
        "max_steps": size.train_steps,
        "global_batch_size": size.batch_size,
        "keep_activations": True,
    }
    settings |= size.forecast if name == FORECAST else END_TO_END[name]
    settings |= {"sampler": sampler} if sampler != "ddim" else {}
    return Training(
        f"{name}-T{num_steps}-speedup{speed.name}-s{seed}{chain_suffix(1, sampler)}", settings, init
    )


# ---- rows ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A measurement. settings: the method, as flags of study.measure; the rest goes into the row as it is.

    speed: what was asked for. group: the section that a row belongs to, None for the comparison. variant:
    what is different within a group. example: a key of `SUBJECTS`.
    """

    method: str
    num_steps: int
    settings: Mapping[str, object] = field(default_factory=dict, hash=False)
    training: Training | None = None
    speed: str | None = None
    train_seed: int | None = None
    group: str | None = None
    variant: str | float | None = None
    cfg_scale: float = 1.0
    sampler: str = "ddim"
    example: str = DIGITS.name

    @property
    def id(self) -> str:
        parts = (self.method, f"T{self.num_steps}", self.speed, self.train_seed, self.group, self.variant)
        name = "-".join(str(part) for part in parts if part is not None)
        return name + chain_suffix(self.cfg_scale, self.sampler)

    @property
    def uncached(self) -> "Row | None":
        """The row that this one is compared with."""
        if self.method == "uncached":
            return None
        chain = {name: getattr(self, name) for name in ("cfg_scale", "sampler", "example")}
        return Row("uncached", self.num_steps, **chain)

    @property
    def facts(self) -> dict:
        """What a record of this row says beside its figures."""
        router = f"{ROUTERS}:{self.training.id}" if self.training else None
        asked = {name: getattr(self, name) for name in ("speed", "train_seed", "group", "variant")}
        asked["example"] = None if self.example == DIGITS.name else self.example
        return {"method": self.method, "router": router} | {k: v for k, v in asked.items() if v is not None}

    def samples(self, scale: Scale) -> int:
        return scale.samples_of(self)

    def measured_with(self, scale: Scale, routers: Path) -> dict[str, object]:
        """All flags of study.measure; routers: the file that its router is in."""
        settings = {} if self.example == DIGITS.name else {"example": self.example}
        settings |= {
            "num_sampling_steps": self.num_steps,
            "cfg_scale": self.cfg_scale,
            "samples": self.samples(scale),
            "p_sample": self.sampler == "ddpm",
        }
        settings |= {"sampler": self.sampler} if self.sampler not in ("ddim", "ddpm") else {}
        settings |= self.settings
        settings |= {"seed": SAMPLE_SEEDS[self.group]} if self.group in SAMPLE_SEEDS else {}
        return settings | ({"path": f"{routers}:{self.training.id}"} if self.training else {})


def untrained(num_steps: int, speed: Speed, **facts) -> Iterator[Row]:
    """FORA and TaylorSeer of orders 1 and 2, by one rule for all and by those of the released codes.

    Either rule computes as many rows. The released codes know whole intervals alone; where none gives that
    many rows, theirs is a fraction here.
    """
    facts |= {"speed": speed.name}
    ours, released = {"interval": speed.interval}, {"interval": speed.released_interval}
    for suffix, fora, taylor in (
        ("", ours, ours),
        ("-released", released | {"anchor": "last"}, released | {"first_steps": 2}),
    ):
        yield Row(f"fora{suffix}", num_steps, {"accelerate_method": "fora"} | fora, **facts)
        for order, name in ((1, "taylor-fora"), (2, "taylor2-fora")):
            settings = {"accelerate_method": "taylor-fora"} | taylor | {"order": order}
            yield Row(f"{name}{suffix}", num_steps, settings, **facts)


def fewer_steps(num_steps: int, speed: Speed, **facts) -> Iterator[Row]:
    """The uncached model on a shorter chain; nothing where no length is near the speed."""
    if speed.steps:
        settings = {"accelerate_method": "fewer-steps", "steps": speed.steps}
        yield Row("fewer-steps", num_steps, settings, speed=speed.name, **facts)


def random(num_steps: int, speed: Speed, seed: int, subject: Subject = DIGITS, **facts) -> Row:
    cur = random_cur(num_steps, speed.target, seed, subject)
    settings = {"accelerate_method": "random", "cur": f"{cur:.4f}", "schedule_seed": seed}
    facts |= {"speed": speed.name, "train_seed": seed, "example": subject.name}
    return Row("random", num_steps, settings, **facts)


def routed(
    training: Training, method: str, num_steps: int, speed: Speed | None, seed: int, reuse: str = "", **facts
) -> Row:
    """A row of a trained router. reuse: "taylor-" or "calibrated-", where its reuse is not as it was trained.

    facts: group, variant, cfg_scale, sampler, and settings= for further flags.
    """
    settings = {"accelerate_method": "l2c" if method.startswith("l2c") else f"{reuse}dynamiclayer"}
    settings |= facts.pop("settings", {})
    name = speed.name if speed else None
    return Row(method, num_steps, settings, training, speed=name, train_seed=seed, **facts)


# ---- sections --------------------------------------------------------------------------------------


def comparison(scale: Scale, num_steps: int, seeds: range | None = None) -> Iterator[Row]:
    """All published methods at all speeds."""
    for seed in seeds or range(scale.seeds[num_steps]):
        for speed in scale.speeds[num_steps]:
            if seed == 0:
                yield from fewer_steps(num_steps, speed)
                yield from untrained(num_steps, speed)
            if speed.target != MILD_SPEED:
                yield random(num_steps, speed, seed)
            yield from trained(scale, num_steps, speed, seed)


def trained(scale: Scale, num_steps: int, speed: Speed, seed: int) -> Iterator[Row]:
    """All methods that are trained step by step, at one speed from one seed."""
    setting = num_steps, speed, seed
    if speed.l2c_target:
        yield routed(step_by_step(scale, "l2c", num_steps, seed, speed.l2c_target), "l2c", *setting)
    router = step_by_step(scale, "harmonica", num_steps, seed, speed.target)
    yield routed(router, "harmonica", *setting)
    if speed.target == MILD_SPEED:
        return
    yield routed(router, "taylor-harmonica", *setting, "taylor-")
    for name in ("harmonica-paper", "l2c-every-row"):
        yield routed(step_by_step(scale, name, num_steps, seed, speed.target), name, *setting)


def end_to_end_comparison(scale: Scale, num_steps: int) -> Iterator[Row]:
    """End-to-end training at all speeds, with and without weights, and weights for others' schedules."""
    for seed in range(scale.seeds[num_steps]):
        for speed in scale.speeds[num_steps]:
            yield routed(end_to_end(scale, num_steps, speed, seed), FORECAST, num_steps, speed, seed)
    for speed in scale.speeds[num_steps]:
        fora = {"accelerate_method": "calibrated-fora", "interval": speed.interval}
        yield Row("calibrated-fora", num_steps, fora, speed=speed.name)
        if speed.target != MILD_SPEED:
            router = step_by_step(scale, "harmonica", num_steps, 0, speed.target)
            yield routed(router, "calibrated-harmonica", num_steps, speed, 0, "calibrated-")
        alone = end_to_end(scale, num_steps, speed, name="end-to-end")
        yield routed(alone, "end-to-end", num_steps, speed, 0)


# Rules of FORA and TaylorSeer that have the least error or distance of all other methods somewhere at a T.
CLOSEST_RULES = {
    10: ("fora", "taylor-fora", "taylor2-fora", "taylor2-fora-released"),
    20: ("taylor-fora", "taylor2-fora", "taylor2-fora-released"),
    50: ("taylor-fora", "taylor2-fora", "taylor-fora-released", "taylor2-fora-released"),
}


def other_samples(scale: Scale, num_steps: int, group: str) -> Iterator[Row]:
    """FORECAST and its closest competitors on samples of a seed of their own; group: one of SAMPLE_SEEDS.

    The competitors are those with the least error or distance somewhere in the comparison at this number of
    steps, of training seed 0; on FRESH_SAMPLES HarmoniCa too, of all training seeds.
    """
    for speed in scale.speeds[num_steps]:
        rules = untrained(num_steps, speed, group=group)
        yield from (row for row in rules if row.method in CLOSEST_RULES[num_steps])
        seeds = range(scale.seeds[num_steps])
        routers = [(FORECAST, seed, end_to_end(scale, num_steps, speed, seed)) for seed in seeds]
        others = []  # name, seed, speed asked for
        if group == FRESH_SAMPLES:
            others += [("harmonica", seed, speed.target) for seed in seeds]
            others += [("l2c", 0, speed.l2c_target)] if speed.target == MILD_SPEED else []
        if num_steps == 10 and speed.target != MILD_SPEED:
            others += [("harmonica-paper", 0, speed.target)]
        routers += [
            (name, seed, step_by_step(scale, name, num_steps, seed, target)) for name, seed, target in others
        ]
        for name, seed, router in routers:
            yield routed(router, name, num_steps, speed, seed, group=group)


def forecast_recipe_at_20_steps(scale: Scale) -> Iterator[Row]:
    """What the further settings of FORECAST at T = 20 are worth, at two speeds with one training seed."""
    for speed in scale.speeds[20]:
        if speed.target in FORECAST_RECIPE_SPEEDS:
            for name, groups in (
                (FORECAST_NO_MOMENTS, (FRESH_SAMPLES,)),
                (FORECAST_EVEN_BATCHES, tuple(SAMPLE_SEEDS)),
            ):
                router = end_to_end(scale, 20, speed, name=name)
                for group in groups:
                    yield routed(router, name, 20, speed, 0, group=group)


def forecast_recipe(scale: Scale) -> Iterator[Row]:
    """Ablations of end-to-end training at T = 10 and the main speed, and its router on other chains."""
    num_steps, speed = RECIPE_STEPS, recipe_speed()
    for name in END_TO_END:
        variant = name.removeprefix(f"{FORECAST}-")
        if name.startswith(FORECAST) and name not in (FORECAST_NO_MOMENTS, FORECAST_EVEN_BATCHES):
            router = end_to_end(scale, num_steps, speed, name=name)
            yield routed(router, name, num_steps, speed, 0, group="end-to-end", variant=variant)
    router = end_to_end(scale, num_steps, speed)
    for chain in ({"cfg_scale": 1.5}, {"sampler": "ddpm"}):
        for reuse, variant in (("", "as-trained"), ("calibrated-", "calibrated")):
            facts = {"group": "transfer", "variant": variant} | chain
            yield routed(router, FORECAST, num_steps, speed, 0, reuse, **facts)


def recipe(scale: Scale, seeds: range) -> Iterator[Row]:
    """Ablations of HarmoniCa's training at T = 10 and the main speed; the group says what is changed."""
    for group, name in (
        ("proxy", "harmonica-no-proxy"),
        ("router-train", "harmonica-ste"),
        ("data-loss", "harmonica-eps"),
        ("cost", "harmonica-macs"),
        ("rollout", "harmonica-one-step"),
    ):
        for seed in seeds:
            yield from harmonica(scale, name, seed, group)


def harmonica(scale: Scale, name: str, seed: int, group: str) -> Iterator[Row]:
    """One ablation of HarmoniCa's training."""
    router = step_by_step(scale, name, RECIPE_STEPS, seed, recipe_speed().target)
    yield routed(router, name, RECIPE_STEPS, recipe_speed(), seed, group=group)


def settings(scale: Scale) -> Iterator[Row]:
    """Threshold, learning rate, guidance and sampler, of training seed 0."""
    num_steps, speed = RECIPE_STEPS, recipe_speed()
    router = step_by_step(scale, "harmonica", num_steps, 0, speed.target)
    for threshold in (0.02, 0.05, 0.2, 0.3, 0.5, 0.7, 0.9):
        facts = {"group": "threshold", "variant": threshold, "settings": {"thres": threshold}}
        yield routed(router, "harmonica", num_steps, None, 0, **facts)
    for name in ("harmonica-lr0.3", "harmonica-lr0.03"):
        yield from harmonica(scale, name, 0, "lr")

    yield from fewer_steps(num_steps, speed, cfg_scale=1.5)
    yield from untrained(num_steps, speed, cfg_scale=1.5)
    guided = step_by_step(scale, "harmonica", num_steps, 0, speed.target, cfg_scale=1.5)
    yield routed(guided, "harmonica", num_steps, speed, 0, cfg_scale=1.5)
    l2c = step_by_step(scale, "l2c-every-row", num_steps, 0, speed.target)
    yield routed(l2c, "l2c-every-row", num_steps, speed, 0, cfg_scale=1.5)
    for training, variant, chain in (
        (guided, "trained-at-1.5", {}),
        (router, "trained-at-1", {"cfg_scale": 1.5}),
        (router, "trained-with-ddim", {"sampler": "ddpm"}),
    ):
        facts = {"group": "transfer", "variant": variant} | chain
        yield routed(training, "harmonica", num_steps, speed, 0, **facts)
    yield next(untrained(num_steps, speed, group="transfer", sampler="ddpm"))  # FORA


def samplers(scale: Scale) -> Iterator[Row]:
    """Routers trained under one sampler and used under another, at T = 20 and the main speed.

    Each router is used as it was trained and with its weights of reuse solved for the sampler of use. FORA's
    schedule, which knows no sampler, stands beside them.
    """
    num_steps, speed = SAMPLERS_STEPS, speed_of(SAMPLERS_STEPS, MAIN_SPEED)
    for trained_with in COMPARED_SAMPLERS:
        router = step_by_step(scale, "harmonica", num_steps, 0, speed.target, sampler=trained_with)
        for used in COMPARED_SAMPLERS:
            facts = {"group": SAMPLERS_GROUP, "variant": f"trained-with-{trained_with}", "sampler": used}
            for reuse in ("", "calibrated-"):
                yield routed(router, f"{reuse}harmonica", num_steps, speed, 0, reuse, **facts)
    fora = {"interval": speed.interval}
    for used in COMPARED_SAMPLERS:
        facts = {"speed": speed.name, "group": SAMPLERS_GROUP, "sampler": used}
        for method in ("fora", "calibrated-fora"):
            yield Row(method, num_steps, {"accelerate_method": method} | fora, **facts)


# Of the digits' 12 blocks and 20 steps; the library's own settings are for models of more blocks and steps.
DBCACHE = {"first_blocks": 1, "warm_up": 2, "forecast": True}


def rivals(scale: Scale, num_steps: int) -> Iterator[Row]:
    """Untrained methods that came after HarmoniCa, at as many full steps as FORA has at each speed.

    Forecasts stand on FORA's schedule, with their authors' settings where these are known. Those that decide
    by a tolerance find it for the speed, on samples of their own; they reach it on average.
    """
    for speed in scale.speeds[num_steps]:
        fora = {"interval": speed.interval}
        asked = {"target_speedup": speed.target}
        rows = fora_schedule(num_steps, 1, speed.interval).compute.sum().item()
        for name, method, settings in (
            ("hermite-fora", "hermite-fora", fora | {"order": 1}),
            ("hermite2-fora", "hermite-fora", fora | {"order": 2}),
            ("chebyshev-fora", "chebyshev-fora", fora | {"order": 1}),
            ("chebyshev2-fora", "chebyshev-fora", fora | {"order": 2}),
            ("modes-fora", "modes-fora", fora),
            ("linear-fora", "linear-fora", fora),
            ("dpcache", "taylor-dpcache", {"full_steps": rows}),
            ("budcache", "budcache", {"full_steps": rows}),
            *([("magcache", "magcache", asked)] if speed.target < 2 else []),  # its settings reach no more
            *(
                (f"{method}{suffix}", method, asked | each)
                for method, asked in (
                    ("first-block", asked),
                    ("dbcache", asked | DBCACHE),
                    ("teacache", asked),
                )
                for suffix, each in (("", {}), ("-per-sample", {"per_sample": True}))
            ),
        ):
            settings = {"accelerate_method": method} | settings
            yield Row(name, num_steps, settings, speed=speed.name, group=RIVALS)


def objective(scale: Scale) -> Iterator[Row]:
    """What training step by step minimises, of routers that it trained and of schedules that it did not."""
    num_steps, speed = RECIPE_STEPS, recipe_speed()
    errors = {"step_errors": 500}
    fora = {"accelerate_method": "fora", "interval": speed.interval} | errors
    yield Row("fora", num_steps, fora, speed=speed.name, group="objective")
    for name in ("harmonica", "harmonica-no-proxy", "harmonica-paper", "harmonica-20k", "l2c-every-row"):
        router = step_by_step(scale, name, num_steps, 0, speed.target)
        yield routed(router, name, num_steps, speed, 0, group="objective", settings=errors)


def targets(scale: Scale) -> Iterator[Row]:
    """Whether `--target-cur` reaches what it is asked for."""
    for cur in (0.25, 0.4, 0.55):
        for seed in range(3):
            router = step_by_step(scale, "harmonica", 10, seed, cur=cur)
            yield routed(router, "harmonica", 10, None, seed, group="target-cur", variant=cur)


def rows(scale: Scale) -> Iterator[Row]:
    """All rows in order: what is cheap and what is most asked for comes first."""
    yield from comparison(scale, 10)
    if scale.ablations:
        yield from targets(scale)
    yield from comparison(scale, 20, range(1))
    if scale.ablations:
        yield from recipe(scale, range(1))
        yield from settings(scale)
        yield from harmonica(scale, "harmonica-20k", 0, FULL_LENGTH)
        yield from objective(scale)
    yield from comparison(scale, 50)
    yield from comparison(scale, 20)
    if scale.ablations:
        yield from recipe(scale, range(scale.seeds[RECIPE_STEPS]))
    for num_steps in (10, 20, 50):
        yield from end_to_end_comparison(scale, num_steps)
    if scale.ablations:
        yield from forecast_recipe(scale)
        for num_steps, group in (
            (20, FRESH_SAMPLES),
            (20, SECOND_SAMPLES),
            (10, FRESH_SAMPLES),
            (50, FRESH_SAMPLES),
        ):
            yield from other_samples(scale, num_steps, group)
        yield from forecast_recipe_at_20_steps(scale)
        yield from samplers(scale)
        for num_steps in (20, 10, 50):
            yield from rivals(scale, num_steps)


# ---- tasks -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A training (its id is the router's name) or a row, with the ids of what it needs."""

    id: str
    settings: Mapping[str, object] = field(hash=False)
    needs: tuple[str, ...] = ()
    row: Row | None = None

    @property
    def is_training(self) -> bool:
        return self.row is None

    @property
    def arguments(self) -> list[str]:
        """Of the command that does this task alone."""
        return words(self.settings)

    @property
    def command(self) -> str:
        program = "python train_router.py" if self.is_training else "python -m study.measure"
        return f"{program} {shlex.join(self.arguments)}"


def words(settings: Mapping[str, object]) -> list[str]:
    """Settings as a command line: {"cfg_scale": 1.5, "p_sample": True} is --cfg-scale 1.5 --p-sample."""
    found = []
    for name, value in settings.items():
        if value is not False:
            found += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return found


def plan(folder: Path, scale: Scale) -> list[Task]:
    """All tasks of a study in a folder, each once and after what it needs."""
    return tasks(rows(scale), folder, scale)


def tasks(rows: Iterator[Row], folder: Path, scale: Scale) -> list[Task]:
    """Rows with what they need: the trainings of their routers and the uncached rows beside them."""
    routers, found = Path(os.path.relpath(folder / ROUTERS, ROOT)), {}

    def train(training: Training) -> None:
        init = training.init
        settings = training.settings | ({"init": f"{routers}:{init.id}"} if init else {})
        found.setdefault(training.id, Task(training.id, settings, (init.id,) if init else ()))

    def measure(row: Row) -> None:
        needs = [one.id for one in (row.training, row.uncached) if one]
        found.setdefault(row.id, Task(row.id, row.measured_with(scale, routers), tuple(needs), row))

    for row in rows:
        if row.training:
            train(row.training)
        if row.uncached:
            measure(row.uncached)
        measure(row)
    return list(found.values())


def speed_of(num_steps: int, name: str) -> Speed:
    return next(speed for speed in SPEEDS[num_steps] if speed.name == name)


def recipe_speed() -> Speed:
    """The speed of the ablations."""
    return speed_of(RECIPE_STEPS, MAIN_SPEED)


RANDOM_CURS = np.arange(0.005, 0.9, 0.0025)  # among which `random_cur` looks


@cache
def random_cur(num_steps: int, speedup: float, seed: int, subject: Subject = DIGITS) -> float:
    """The CUR at which a random schedule of this seed comes closest to a speed-up by MACs."""
    model = parts(subject)[0]

    def speedup_at(cur: float) -> float:
        return random_schedule(num_steps, model.num_branches, cur, seed).speedup_macs(model)

    curs = RANDOM_CURS[(num_steps - 1) / num_steps > RANDOM_CURS]
    above = min(bisect.bisect_left(curs, speedup, key=speedup_at), len(curs) - 1)
    nearest = min(curs[max(0, above - 1) : above + 1], key=lambda cur: abs(speedup_at(cur) - speedup))
    return float(curs[bisect.bisect_left(curs, speedup_at(nearest), key=speedup_at)])  # the least of equals
