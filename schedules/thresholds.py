"""The threshold-driven caches that people run: first-block cache, DBCache, TeaCache, MagCache.

`dynamic.py` holds what the first three do at run time. MagCache's decisions do not depend on the input: at a
tolerance they are a schedule. A tolerance is given, or found for a speed-up by bisection on samples that are
drawn apart from those of sampling and training.

| method | source | in the manner of, where it differs |
|---|---|---|
| first block | ParaAttention's, as `diffusers.hooks.FirstBlockCacheConfig` documents it | stores outputs |
| DBCache | cache-dit 1.5 (Apache-2.0), its documented settings | stores outputs, forecasts each of them |
| TeaCache | Liu et al., arXiv 2411.19108 | stores outputs |
| MagCache | Ma et al., arXiv 2506.09045, and diffusers' `MagCacheConfig` | stores outputs |

"Stores outputs": the originals add one stored residual for all skipped blocks, here every branch reuses its
own last output, under the gates of the new step. A forecast has a slope from the second computed step on,
cache-dit's from the fourth step on.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

from backbones.denoiser import halves
from backbones.stream import block_starts
from common.devices import one_thread
from router import Schedule
from sampling.loop import Trajectory, denoise_loop
from schedules.calibrate import calibration_batch, uncached_outputs
from schedules.dynamic import Rule, grouped, relative_change
from schedules.request import Request

SAMPLES = 16  # drawn to find a tolerance, magnitude ratios, or a rescaling
RESCALE_DEGREE = 4  # TeaCache's


# ---- the methods -----------------------------------------------------------------------------------


def first_block(
    request: Request, tolerance: float | None, target_speedup: float | None, per_sample: bool = False
) -> Rule:
    """Reuse all other blocks while the first one's residual has changed less than the tolerance."""

    def rule(tolerance: float) -> Rule:
        return Rule("first-block cache", *_size(request), tolerance, per_sample=per_sample)

    return tuned(request, rule, tolerance, target_speedup)


def dbcache(
    request: Request,
    tolerance: float | None,
    target_speedup: float | None,
    per_sample: bool = False,
    first_blocks: int = 8,
    last_blocks: int = 0,
    warm_up: int = 8,
    most_reused: int | None = None,
    forecast: bool = False,
) -> Rule:
    """The same with F first and B last blocks computed, a warm-up, a limit, and a forecast as an option."""
    fields = {"first_blocks": first_blocks, "last_blocks": last_blocks, "warm_up": warm_up}
    fields |= {"most_reused": most_reused, "forecast": forecast, "per_sample": per_sample}
    source = f"DBCache, F {first_blocks}, B {last_blocks}, warm-up {warm_up}"
    source += "" if most_reused is None else f", at most {most_reused} in a row"
    source += ", forecast of order 1" if forecast else ""
    return tuned(
        request,
        lambda tolerance: Rule(source, *_size(request), tolerance, **fields),
        tolerance,
        target_speedup,
    )


def teacache(
    request: Request,
    tolerance: float | None,
    target_speedup: float | None,
    per_sample: bool = False,
    rescale: int = SAMPLES,
) -> Rule:
    """Reuse the whole model until the summed changes of its modulated input reach the tolerance.

    rescale: number of samples for the polynomial from a change of the input to one of the output; 0: none.
    The first and the last step are computed.
    """
    coefficients = fitted_rescale(_uncached(request), rescale) if rescale else ()
    source = "TeaCache" + ("" if rescale else " without rescaling")

    def rule(tolerance: float) -> Rule:
        return Rule(
            source, *_size(request), tolerance, first_blocks=0, accumulates=True, rescale=coefficients,
            last_step=True, per_sample=per_sample,
        )  # fmt: skip

    return tuned(request, rule, tolerance, target_speedup)


def magcache(
    request: Request,
    tolerance: float | None,
    target_speedup: float | None,
    most_skipped: int = 3,
    retention: float = 0.2,
) -> Schedule:
    """Reuse the whole model while the error that the ratios of its residual's norm add up to is below."""
    ratios = magnitude_ratios(_uncached(request))
    branches = request.model.num_branches

    def schedule(tolerance: float) -> Schedule:
        return magnitude_schedule(ratios, branches, tolerance, most_skipped, retention)

    return tuned(request, schedule, tolerance, target_speedup)


def _size(request: Request) -> tuple[int, tuple[str, ...]]:
    return request.num_steps, tuple(request.model.branches)


# ---- MagCache --------------------------------------------------------------------------------------


def magnitude_schedule(
    ratios: list[float], num_branches: int, tolerance: float, most_skipped: int = 3, retention: float = 0.2
) -> Schedule:
    """Steps are reused while the sum of `|1 - product of ratios since the last computed step|` is within it.

    ratios: (T,) in the order of execution, ||residual|| over that of the step before. most_skipped: steps in
    a row that are reused at most. retention: share of first steps that are computed.
    """
    num_steps = len(ratios)
    if not 0 <= retention <= 1:
        raise ValueError(f"retention {retention:g} is outside 0 .. 1, a share of the steps")
    kept = max(1, int(retention * num_steps + 0.5))
    table = torch.ones(num_steps, num_branches, dtype=torch.bool)
    product, error, skipped = 1.0, 0.0, 0
    for index in range(kept, num_steps):
        product, skipped = product * ratios[index], skipped + 1
        error += abs(1 - product)
        if error < tolerance and skipped <= most_skipped:
            table[num_steps - 1 - index] = False
        else:
            product, error, skipped = 1.0, 0.0, 0
    source = f"MagCache, tolerance {tolerance:.4g}, at most {most_skipped} in a row, retention {retention:g}"
    return Schedule(table, source)


