"""What the emoji study trains and measures, as data; `study/plan.py` has the words in which it is said.

All rows have guidance 4.5. The comparison is under DPM-Solver++; DDIM and IDDPM are groups of their own, as
is HarmoniCa's training of the published length. Routers train on `prompts/train.txt`, rows are measured on
`prompts/study.txt`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from examples.emoji import FOLDER, MODEL
from study.plan import (
    EndToEndScale,
    Row,
    Scale,
    Speed,
    Task,
    Training,
    chain_suffix,
    fewer_steps,
    random,
    routed,
    tasks,
    untrained,
)
from study.subjects import EMOJI, ROOT
from study.tables import FORECAST, FULL_LENGTH

CFG_SCALE = 4.5
MAIN = "dpm-solver++"
MAIN_SPEED = 2.0
PROMPTS = (FOLDER / "prompts" / "train.txt").relative_to(ROOT)
COMMON = {"cfg_scale": CFG_SCALE, "example": EMOJI.name}

# FORA and fewer steps reach whole steps alone: 2.75 and 1.28 are within 4 % of theirs, 2.7 and 1.3 are not.
SPEEDS = {
    20: [
        Speed(1.3, "4/3", "4/3", 15, 1.3),
        Speed(1.6, "5/3", "12/7", 12, 1.6),
        Speed(2.0, "2", "9/4", 10, 1.92),
        Speed(2.75, "20/7", "7/2", 7),
    ],
    10: [
        Speed(1.28, "1.25", "4/3", 8, 1.28),
        Speed(1.6, "5/3", "2", 6, 1.6),
        Speed(2.0, "2", "5/2", 5, 1.92),
    ],
    100: [Speed(2.0, "2", "100/49", 50)],
}


@dataclass(frozen=True)
class EmojiScale(Scale):
    """slow_samples: of IDDPM's rows. full_length: train steps of HarmoniCa at the published length.

    trajectories: of a batch step by step. other_chains: (sampler, T) beside the comparison.
    """

    slow_samples: int = 200
    full_length: int | None = 20_000
    trajectories: int = 4
    other_chains: tuple[tuple[str, int], ...] = (("ddim", 20), ("iddpm", 100))

    def samples_of(self, row: Row) -> int:
        if row.num_steps == 100:
            return self.slow_samples
        in_readme = row.method == "uncached" or (row.speed == f"{MAIN_SPEED:g}" and row.group is None)
        shown = in_readme and (row.sampler, row.num_steps) == (MAIN, 20)
        return self.samples_in_readme if shown else self.samples


FULL = EmojiScale(
    samples=500,
    samples_in_readme=1000,
    seeds={20: 2, 10: 2, 100: 1},
    speeds=SPEEDS,
    updates={20: 30, 10: 50, 100: 8},
    lr=0.1,
    repeats=9,
    ablations=True,
    end_to_end={
        20: EndToEndScale(47, 8, {"pool": 256, "moments_weight": 1}),
        10: EndToEndScale(47, 8),
        100: EndToEndScale(22, 2),
    },
)
QUICK = EmojiScale(
    samples=24,
    samples_in_readme=24,
    seeds={20: 1, 10: 1, 100: 1},
    speeds={20: SPEEDS[20][2:3], 10: []},
    updates={20: 8, 10: 8, 100: 1},
    lr=0.5,
    repeats=1,
    ablations=False,
    end_to_end={20: EndToEndScale(18, 1), 10: EndToEndScale(18, 1), 100: EndToEndScale(18, 1)},
    full_length=None,
    trajectories=1,
    other_chains=(),
)

# ---- trainings -------------------------------------------------------------------------------------


def step_by_step(
    scale: EmojiScale, name: str, num_steps: int, speed: float, seed: int, sampler: str, **more
) -> Training:
    """A training of HarmoniCa, or of Learning-to-Cache, which has neither guidance nor a sampler."""
    is_l2c = name.startswith("l2c")
    rows = num_steps // 2 if name == "l2c" else num_steps
    settings = {
        "model": MODEL,
        "prompts": PROMPTS,
        "num_sampling_steps": num_steps,
        "target_speedup": speed,
        "global_seed": seed,
        "lr": scale.lr,
        "max_steps": scale.updates_of(name, num_steps, speed) * rows,
    }
    if is_l2c:
        settings |= {"method": "l2c", "data": EMOJI.name, "l1": 0.1 if speed > 1.9 else 1e-4}
        settings |= {"global_batch_size": 2 * scale.trajectories, "groups": 1}
    else:
        settings |= {"cfg_scale": CFG_SCALE, "sampler": sampler, "trajectories": scale.trajectories}
        settings |= {"l1": 1e-6, "lambda_c": num_steps * max(10, num_steps // 2)}
        settings |= {"proxy": "paper"} if name == "harmonica-paper" else {}
    settings |= {"log_every": 5 * num_steps, "ckpt_every": 500} | more
    chain = "" if is_l2c else chain_suffix(CFG_SCALE, sampler)
    return Training(f"{name}-T{num_steps}-speedup{speed:g}-s{seed}{chain}", settings)


def end_to_end(
    scale: EmojiScale, num_steps: int, speed: Speed, seed: int, sampler: str, name: str = FORECAST
) -> Training:
    """A training on the error of the final latents; name "end-to-end": of the schedule alone."""
    size = scale.end_to_end[num_steps]
    settings = {
        "method": "end-to-end",
        "model": MODEL,
        "prompts": PROMPTS,
        "num_sampling_steps": num_steps,
        "cfg_scale": CFG_SCALE,
        "sampler": sampler,
        "target_speedup": speed.target,
        "global_seed": seed,
        "max_steps": size.train_steps,
        "trajectories": size.batch_size,
        "keep_activations": num_steps < 100,
    }
    settings |= size.forecast if name == FORECAST else {"terms": 0, "max_steps": min(22, size.train_steps)}
    return Training(
        f"{name}-T{num_steps}-speedup{speed.name}-s{seed}{chain_suffix(CFG_SCALE, sampler)}", settings
    )


# ---- sections --------------------------------------------------------------------------------------


def compared(scale: EmojiScale, sampler: str, num_steps: int, speed: Speed, seed: int) -> Iterator[Row]:
    """All methods at one speed of one chain, from one training seed."""
    group = None if sampler == MAIN else sampler
    facts = COMMON | {"sampler": sampler, "group": group}
    chain = num_steps, speed
    if seed == 0:
        yield from fewer_steps(*chain, **facts)
        yield from untrained(*chain, **facts)
        fora = {"accelerate_method": "calibrated-fora", "interval": speed.interval}
        yield Row("calibrated-fora", num_steps, fora, speed=speed.name, **facts)
    yield random(*chain, seed, EMOJI, cfg_scale=CFG_SCALE, sampler=sampler, group=group)
    router = step_by_step(scale, "harmonica", num_steps, speed.target, seed, sampler)
    yield routed(router, "harmonica", *chain, seed, **facts)
    paper = step_by_step(scale, "harmonica-paper", num_steps, speed.target, seed, sampler)
    yield routed(paper, "harmonica-paper", *chain, seed, **facts)
    if speed.l2c_target:
        l2c = step_by_step(scale, "l2c", num_steps, speed.l2c_target, seed, sampler)
        yield routed(l2c, "l2c", *chain, seed, **facts)
    if seed == 0:
        yield routed(router, "calibrated-harmonica", *chain, 0, "calibrated-", **facts)
        alone = end_to_end(scale, num_steps, speed, 0, sampler, "end-to-end")
        yield routed(alone, "end-to-end", *chain, 0, **facts)
    yield routed(end_to_end(scale, num_steps, speed, seed, sampler), FORECAST, *chain, seed, **facts)


def seeds_of(scale: EmojiScale, num_steps: int, speed: Speed) -> range:
    """Training seeds: two at the main speed, elsewhere one."""
    return range(scale.seeds[num_steps] if speed.target == MAIN_SPEED else 1)


def rows(scale: EmojiScale) -> Iterator[Row]:
    """All rows in order: what is most asked for comes first."""
    for num_steps in (20, 10):
        speeds = sorted(scale.speeds[num_steps], key=lambda speed: speed.target != MAIN_SPEED)
        for speed in speeds:
            for seed in seeds_of(scale, num_steps, speed):
                yield from compared(scale, MAIN, num_steps, speed, seed)
    for sampler, num_steps in scale.other_chains:
        for speed in scale.speeds[num_steps]:
            if speed.target == MAIN_SPEED:
                yield from compared(scale, sampler, num_steps, speed, 0)
    if scale.full_length:
        speed = next(one for one in SPEEDS[20] if one.target == MAIN_SPEED)
        longest = {"lr": 0.01, "max_steps": scale.full_length, "trajectories": 1, "lambda_c": 500}
        router = step_by_step(scale, "harmonica-20k", 20, speed.target, 0, MAIN, **longest)
        yield routed(router, "harmonica-20k", 20, speed, 0, group=FULL_LENGTH, sampler=MAIN, **COMMON)


def plan(folder: Path, scale: EmojiScale) -> list[Task]:
    """All tasks of the emoji study in a folder, each once and after what it needs."""
    return tasks(rows(scale), folder, scale)
