"""What a schedule is built for: model, setting of sampling, number of steps."""

from dataclasses import dataclass, field

from backbones.contract import Backbone
from sampling.settings import SamplingSettings


@dataclass(frozen=True)
class Request:
    """What a schedule is built for. num_steps: those of the uncached chain.

    notes: lines for the user, which the function that builds the schedule may add.
    """

    model: Backbone
    model_name: str | None
    sampling: SamplingSettings
    num_steps: int
    notes: list[str] = field(default_factory=list)
