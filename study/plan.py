"""What the digits study trains and measures: speeds, seeds, methods, ablations, as tasks in order."""

import bisect
import dataclasses
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from backbones.loading import load_model
from examples.digits import MODEL
from models import DiT
from schedules.baselines import random_schedule
from study.tables import BEYOND as FORECAST
from study.tables import FRESH, MAIN_SPEED, NO_MOMENTS, SECOND, UNIFORM

ROOT = Path(__file__).parents[1]
RESULTS, QUICK_RESULTS = (ROOT / "results" / name for name in ("digits", "digits-quick"))
RANDOM_CURS = np.arange(0.005, 0.9, 0.0025)  # among which `random` finds a speed
ABLATION_STEPS = README_STEPS = 10  # both at MAIN_SPEED; the README's rows have more samples
# FORA's and TaylorSeer's rules that have the least error or distance of all others somewhere at a T.
NEAR = {
    10: ("fora", "taylor-fora", "taylor2-fora", "taylor2-fora-released"),
    20: ("taylor-fora", "taylor2-fora", "taylor2-fora-released"),
    50: ("taylor-fora", "taylor2-fora", "taylor-fora-released", "taylor2-fora-released"),
}
# Of samples that nobody looked at before every setting was chosen, and of some that were looked at before.
SEEDS = {FRESH: 20261129, SECOND: 20261127}
ABLATED = (1.96, 2.77)  # speeds at which FRESH tells what the flags of a training are worth
# A third speed for Learning-to-Cache, which can reuse every other step at most; not measured of all methods.
MILD = 1.25


@dataclass(frozen=True)
class Speed:
    """One speed-up by MACs at which methods are compared, and what reaches it without training."""

    target: float
    interval: str  # FORA's
    released_interval: str  # of the released rules of FORA and TaylorSeer, for as many computed rows
    steps: int | None  # of the shorter chain; None: none is near enough
    l2c_target: float | None = None  # for even rows alone; None: out of its reach


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


class Beyond(NamedTuple):
    """End-to-end training at one number of steps."""

    train_steps: int
    batch: int
    flags: dict = {}  # of those with weights of reuse


@dataclass(frozen=True)
class Scale:
    """How much is trained and measured. updates: of each router row; longer: where those miss a speed."""

    samples: int
    samples_in_readme: int
    seeds: dict[int, int]
    speeds: dict[int, list[Speed]]
    updates: dict[int, int]
    lr: float
    repeats: int  # of the latency
    ablations: bool
    beyond: dict[int, Beyond]
    longer: dict[tuple, int] = field(default_factory=dict)  # (name, T) or (name, T, speed)


