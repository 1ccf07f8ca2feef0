"""One denoising step, and the loop over steps, as every part of this project takes them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from backbones.contract import Backbone
from diffusion import FlowEuler, GaussianDiffusion, Sampler, State, as_sampler, create_sampler

PREPARED_BYTES = 2**28  # limit of what `prepare` makes ahead; it serves as many steps as fit
Place = TypeVar("Place")


def check_guidance(model: Backbone, cfg_scale: float) -> None:
    """Raise ValueError where guidance is asked of a model that has no null label."""
    if halves(model, cfg_scale) == 2 and not model.has_null_label:
        why = " (--class-dropout-prob 0)" if not getattr(model, "conditions", "") else ""
        raise ValueError(
            f"guidance {cfg_scale:g} needs a null label, this model was built without{why}; "
            "give --cfg-scale 1 (off)"
        )


def halves(model: Backbone, cfg_scale: float) -> int:
    """Rows of a forward pass for one sample: two under guidance, unless the model embeds its scale."""
    return 1 if cfg_scale == 1.0 or getattr(model, "embeds_guidance", False) else 2


def check_prediction(model: Backbone, sampler: Sampler) -> None:
    """Raise ValueError where a sampler needs what the model does not predict, noise or velocity."""
    predicted, needed = (getattr(one, "predicts", "noise") for one in (model, sampler))
    if predicted != needed:
        raise ValueError(
            f"{type(sampler).__name__} needs a model that predicts {needed}, this one predicts {predicted}; "
            f"take another --sampler{', flow-euler' if predicted == 'velocity' else ''}"
        )


def condition_for(model: Backbone, labels: Tensor, cfg_scale: float) -> Any:
    """What a batch with labels (n,) is conditioned on at a guidance scale."""
    condition = model.condition(labels, halves(model, cfg_scale) == 2)
    return (
        model.with_guidance(condition, cfg_scale) if getattr(model, "embeds_guidance", False) else condition
    )


def sampler_for(model: Backbone, name: str, chain: GaussianDiffusion, eta: float = 0.0) -> Sampler:
    """The sampler by name on a chain; where a model says how its noise levels are spaced, on these.

    Raises ValueError for an unknown name, an eta outside [0, 1], and where the model does not fit.
    """
    sampler = create_sampler(name, chain, eta)
    check_prediction(model, sampler)
    own = getattr(model, "sigmas", None)
    return FlowEuler(own(chain.num_timesteps)) if own and isinstance(sampler, FlowEuler) else sampler


class Denoiser:
    """Backbone, sampler, labels and guidance scale as one function of (x_t, step, cache).

    diffusion: a sampler, or a chain for deterministic DDIM. labels: (n,). A `cfg_scale` of 1 turns guidance
    off and the batch is n; otherwise it is 2n and both halves start from the same noise. The state x_t keeps
    its own dtype, whatever the model's. All that depends on step and label alone is made for many steps at
    once, and once for all trajectories that share a Denoiser. computed: bools (T, B) of a cache policy, the
    cells that it may compute; None: all cells. condition: what `condition_for` makes of the labels; None: it
    is made here.
    """

    def __init__(
        self,
        model: Backbone,
        diffusion: GaussianDiffusion | Sampler,
        labels: Tensor,
        cfg_scale: float,
        computed: Sequence[Sequence[bool]] | None = None,
        condition: Any = None,
    ):
        check_guidance(model, cfg_scale)
        check_prediction(model, as_sampler(diffusion))
        self.model, self.sampler, self.cfg_scale = model, as_sampler(diffusion), cfg_scale
        self.guided, self.num_steps = halves(model, cfg_scale) == 2, self.sampler.num_steps
        self.condition = condition_for(model, labels, cfg_scale) if condition is None else condition
        self.device, self.dtype, self.computed = labels.device, model.dtype, computed
        rows = len(labels) * (2 if self.guided else 1)
        step_bytes = max(1, rows * model.prepared_size * self.dtype.itemsize)
        # For a model that is not frozen, each step prepares its own part, with a gradient.
        self._frozen = model.frozen  # asked once: it looks at every parameter
        most = PREPARED_BYTES // step_bytes if self._frozen else 1
        self.chunk_size = min(self.num_steps, max(1, most))
        self._chunk, self._prepared, self._embedded = -1, [], None

    def start(self, noise: Tensor) -> State:
        """The state before the first step from noise (n, C, H, W); x is (2n, C, H, W) under guidance."""
        return self.sampler.start(torch.cat([noise, noise]) if self.guided else noise)

    def __call__(self, x_t: Tensor, step: int, cache=None) -> Tensor:
        """The model's output (N, C or 2C, H, W) at `step`; tells `cache` the step."""
        if cache is not None:
            cache.step = step
        x = x_t.to(self.dtype)
        if self.guided:
            x = x[: len(x) // 2].repeat(2, *[1] * (x.ndim - 1))  # both halves take the first one's state
        out = self.model.predict(x, self._prepared_at(step), cache)
        return (self._guide(out) if self.guided else out).to(x_t.dtype)

    def _guide(self, out: Tensor) -> Tensor:
        channels = getattr(self.sampler, "guided_channels", None)
        if channels is None:
            return self.model.guide(out, self.cfg_scale)
        return self.model.guide(out, self.cfg_scale, channels)

    def advance(self, state: State, step: int, cache=None, noise: Tensor | None = None) -> State:
        """The state after `step`. noise: x's shape, for a sampler that adds noise."""
        return self.sampler.step(self(state.x, step, cache), state, step, noise)

    def _prepared_at(self, step: int):
        chunk, offset = divmod(step, self.chunk_size)
        if chunk != self._chunk or not self._frozen:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self._frozen):
                self._prepared = []  # freed before the next ones are made
                self._prepared = self._prepare(chunk * self.chunk_size)
            self._chunk = chunk
        return self._prepared[offset]

    def _prepare(self, first: int) -> list:
        """The prepared values of the chunk of steps that begins with step `first`."""
        if self._embedded is None or not self._frozen:
            # All steps at once, since a product of fewer rows may round otherwise.
            # The device fills one scalar at a time: to copy a list of numbers, the host would wait for it.
            steps = map(self.sampler.timestep, range(self.num_steps))
            t = torch.cat([torch.full((1,), one, device=self.device) for one in steps])
            self._embedded = self.model.embed_timesteps(t)
        chosen = slice(first, min(first + self.chunk_size, self.num_steps))
        computed = None if self.computed is None else self.computed[chosen]
        return self.model.prepare(self._embedded[chosen], self.condition, computed)


def walk(
    advance: Callable[[Place, int], Place], place: Place, steps: Iterable[int]
) -> Iterator[tuple[int, Place]]:
    """The loop over denoising steps, the only one: yields (step, the place after it).

    advance: a function that does one step. A place is a sampler's state, alone or with other values.
    """
    for step in steps:
        place = advance(place, step)
        yield step, place


def arrive(advance: Callable[[Place, int], Place], place: Place, steps: Iterable[int]) -> Place:
    """The place after the last of `steps`, or `place` where there are none."""
    for _, place in walk(advance, place, steps):  # noqa: B007, B020
        pass
    return place


def executed(num_steps: int) -> range:
    """All steps in the order of execution, T - 1 to 0."""
    return range(num_steps - 1, -1, -1)
