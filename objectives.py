"""What a router is trained on: HarmoniCa's trajectories and image error proxy, Learning-to-Cache's pairs.

Step-wise denoising training (SDT) and the image error proxy (IEPO) are sections 4.2 and 4.3 of HarmoniCa
(Huang et al., ICML 2025); the pair of steps is Learning-to-Cache's (Ma et al., NeurIPS 2024). Our own
objective, the error of the final image, is in `end_to_end/`. Pure mathematics: no processes, files or
logging. A training trajectory is a generator that yields after every update; its caller logs, saves and
stops.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from backbones.contract import Backbone
from backbones.denoiser import Denoiser, arrive, executed, walk
from cache import SoftCache, StaticCache
from diffusion import GaussianDiffusion, Sampler, State
from router import Router, Schedule

PROXY_DEFINITIONS = ("released", "paper")


def mean_squared(difference: Tensor, _model: Backbone) -> Tensor:
    """Over all channels of a difference of outputs (N, C_out, H, W), as published; a scalar."""
    return difference.square().mean()


def mean_squared_noise(difference: Tensor, model: Backbone) -> Tensor:
    """Over the channels that predict noise alone: DDIM never reads those of the variance."""
    return model.predicted_noise(difference).square().mean()


# The values of --data-loss. Another distance is a function like these and one row.
DATA_LOSSES: dict[str, Callable[[Tensor, Backbone], Tensor]] = {
    "all": mean_squared,
    "eps": mean_squared_noise,
}


@dataclass(frozen=True)
class Variant:
    """What may differ from the published objective; the defaults are the published one.

    branch_costs: (B,) factors of the scores in the regularization, with mean 1; None counts all alike.
    data_loss: a key of `DATA_LOSSES`. straight_through: train the thresholded router, see `SoftCache`.
    one_step: take x_t and the store of every step from the uncached trajectory instead of the routed one.
    """

    branch_costs: Tensor | None = None
    data_loss: str = "all"
    straight_through: bool = False
    one_step: bool = False

    def score_sum(self, scores: Tensor) -> Tensor:
        return scores.sum() if self.branch_costs is None else (self.branch_costs * scores).sum()


class TrainStep(NamedTuple):
    """One update of row `step`; the losses are 0-dim tensors that stay on the device.

    Where several groups train a row each, `step` holds all their rows and the losses are means over groups.
    """

    step: int | tuple[int, ...]
    loss: Tensor
    data_loss: Tensor
    score_sum: Tensor


def train_trajectory(
    model: Backbone,
    diffusion: GaussianDiffusion | Sampler,
    router: Router,
    optimizer: torch.optim.Optimizer,
    noise: Tensor,
    labels: Tensor,
    cfg_scale: float,
    threshold: float,
    proxy_weights: Tensor,
    reg_weight: float,
    variant: Variant | None = None,
) -> Iterator[TrainStep]:
    """Step-wise denoising training: one full run from `noise`, one update of row i at every step i < T-1.

    noise: (n, C, H, W); labels: (n,); proxy_weights: (T,) lambda. The model must be frozen and in eval mode.
    The loss of row i is `lambda_i * mean((teacher - routed)^2) + reg_weight * sum_b score[i, b]`. The mean is
    over the whole guided output.
    """
    variant = variant or Variant()
    denoise = Denoiser(model, diffusion, labels, cfg_scale)
    first_step, *steps = executed(denoise.num_steps)
    rows = router.score_rows()

    def train(place: tuple[State, SoftCache, TrainStep | None], step: int) -> tuple:
        state, cache, _ = place
        fresh = SoftCache(rows, threshold, variant.straight_through)  # empty: computes and stores everything
        with torch.no_grad():
            teacher = denoise(state.x, step, fresh if variant.one_step else None)  # (N, C or 2C, H, W)
        routed = denoise(state.x, step, cache)
        losses = _losses(teacher - routed, model, rows[step], proxy_weights[step], reg_weight, variant)
        _update(router, optimizer, step, losses[0])
        update = TrainStep(step, *(loss.detach() for loss in losses))
        if variant.one_step:
            return denoise.sampler.step(teacher, state, step), fresh, update
        return denoise.sampler.step(routed.detach(), state, step), cache, update

    cache = SoftCache(rows, threshold, variant.straight_through)
    with torch.no_grad():
        state = denoise.advance(denoise.start(noise), first_step, cache)
    for _, (_, _, update) in walk(train, (state, cache, None), steps):
        yield update


class Pair(NamedTuple):
    """What a group of Learning-to-Cache trains on: its samples, and the step that it computes in full.

    x_0: (n, C, H, W) data, to which `noise` is added up to `step`. labels: (n,); the caller has replaced some
    by the null label.
    """

    x_0: Tensor
    noise: Tensor
    labels: Tensor
    step: int


def train_pair(
    model: Backbone,
    diffusion: GaussianDiffusion | Sampler,
    router: Router,
    optimizer: torch.optim.Optimizer,
    x_0: Tensor,
    noise: Tensor,
    labels: Tensor,
    step: int,
    threshold: float,
    reg_weight: float,
    variant: Variant | None = None,
) -> TrainStep:
    """Learning-to-Cache by one group: one update of row `step - 1`. Arguments as in `Pair`."""
    pairs = [Pair(x_0, noise, labels, step)]
    return train_pairs(model, diffusion, router, optimizer, pairs, threshold, reg_weight, variant)


def train_pairs(
    model: Backbone,
    diffusion: GaussianDiffusion | Sampler,
    router: Router,
    optimizer: torch.optim.Optimizer,
    pairs: Sequence[Pair],
    threshold: float,
    reg_weight: float,
    variant: Variant | None = None,
    steps: Sequence[int] | None = None,
    gather: Callable[[Tensor], Tensor] = lambda own: own,
) -> TrainStep:
    """Learning-to-Cache: one update of the rows that the groups drew, from data and without guidance.

    For each pair the model computes its step in full, which fills a fresh store, and takes one DDIM step.
    There the loss of row `step - 1` is `mean((plain - routed)^2) + reg_weight * sum_b score[step - 1, b]`. A
    row's gradient is the sum over the groups that drew it, divided by the number of all groups, as
    `DistributedDataParallel` computes it with one group per rank. A row that no group drew has no gradient,
    and Adam leaves it as it is.

    pairs: the groups of this process. steps: the steps of all groups of all processes, in the order in which
    gradients are summed; None: those of `pairs`. gather: turns this process's numbers, (own groups, 3 + B),
    into those of all groups, (groups, 3 + B).
    """
    variant = variant or Variant()
    rows = [step - 1 for step in (steps or [pair.step for pair in pairs])]
    setting = threshold, reg_weight, variant
    own = [_losses_and_gradient(model, diffusion, router, pair, *setting) for pair in pairs]
    losses, gradients = gather(torch.stack(own)).split([3, router.num_branches], dim=1)  # (groups, .)
    update_rows(router, optimizer, rows, gradients)
    return TrainStep(rows[0] if len(rows) == 1 else tuple(rows), *losses.mean(0))


def update_rows(
    router: Router, optimizer: torch.optim.Optimizer, rows: Sequence[int], gradients: Tensor
) -> None:
    """Descend on the rows that the groups drew, one row each, along the mean of their gradients (groups, B).

    In this mean a row's gradient counts as zero for a group that drew another row. Rows that no group drew
    have no gradient.
    """
    optimizer.zero_grad(set_to_none=True)
    for row, gradient in zip(rows, gradients / len(rows), strict=True):
        parameter = router.rows[row]
        parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient
    optimizer.step()
    for row in set(rows):
        router.clamp_(row)


def _losses_and_gradient(
    model: Backbone,
    diffusion: GaussianDiffusion | Sampler,
    router: Router,
    pair: Pair,
    threshold: float,
    reg_weight: float,
    variant: Variant,
) -> Tensor:
    """Loss, data loss and score sum of a pair, and the gradient of the row that it trains: (3 + B)."""
    x_0, noise, labels, step = pair
    denoise = Denoiser(model, diffusion, labels, cfg_scale=1.0)
    cache = SoftCache(router.score_rows(), threshold, variant.straight_through)
    with torch.no_grad():
        x_t = denoise.advance(denoise.sampler.add_noise(x_0, step, noise), step, cache).x
        plain = denoise(x_t, step - 1)
    difference = plain - denoise(x_t, step - 1, cache)
    losses = _losses(difference, model, cache.scores[step - 1], 1.0, reg_weight, variant)
    (gradient,) = torch.autograd.grad(losses[0], router.rows[step - 1])
    return torch.cat([torch.stack(losses).detach(), gradient])


@torch.no_grad()
def step_errors(
    model: Backbone,
    diffusion: GaussianDiffusion | Sampler,
    schedule: Schedule | None,
    noise: Tensor,
    labels: Tensor,
    cfg_scale: float,
) -> tuple[Tensor, Tensor]:
    """The data loss of SDT for a schedule as it is sampled: (T,) over all channels, and (T,) over eps alone.

    At every step it is the mean squared difference per element between the routed and the uncached model
    output from the same x_t, along the routed trajectory; 0 where nothing is reused. Arguments as in
    `sampling.generate`.
    """
    denoise = Denoiser(model, diffusion, labels, cfg_scale)
    cache = None if schedule is None else StaticCache(schedule)
    errors = torch.zeros(2, denoise.num_steps, device=noise.device)

    def compare(state: State, step: int) -> State:
        routed = denoise(state.x, step, cache)
        squares = (denoise(state.x, step) - routed).square()
        errors[:, step] = torch.stack([squares.mean(), model.predicted_noise(squares).mean()])
        return denoise.sampler.step(routed, state, step)

    arrive(compare, denoise.start(noise), executed(denoise.num_steps))
    all_channels, eps_channels = errors
    return all_channels, eps_channels


def _losses(
    difference: Tensor, model: Backbone, scores: Tensor, proxy_weight: Tensor | float, reg_weight: float,
    variant: Variant,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, data loss and score sum of one step."""
    data_loss, score_sum = DATA_LOSSES[variant.data_loss](difference, model), variant.score_sum(scores)
    return proxy_weight * data_loss + reg_weight * score_sum, data_loss, score_sum


