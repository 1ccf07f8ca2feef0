"""Schedules of full steps that are planned on samples: which K of the T steps to compute.

| schedule | minimises | by | in the manner of |
|---|---|---|---|
| `dp_cache` | the sum of all forecasts' errors | dynamic programming | DPCache (2602.22654) |
| `bud_cache` | the error of the final image | annealing, then hill climbing | BudCache (2606.13496) |

Both draw their samples apart from those of sampling and training, and work on a CPU in one thread, so that a
plan does not depend on the number of cores. The first step is always computed.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from common.devices import one_thread
from router import Schedule
from sampling.loop import Trajectory, denoise_loop
from schedules.calibrate import calibration_batch, uncached_outputs

Steps = tuple[int, ...]  # computed steps in the order of execution


def full_steps(steps: Steps, num_steps: int, num_branches: int, source: str = "") -> Schedule:
    """Every branch computed at these steps, none at the others."""
    table = torch.zeros(num_steps, num_branches, dtype=torch.bool)
    table[list(steps)] = True
    return Schedule(table, source)


def dp_cache(trajectory: Trajectory, num_computed: int, num_samples: int = 10, seed: int = 0) -> Schedule:
    """The K full steps whose forecasts are best in sum, on average over a few uncached trajectories.

    Step s between two computed steps is forecast by a line through the model's outputs at the last two of
    them (by the last one where there is one). Its cost is the root mean square error of that forecast. So the
    cost of a gap depends on the two computed steps before it, and the least sum over all gaps is found by
    dynamic programming over pairs of steps. Trajectory: without a schedule. The paper measures features of
    the last layer; here it is the model's output. Raises ValueError for another K than 1 .. T.
    """
    n = num_samples  # under guidance both halves are alike
    steps = uncached_outputs(trajectory, num_samples, seed)
    outputs = torch.stack([one[:n].double().flatten().cpu() for one in steps])  # (T, values), as executed
    num_steps = len(outputs)
    chosen = tuple(num_steps - 1 - place for place in best_path(gap_costs(outputs), num_computed))
    source = f"DPCache, {num_computed} of {num_steps} steps, {num_samples} samples"
    return full_steps(chosen, num_steps, trajectory.backbone.num_branches, source)


def gap_costs(outputs: Tensor) -> Tensor:
    """Costs (T + 1, T, T + 1) of the steps between computed places j and k, where i was computed before j.

    outputs: (T, values), by place in the order of execution. Row T of the first axis stands for "nothing
    before j", place T of the last for the end of the trajectory. Infinite where i < j < k does not hold.
    """
    num_steps = len(outputs)
    products = outputs @ outputs.T / outputs.shape[1]
    costs = torch.full((num_steps + 1, num_steps, num_steps + 1), math.inf, dtype=torch.float64)
    places = torch.arange(num_steps)
    for j in range(num_steps):
        for i in (*range(j), num_steps):
            reach = 0.0 if i == num_steps else 1.0 / (j - i)
            after = places[j + 1 :]
            slope = (after - j) * reach  # the forecast is F_j + slope (F_j - F_i)
            before = i if i < num_steps else j
            # Mean square of F_s - (1 + slope) F_j + slope F_i, from products of outputs.
            a, b = -(1 + slope), slope
            square = (
                products[after, after] + a**2 * products[j, j] + b**2 * products[before, before]
                + 2 * a * products[after, j] + 2 * b * products[after, before]
                + 2 * a * b * products[j, before]
            )  # fmt: skip
            costs[i, j, j + 1] = 0.0
            costs[i, j, j + 2 :] = square.clamp(min=0).sqrt().cumsum(0)
    return costs


def best_path(costs: Tensor, num_computed: int) -> Steps:
    """The places of the cheapest path of `num_computed` places from place 0 to the end.

    costs: as `gap_costs` makes them. Raises ValueError for another number than 1 .. T.
    """
    num_steps = costs.shape[1]
    if not 1 <= num_computed <= num_steps:
        raise ValueError(f"{num_computed} computed steps are outside 1 .. {num_steps}")
    total = torch.full(costs.shape[:2], math.inf, dtype=torch.float64)  # by the last two places
    total[num_steps, 0] = 0.0
    choices: list[Tensor] = []
    for _ in range(num_computed - 1):
        through = total[:, :, None] + costs[:, :, :num_steps]  # (before, last, next)
        least, before = through.min(0)
        total = torch.full_like(total, math.inf)
        total[:num_steps] = least
        choices.append(before)
    ends = total + costs[:, :, num_steps]
    before, last = divmod(int(ends.argmin()), num_steps)
    path = [last]
    for choice in reversed(choices):
        path.append(before)
        before = int(choice[before, path[-2]])
    return tuple(path[::-1])


def bud_cache(
    trajectory: Trajectory, num_computed: int, num_samples: int = 10, evaluations: int = 200, seed: int = 0,
    progress: bool = False, reuse: Callable[[Schedule], Schedule] = lambda schedule: schedule,
) -> Schedule:  # fmt: skip
    """The K full steps with the least error of x_0, searched by simulated annealing, then hill climbing.

    Two thirds of the evaluations anneal from evenly spaced steps: one computed step moves to another place,
    and what makes the error larger is accepted with a probability that falls. From the best plan on, the
    rest of them shift single computed steps by one, as long as that helps. An evaluation is a run of
    `num_samples` samples. reuse: gives a schedule its weights of reuse, such as a forecast's. Trajectory:
    without a schedule. Raises ValueError for another K than 1 .. T.
    """
    num_steps, num_branches = trajectory.sampler.num_steps, trajectory.backbone.num_branches
    if not 1 <= num_computed <= num_steps:
        raise ValueError(f"{num_computed} computed steps are outside 1 .. {num_steps}")
    labels, noise, step_noise = calibration_batch(trajectory, num_samples, seed)

    def run(schedule: Schedule | None) -> Tensor:
        own = Trajectory(trajectory.backbone, trajectory.sampler, trajectory.cfg_scale, schedule)
        with one_thread(trajectory.backbone.device):
            *_, (_, x_0) = denoise_loop(own, labels, noise, own.cache(), step_noise)
        return x_0

    uncached = run(None)
    bar = tqdm(total=evaluations, desc="plans", disable=None if progress else True)

    def error(steps: Steps) -> float:
        bar.update()
        found = run(reuse(full_steps(steps, num_steps, num_branches)))
        return (found - uncached).double().square().mean().item()

    with bar:
        steps = searched(error, num_steps, num_computed, evaluations, seed)
    source = f"BudCache, {num_computed} of {num_steps} steps, {num_samples} samples"
    return full_steps(steps, num_steps, num_branches, source)


HOT, COLD = 0.3, 0.01  # temperatures of annealing, in units of the logarithm of the error


def searched(
    error: Callable[[Steps], float], num_steps: int, num_computed: int, evaluations: int, seed: int
) -> Steps:
    """The best of the plans that annealing and hill climbing look at; step T - 1 is in all of them."""
    generator = torch.Generator().manual_seed(seed)
    known: dict[Steps, float] = {}

    def log_error(steps: Steps) -> float:
        if steps not in known:
            known[steps] = math.log(max(error(steps), 1e-300))
        return known[steps]

    even = {num_steps - 1 - k * num_steps // num_computed for k in range(num_computed)}
    current = best = tuple(sorted(even, reverse=True))
    log_error(current)
    movable = num_computed > 1 and num_computed < num_steps
    tries = evaluations * 2 // 3 if movable else 0
    for k in range(tries):
        left = [step for step in range(num_steps - 1) if step not in current]
        out = current[1 + int(torch.randint(num_computed - 1, (), generator=generator))]
        new = left[int(torch.randint(len(left), (), generator=generator))]
        proposed = tuple(sorted({*current, new} - {out}, reverse=True))
        rise = log_error(proposed) - log_error(current)
        temperature = HOT * (COLD / HOT) ** (k / max(tries - 1, 1))
        if rise <= 0 or torch.rand((), generator=generator).item() < math.exp(-rise / temperature):
            current = proposed
        if log_error(current) < log_error(best):
            best = current
    improved = movable
    while improved:
        improved = False
        for neighbour in _shifted(best, num_steps):
            if neighbour not in known and len(known) >= evaluations:
                return best
            if log_error(neighbour) < log_error(best):
                best, improved = neighbour, True
                break
    return best


def _shifted(steps: Steps, num_steps: int) -> list[Steps]:
    """All plans in which one computed step, not the first, is one earlier or later."""
    found = []
    for step in steps[1:]:
        for other in (step - 1, step + 1):
            if 0 <= other < num_steps and other not in steps:
                found.append(tuple(sorted({*steps, other} - {step}, reverse=True)))
    return found
