"""A method for a model: its chain, which branches it computes, how it reuses the others.

`schedules/table.py` lists the methods.
"""

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from backbones.contract import Backbone
from diffusion import GaussianDiffusion, create_diffusion
from router import Schedule
from sampling.loop import Trajectory
from sampling.settings import SamplingSettings
from schedules.dynamic import Rule
from schedules.request import Request
from schedules.settings import MethodSettings
from schedules.table import METHODS, REUSES


@dataclass(frozen=True)
class Method:
    """A method for one model and one setting of sampling.

    schedule: None where every branch is computed; the rule of a cache that decides while it samples, which
    counts what it decides. notes: lines for the user on how it was made.
    """

    name: str
    diffusion: GaussianDiffusion
    schedule: Schedule | Rule | None
    notes: tuple[str, ...] = ()

    def trajectory(self, model: Backbone, sampling: SamplingSettings) -> Trajectory:
        """The method on `model`, with the guidance and the sampler of `sampling`."""
        return sampling.trajectory(model, self.diffusion, self.schedule)

    @property
    def dynamic(self) -> bool:
        """Whether a cache decides while it samples."""
        return isinstance(self.schedule, Rule)

    def speedup_macs(self, model: Backbone, num_steps: int) -> float:
        """MACs of the uncached chain of `num_steps` over this method's; of a rule on average so far."""
        cached = 1.0 if self.schedule is None else self.schedule.speedup_macs(model)
        return cached * num_steps / self.diffusion.num_timesteps

    def with_reuse_weights(self, weights: Tensor | None) -> "Method":
        """The same with these weights of reuse (T, B, K); None: as it is."""
        if weights is None:
            return self
        return dataclasses.replace(self, schedule=dataclasses.replace(self.schedule, weights=weights))


def uncached(model: Backbone, sampling: SamplingSettings) -> Method:
    """The method with which all are compared: every branch of every step computed."""
    return Method("none", sampling.chain(model), None)


def load_method(
    settings: MethodSettings,
    model: Backbone,
    sampling: SamplingSettings,
    model_name: str | None = None,
    solve: bool = True,
) -> Method:
    """The method of `settings` for a model and how it is sampled.

    model_name: the value of `--model`, which a router must have been trained for; None: any. solve: also
    solve the weights of a calibrated method; else `solved` does. Raises ValueError or FileNotFoundError, in
    one line, where the values do not fit the model or the chain.
    """
    row, values = METHODS[settings.base], settings.base_values()
    diffusion = sampling.chain(model)
    request = Request(model, model_name, sampling, diffusion.num_timesteps, settings.reuse)
    if row.respacing:
        diffusion = create_diffusion(row.respacing(request, **values), learn_sigma=model.learn_sigma)
    schedule = row.schedule(request, **values) if row.schedule else None
    method = Method(settings.name, diffusion, schedule, tuple(request.notes))
    if not settings.reuse or (REUSES[settings.reuse].by_sampling and not solve):
        return method
    return solved(settings, model, sampling, method)


def calibration(settings: MethodSettings) -> dict[str, int]:
    """The values that a calibrated method's weights depend on; empty for any other method."""
    by_sampling = settings.reuse and REUSES[settings.reuse].by_sampling
    return settings.reuse_values() if by_sampling else {}


def solved(settings: MethodSettings, model: Backbone, sampling: SamplingSettings, method: Method) -> Method:
    """The method with its weights of reuse, forecast or calibrated."""
    request = Request(model, None, sampling, method.diffusion.num_timesteps)
    schedule = REUSES[settings.reuse].apply(request, method.schedule, **settings.reuse_values())
    return dataclasses.replace(method, schedule=schedule)