def _update(router: Router, optimizer: torch.optim.Optimizer, step: int, loss: Tensor) -> None:
    """Descend on row `step`, the only one with a gradient."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    router.clamp_(step)


@torch.no_grad()
def image_error_proxy(
    model: Backbone,
    diffusion: GaussianDiffusion | Sampler,
    router: Router,
    noise: Tensor,
    labels: Tensor,
    cfg_scale: float,
    threshold: float,
    definition: str = "released",
    thresholded: bool = False,
) -> Tensor:
    """Proxy weights lambda (T,): how much reuse at each step changes the final image.

    They are the mean squared change of x_0 per element, over the whole guided batch, with the soft blend of
    training. (The paper writes a squared norm, a sum over elements: larger by their number, and beta with
    it.) definition: `"paper"` (eq. 9) computes step i alone in full while all others are routed; `"released"`
    switches steps to the router one after the other, noisiest first, and takes each one's change. The last
    entry belongs to the first step, which is never routed: 0. thresholded: scores first become 0 or 1, as in
    straight-through training and in sampling. Raises ValueError for another `definition`.
    """
    if definition not in PROXY_DEFINITIONS:
        raise ValueError(
            f"proxy definition {definition!r} is unknown; choose one of {', '.join(PROXY_DEFINITIONS)}"
        )
    proxy = _released_proxy if definition == "released" else _paper_proxy
    denoise = Denoiser(model, diffusion, labels, cfg_scale)

    def advance(state: State, steps: range, cache: SoftCache | None = None) -> State:
        return arrive(partial(denoise.advance, cache=cache), state, steps)

    scores = router.scores()
    scores = (scores > threshold).to(scores.dtype) if thresholded else scores
    return proxy(advance, denoise.start(noise), scores, threshold)


def _released_proxy(advance: Callable[..., State], state: State, scores: Tensor, threshold: float) -> Tensor:
    """Pass i is routed down to step i and computed after it. All passes continue one shared routed run."""
    proxy_weights = scores.new_zeros(len(scores))
    first_step = len(scores) - 1
    cache = SoftCache(scores, threshold)
    state = advance(state, range(first_step, first_step - 1, -1), cache)  # computes everything in any case
    previous_x0 = advance(state, range(first_step - 1, -1, -1)).x
    for step in reversed(range(first_step)):
        state = advance(state, range(step, step - 1, -1), cache)
        x0 = advance(state, range(step - 1, -1, -1)).x
        proxy_weights[step] = (x0 - previous_x0).square().mean()
        previous_x0 = x0
    return proxy_weights


def _paper_proxy(advance: Callable[..., State], state: State, scores: Tensor, threshold: float) -> Tensor:
    """Pass i leaves the shared routed run before step i, computes this in full, and ends in its own x_0."""
    first_step = len(scores) - 1
    cache = SoftCache(scores, threshold)
    state = advance(state, range(first_step, first_step - 1, -1), cache)
    x0_without = {}
    for step in reversed(range(first_step)):
        one_computed = scores.clone()
        one_computed[step] = 1.0
        own = SoftCache(one_computed, threshold)  # empty, and filled in step i
        x0_without[step] = advance(state, range(step, -1, -1), own).x
        state = advance(state, range(step, step - 1, -1), cache)
    proxy_weights = scores.new_zeros(len(scores))
    for step, x0 in x0_without.items():
        proxy_weights[step] = (x0 - state.x).square().mean()
    return proxy_weights