@torch.no_grad()
def magnitude_ratios(trajectory: Trajectory, num_samples: int = SAMPLES, seed: int = 0) -> list[float]:
    """(T,) in the order of execution: the mean over tokens of ||residual|| over that of the step before.

    The residual is what all blocks together add to the residual stream. The first ratio is 1.
    """
    model, ends = trajectory.backbone, {}
    depth = len(block_starts(model.branches))
    handles = [
        model.watch_stream(place, lambda x, place=place: ends.update({place: x.clone()}))
        for place in (0, depth)
    ]
    ratios, before = [], None
    try:
        for _ in uncached_outputs(trajectory, num_samples, seed):
            norms = torch.linalg.vector_norm((ends[depth] - ends[0]).float(), dim=-1)
            ratios.append(1.0 if before is None else (norms / (before + 1e-8)).mean().item())
            before = norms
    finally:
        for handle in handles:
            handle.remove()
    return ratios


# ---- TeaCache --------------------------------------------------------------------------------------


@torch.no_grad()
def fitted_rescale(trajectory: Trajectory, num_samples: int = SAMPLES, seed: int = 0) -> tuple[float, ...]:
    """Coefficients, highest power first, of the polynomial from the input's change to the output's.

    Least squares over all steps but the first of all samples; the changes are those of consecutive steps.
    """
    model, seen = trajectory.backbone, {}
    both = halves(model, trajectory.cfg_scale)
    handle = model.watch_input(lambda x: seen.update(input=grouped(x, both)))
    changes, before = [], None
    try:
        for output in uncached_outputs(trajectory, num_samples, seed):
            own = model.predicted_noise(output)[:num_samples]  # guided halves are alike
            now = seen["input"], grouped(own, 1)
            if before is not None:
                pairs = zip(now, before, strict=True)
                changes.append(torch.stack([relative_change(new, old) for new, old in pairs]))
            before = now
    finally:
        handle.remove()
    x, y = torch.cat(changes, dim=1).double().cpu().numpy()
    degree = min(RESCALE_DEGREE, len(np.unique(x)) - 1)
    return tuple(np.polyfit(x, y, degree).tolist())


# ---- samples apart from those that are measured ----------------------------------------------------


def _uncached(request: Request) -> Trajectory:
    """The trajectory of the request. Raises ValueError where the model cannot be watched."""
    if getattr(request.model, "watch_stream", None) is None:
        raise ValueError(
            f"{type(request.model).__name__} cannot be watched at run time; take a schedule, such as fora"
        )
    return request.trajectory()


def reached(trajectory: Trajectory, num_samples: int = SAMPLES, seed: int = 0) -> float:
    """The speed-up by MACs of a trajectory's rule or schedule on calibration samples, drawn at once."""
    schedule = trajectory.schedule
    if isinstance(schedule, Rule):
        labels, noise, step_noise = calibration_batch(trajectory, num_samples, seed)
        with one_thread(noise.device):
            for _ in denoise_loop(trajectory, labels, noise, trajectory.cache(), step_noise):
                pass
    return schedule.speedup_macs(trajectory.backbone)


def tuned(
    request: Request,
    make: Callable[[float], Rule | Schedule],
    tolerance: float | None,
    target_speedup: float | None,
    num_samples: int = SAMPLES,
) -> Rule | Schedule:
    """`make(tolerance)`; without one, at the tolerance whose speed-up is nearest to the target.

    Notes on `request` what was found. Raises ValueError where no tolerance reaches the target.
    """
    if tolerance is None:

        def speedup(tolerance: float) -> float:
            return reached(request.trajectory(make(tolerance)), num_samples)

        tolerance, found = find_tolerance(speedup, target_speedup)
        request.notes.append(
            f"--tolerance {tolerance:.6g} reaches {found:.3f}x by MACs on {num_samples} samples apart"
        )
    return make(tolerance)


START, LARGEST = 0.02, 1e6  # tolerances between which it is bracketed
CLOSE = 0.002  # relative distance to the target at which the search ends
NARROW = 0.005  # relative width of the bracket at which it ends, too: the speed-up grows in steps


def find_tolerance(speedup: Callable[[float], float], target: float) -> tuple[float, float]:
    """(tolerance, its speed-up) by bisection: the speed-up nearest to the target.

    speedup: a function of the tolerance that grows, in steps. Raises ValueError for a target that is not
    above 1 or beyond what an endless tolerance reaches.
    """
    if not target > 1:
        raise ValueError(f"--target-speedup {target:g} is not above 1; an uncached run has that")
    most = speedup(math.inf)
    if most < target:
        raise ValueError(
            f"--target-speedup {target:g} is out of reach: at any tolerance it is {most:.3f}x at most"
        )
    low, high, tried = 0.0, START, {0.0: 1.0}
    while high < LARGEST:
        tried[high] = speedup(high)
        if tried[high] >= target:
            break
        low, high = high, 2 * high
    while high - low > NARROW * high and min(abs(one / target - 1) for one in tried.values()) > CLOSE:
        middle = (low + high) / 2
        tried[middle] = speedup(middle)
        low, high = (middle, high) if tried[middle] < target else (low, middle)
    best = min(tried, key=lambda one: abs(tried[one] - target))
    return best, tried[best]