FULL = Scale(
    2000, 5000, {10: 3, 20: 3, 50: 1}, SPEEDS, {10: 100, 20: 50, 50: 40}, 0.1, 9, True,
    {10: Beyond(57, 24), 20: Beyond(77, 24, {"--pool": 1024, "--moments-weight": 1}), 50: Beyond(47, 8)},
    {
        ("l2c", 20): 100, ("l2c", 50): 80, ("harmonica-paper", 50): 80,
        ("harmonica-paper", 20, 2.77): 100, ("harmonica-paper", 20, 3.1): 100,
    },
)  # fmt: skip
QUICK = Scale(
    200, 200, {10: 1, 20: 1, 50: 1}, {steps: speeds[2:3] for steps, speeds in SPEEDS.items()},
    {10: 30, 20: 20, 50: 12}, 0.2, 1, False, {10: Beyond(37, 8), 20: Beyond(27, 4), 50: Beyond(22, 4)},
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A training (its id names the router) or a row. arguments: of train_router.py or digits.measure."""

    id: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()
    facts: dict = field(default_factory=dict, hash=False, compare=False)
    is_training: bool = False

    @property
    def file_name(self) -> str:
        """In routers/ or rows/."""
        return f"{self.id}.safetensors" if self.is_training else f"{self.id}.json"


class Plan:
    """Collects tasks in the order in which they are to be done; a training is asked for by its first row."""

    def __init__(self, folder: Path, scale: Scale):
        self.routers, self.scale = Path(os.path.relpath(folder / "routers", ROOT)), scale
        self.tasks: dict[str, Task] = {}

    def train(
        self, name: str, num_steps: int, target: tuple[str, float], seed: int, *flags, **changes
    ) -> str:
        """A training of `name` (harmonica, l2c, ...); returns its id. changes: updates=, lr=, cfg_scale=."""
        kind, value = target
        cfg_scale, lr = changes.get("cfg_scale", 1.0), changes.get("lr", self.scale.lr)
        updates = self.scale.longer.get((name, num_steps), self.scale.updates[num_steps])
        updates = self.scale.longer.get((name, num_steps, value), updates)
        updates = changes.get("updates", updates)
        id = f"{name}-T{num_steps}-{kind}{value:g}-s{seed}" + (f"-cfg{cfg_scale:g}" if cfg_scale != 1 else "")
        rows = num_steps // 2 if name == "l2c" else num_steps
        arguments = ["--model", MODEL, "--num-sampling-steps", num_steps, f"--target-{kind}", value]
        arguments += ["--global-seed", seed, "--lr", lr, "--max-steps", updates * rows]
        # A batch of 8 is 8 trajectories with guidance and without.
        arguments += ["--global-batch-size" if cfg_scale == 1 else "--trajectories", 8]
        if name.startswith("l2c"):
            limit = name == "l2c" and value > 1.9  # all that even rows can save: begin with a strong pull
            # More steps, smaller errors of one. A start that is too strong is not made good: logits at their
            # limit hardly come back.
            start = 0.1 if limit else 1e-4 if num_steps < 50 else 5e-6
            arguments += ["--method", "l2c", "--data", "digits", "--l1", start, "--groups", 1]
            arguments += ["--every-row"] if name == "l2c-every-row" else []
        else:  # a refresh of lambda costs T trajectories: one every T / 2, or ten where T is small
            arguments += ["--cfg-scale", cfg_scale, "--l1", 1e-6]
            arguments += ["--lambda-c", num_steps * max(10, num_steps // 2)]
        arguments += ["--log-every", 5 * num_steps, "--ckpt-every", 500, *flags]
        self.tasks.setdefault(id, Task(id, tuple(map(str, arguments)), is_training=True))
        return id

    def row(self, method: str, num_steps: int, flags: list, router: str | None = None, **facts) -> None:
        """A row; facts (speed, train_seed, group, variant, cfg_scale, sampler) go into it as they are.

        A row of a group in SEEDS is drawn from its seed; at T = 20, where samples flip, three times as many.
        """
        cfg_scale, sampler = facts.pop("cfg_scale", 1.0), facts.pop("sampler", "ddim")
        id = "-".join(str(part) for part in (method, f"T{num_steps}", *facts.values()) if part is not None)
        id += (f"-cfg{cfg_scale:g}" if cfg_scale != 1 else "") + ("-ddpm" if sampler == "ddpm" else "")
        shown = method == "uncached" or (facts.get("speed") == MAIN_SPEED and "group" not in facts)
        shown = shown and num_steps == README_STEPS and sampler == "ddim"
        samples = self.scale.samples_in_readme if shown and cfg_scale == 1 else self.scale.samples
        own_seed = SEEDS.get(facts.get("group"))
        samples = 3 * samples if own_seed and num_steps == 20 else samples
        arguments = ["--num-sampling-steps", num_steps, "--cfg-scale", cfg_scale, "--samples", samples]
        arguments += (["--p-sample"] if sampler == "ddpm" else []) + flags
        arguments += ["--seed", own_seed] if own_seed else []
        needs = []
        if router:
            arguments += ["--path", self.routers / f"{router}.safetensors"]
            needs.append(router)
        if method != "uncached":
            plain = f"uncached-T{num_steps}" + (f"-cfg{cfg_scale:g}" if cfg_scale != 1 else "")
            plain += "-ddpm" if sampler == "ddpm" else ""
            if plain not in self.tasks:
                self.row("uncached", num_steps, [], cfg_scale=cfg_scale, sampler=sampler)
            needs.append(plain)
        facts = {"method": method, "router": f"routers/{router}.safetensors" if router else None} | facts
        self.tasks.setdefault(id, Task(id, tuple(map(str, arguments)), tuple(needs), facts))

    def static(self, num_steps: int, speed: Speed, cfg_scale: float = 1.0) -> None:
        """What nobody trains, at one speed."""
        name = {"speed": f"{speed.target:g}", "cfg_scale": cfg_scale}
        if speed.steps:
            fewer = ["--accelerate-method", "fewer-steps", "--steps", speed.steps]
            self.row("fewer-steps", num_steps, fewer, **name)
        for method, flags in interval_methods(speed):
            self.row(method, num_steps, flags, **name)

    def random(self, num_steps: int, speed: Speed, seed: int) -> None:
        cur = random_cur(num_steps, speed.target, seed)
        flags = ["--accelerate-method", "random", "--cur", f"{cur:.4f}", "--schedule-seed", seed]
        self.row("random", num_steps, flags, speed=f"{speed.target:g}", train_seed=seed)

    def harmonica(
        self, num_steps: int, speed: Speed, seed: int, name: str = "harmonica", flags: tuple = (), **changes
    ) -> str:
        facts = {"speed": f"{speed.target:g}", "train_seed": seed} | changes.pop("facts", {})
        cfg_scale = changes.get("cfg_scale", 1.0)
        router = self.train(name, num_steps, ("speedup", speed.target), seed, *flags, **changes)
        self.row(name, num_steps, dynamic(), router, cfg_scale=cfg_scale, **facts)
        return router

    def end_to_end(
        self,
        num_steps: int,
        speed: Speed,
        seed: int,
        name: str = FORECAST,
        flags: dict | None = None,
        **facts,
    ) -> str:
        """A training on the error of x_0, and its row; returns the training's id."""
        setting, flags = self.scale.beyond[num_steps], dict(flags or {})
        id = f"{name}-T{num_steps}-speedup{speed.target:g}-s{seed}"
        arguments = ["--method", "end-to-end", "--model", MODEL, "--num-sampling-steps", num_steps]
        arguments += ["--cfg-scale", 1, "--target-speedup", speed.target, "--global-seed", seed]
        arguments += ["--max-steps", flags.pop("--max-steps", setting.train_steps)]
        arguments += ["--global-batch-size", setting.batch]
        arguments += ["--keep-activations", *(word for flag in flags.items() for word in flag)]
        self.tasks.setdefault(id, Task(id, tuple(map(str, arguments)), is_training=True))
        facts = {"speed": f"{speed.target:g}", "train_seed": seed} | facts
        self.row(name, num_steps, dynamic(), id, **facts)
        return id

    def beyond(self, num_steps: int) -> None:
        """End-to-end training at all speeds, with weights and without, and weights for others' schedules."""
        for seed in range(self.scale.seeds[num_steps]):
            for speed in self.scale.speeds[num_steps]:
                self.end_to_end(num_steps, speed, seed, flags=self.scale.beyond[num_steps].flags)
        for speed in self.scale.speeds[num_steps]:
            facts = {"speed": f"{speed.target:g}"}
            fora = ["--accelerate-method", "calibrated-fora", "--interval", speed.interval]
            self.row("calibrated-fora", num_steps, fora, **facts)
            if speed.target != MILD:
                router = f"harmonica-T{num_steps}-speedup{speed.target:g}-s0"
                flags = dynamic("calibrated-dynamiclayer")
                self.row("calibrated-harmonica", num_steps, flags, router, **facts, train_seed=0)
            self.end_to_end(num_steps, speed, 0, "end-to-end", {"--terms": 0, "--max-steps": 22})

    def fresh(self, num_steps: int, group: str) -> None:
        """The end-to-end rows and those of the others that come near, at a seed of their own.

        Near come the others that have the least error or distance of all others somewhere in the comparison
        at this number of steps, as of training seed 0; at FRESH HarmoniCa too, of all training seeds.
        """
        for speed in self.scale.speeds[num_steps]:
            facts = {"speed": f"{speed.target:g}", "group": group}
            for method, flags in interval_methods(speed):
                if method in NEAR[num_steps]:
                    self.row(method, num_steps, flags, **facts)
            seeds = range(self.scale.seeds[num_steps])
            routers = [(FORECAST, speed.target, seed) for seed in seeds]
            if group == FRESH:
                routers += [("harmonica", speed.target, seed) for seed in seeds]
                routers += [("l2c", speed.l2c_target, 0)] if speed.target == MILD else []
            if num_steps == 10:
                routers += [("harmonica-paper", speed.target, 0)] if speed.target != MILD else []
            for name, target, seed in routers:
                router = f"{name}-T{num_steps}-speedup{target:g}-s{seed}"
                reuse = dynamic("l2c" if name == "l2c" else "dynamiclayer")
                self.row(name, num_steps, reuse, router, train_seed=seed, **facts)

    def without_flags(self, num_steps: int) -> None:
        """What the flags of end-to-end trainings are worth, at two speeds with one training seed."""
        no_moments = dict(self.scale.beyond[num_steps].flags)
        no_moments.pop("--moments-weight")
        for speed in self.scale.speeds[num_steps]:
            if speed.target in ABLATED:
                self.end_to_end(num_steps, speed, 0, NO_MOMENTS, no_moments, group=FRESH)
                for group in SEEDS:
                    self.end_to_end(num_steps, speed, 0, UNIFORM, group=group)

    def ingredients(self) -> None:
        """Ablations of end-to-end training at T = 10 and one speed, and its routers elsewhere."""
        num_steps, speed = ABLATION_STEPS, ablation_speed()
        for variant, flags in (
            ("one-term", {"--terms": 1}),
            ("two-terms", {"--terms": 2}),
            ("fitted-only", {"--max-steps": 17}),
            ("window-5", {"--window": 5}),
            ("window-2", {"--window": 2}),
            ("open-share-0.25", {"--open-share": 0.25}),
            ("pool-1024", {"--pool": 1024}),
            ("moments", {"--moments-weight": 1}),
            ("from-50-steps", {"--init": self.routers / f"{FORECAST}-T50-speedup1.96-s0.safetensors"}),
        ):
            facts = {"group": "end-to-end", "variant": variant}
            id = self.end_to_end(num_steps, speed, 0, f"{FORECAST}-{variant}", flags, **facts)
            if variant == "from-50-steps":
                task = self.tasks[id]
                self.tasks[id] = dataclasses.replace(task, needs=(f"{FORECAST}-T50-speedup1.96-s0",))
        router, speed = f"{FORECAST}-T{num_steps}-speedup{speed.target:g}-s0", f"{speed.target:g}"
        for cfg_scale, sampler in ((1.5, "ddim"), (1.0, "ddpm")):
            for reuse, variant in (("", "as-trained"), ("calibrated-", "calibrated")):
                self.row(
                    FORECAST, num_steps, dynamic(f"{reuse}dynamiclayer"), router, speed=speed, train_seed=0,
                    group="transfer", variant=variant, cfg_scale=cfg_scale, sampler=sampler,
                )  # fmt: skip

    def trained(self, num_steps: int, speed: Speed, seed: int) -> None:
        """All trained methods at one speed, from one seed."""
        facts = {"speed": f"{speed.target:g}", "train_seed": seed}
        if speed.l2c_target:
            router = self.train("l2c", num_steps, ("speedup", speed.l2c_target), seed)
            self.row("l2c", num_steps, dynamic("l2c"), router, **facts)
        router = self.harmonica(num_steps, speed, seed)
        if speed.target == MILD:
            return
        self.row("taylor-harmonica", num_steps, dynamic("taylor-dynamiclayer"), router, **facts)
        self.harmonica(num_steps, speed, seed, "harmonica-paper", ("--proxy", "paper"))
        router = self.train("l2c-every-row", num_steps, ("speedup", speed.target), seed)
        self.row("l2c-every-row", num_steps, dynamic("l2c"), router, **facts)

    def compare(self, num_steps: int, seeds: range | None = None) -> None:
        """All methods at all speeds; what is planned already stays where it is."""
        for seed in seeds or range(self.scale.seeds[num_steps]):
            for speed in self.scale.speeds[num_steps]:
                if seed == 0:
                    self.static(num_steps, speed)
                if speed.target != MILD:
                    self.random(num_steps, speed, seed)
                self.trained(num_steps, speed, seed)

    def variants(self, seeds: range) -> None:
        """Ablations of the training at T = 10 and one speed; `group` says of what."""
        for group, name, flags in (
            ("proxy", "harmonica-no-proxy", ("--proxy", "none")),
            ("router-train", "harmonica-ste", ("--router-train", "ste")),
            ("data-loss", "harmonica-eps", ("--data-loss", "eps")),
            ("cost", "harmonica-macs", ("--cost", "macs")),
            ("rollout", "harmonica-one-step", ("--rollout", "one-step")),
        ):
            for seed in seeds:
                self.harmonica(ABLATION_STEPS, ablation_speed(), seed, name, flags, facts={"group": group})

    def settings(self) -> None:
        """Threshold, learning rate, guidance and sampler; seed 0."""
        num_steps, speed = ABLATION_STEPS, ablation_speed()
        router = self.harmonica(num_steps, speed, 0)  # the same as above, no second training
        for threshold in (0.02, 0.05, 0.2, 0.3, 0.5, 0.7, 0.9):
            flags = [*dynamic(), "--thres", threshold]
            self.row(
                "harmonica", num_steps, flags, router, train_seed=0, group="threshold", variant=threshold
            )
        for lr, updates in ((0.3, 100), (0.03, 330)):
            name, facts = f"harmonica-lr{lr}", {"group": "lr"}
            self.harmonica(num_steps, speed, 0, name, lr=lr, updates=updates, facts=facts)

        self.static(num_steps, speed, cfg_scale=1.5)
        facts = {"speed": f"{speed.target:g}", "train_seed": 0}
        guided = self.harmonica(num_steps, speed, 0, cfg_scale=1.5)
        l2c = f"l2c-every-row-T{num_steps}-speedup{speed.target:g}-s0"
        self.row("l2c-every-row", num_steps, dynamic("l2c"), l2c, **facts, cfg_scale=1.5)
        facts["group"] = "transfer"
        self.row("harmonica", num_steps, dynamic(), guided, **facts, variant="trained-at-1.5")
        self.row("harmonica", num_steps, dynamic(), router, **facts, variant="trained-at-1", cfg_scale=1.5)
        self.row(
            "harmonica", num_steps, dynamic(), router, **facts, variant="trained-with-ddim", sampler="ddpm"
        )
        fora = ["--accelerate-method", "fora", "--interval", speed.interval]
        self.row("fora", num_steps, fora, speed=f"{speed.target:g}", group="transfer", sampler="ddpm")

    def objective(self) -> None:
        """What SDT minimises, of routers that it trained and of schedules that it did not."""
        num_steps, speed = ABLATION_STEPS, ablation_speed()
        errors, facts = ["--step-errors", 500], {"train_seed": 0, "group": "objective"}
        fora = ["--accelerate-method", "fora", "--interval", speed.interval]
        self.row("fora", num_steps, [*fora, *errors], speed=f"{speed.target:g}", group="objective")
        for name in ("harmonica", "harmonica-no-proxy", "harmonica-paper", "harmonica-20k", "l2c-every-row"):
            router = f"{name}-T{num_steps}-speedup{speed.target:g}-s0"
            reuse = dynamic("l2c" if name.startswith("l2c") else "dynamiclayer")
            self.row(name, num_steps, [*reuse, *errors], router, speed=f"{speed.target:g}", **facts)

    def targets(self) -> None:
        """Whether `--target-cur` reaches what it is asked for."""
        for cur in (0.25, 0.4, 0.55):
            for seed in range(3):
                router = self.train("harmonica", 10, ("cur", cur), seed)
                self.row("harmonica", 10, dynamic(), router, train_seed=seed, group="target-cur", variant=cur)

    def full_length(self) -> None:
        """The published 20,000 train steps at the published learning rate."""
        changes = {"lr": 0.01, "updates": 2000, "facts": {"group": "full-length"}}
        self.harmonica(ABLATION_STEPS, ablation_speed(), 0, "harmonica-20k", **changes)


def interval_methods(speed: Speed) -> list[tuple[str, list]]:
    """FORA and TaylorSeer of orders 1 and 2 with their flags, by one rule for all and by the released rules.

    As many rows are computed by either rule. The released codes know whole intervals alone; where none gives
    that many rows, theirs is a fraction here.
    """
    ours, released = ["--interval", speed.interval], ["--interval", speed.released_interval]
    found = []
    for suffix, fora, taylor in (
        ("", ours, ours),
        ("-released", [*released, "--anchor", "last"], [*released, "--first-steps", 2]),
    ):
        found.append((f"fora{suffix}", ["--accelerate-method", "fora", *fora]))
        for order, name in ((1, "taylor-fora"), (2, "taylor2-fora")):
            flags = ["--accelerate-method", "taylor-fora", *taylor, "--order", order]
            found.append((f"{name}{suffix}", flags))
    return found


def ablation_speed() -> Speed:
    return next(one for one in SPEEDS[ABLATION_STEPS] if f"{one.target:g}" == MAIN_SPEED)


def dynamic(method: str = "dynamiclayer") -> list[str]:
    return ["--accelerate-method", method]


@cache
def random_cur(num_steps: int, speedup: float, seed: int) -> float:
    """The CUR at which a random schedule of this seed comes closest to a speed-up by MACs."""
    model = digits_model()

    def speedup_at(cur: float) -> float:
        return random_schedule(num_steps, model.num_branches, cur, seed).speedup_macs(model)

    curs = RANDOM_CURS[(num_steps - 1) / num_steps > RANDOM_CURS]
    above = min(bisect.bisect_left(curs, speedup, key=speedup_at), len(curs) - 1)
    nearest = min(curs[max(0, above - 1) : above + 1], key=lambda cur: abs(speedup_at(cur) - speedup))
    return float(curs[bisect.bisect_left(curs, speedup_at(nearest), key=speedup_at)])  # the least of equals


def plan(folder: Path, scale: Scale) -> list[Task]:
    """All tasks in order: what is cheap and what is most asked for comes first."""
    tasks = Plan(folder, scale)
    tasks.compare(10)
    if scale.ablations:
        tasks.targets()
    tasks.compare(20, range(1))
    if scale.ablations:
        tasks.variants(range(1))
        tasks.settings()
        tasks.full_length()
        tasks.objective()
    tasks.compare(50)
    tasks.compare(20)
    if scale.ablations:
        tasks.variants(range(scale.seeds[ABLATION_STEPS]))
    for num_steps in (10, 20, 50):
        tasks.beyond(num_steps)
    if scale.ablations:
        tasks.ingredients()
        for num_steps, group in ((20, FRESH), (20, SECOND), (10, FRESH), (50, FRESH)):
            tasks.fresh(num_steps, group)
        tasks.without_flags(20)
    return list(tasks.tasks.values())


@cache
def digits_model() -> DiT:
    return load_model(MODEL)
