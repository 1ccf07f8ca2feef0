"""The request for a schedule: model, settings of sampling, number of steps."""

from dataclasses import dataclass, field

from backbones.contract import Backbone
from router import Schedule
from sampling.loop import Rule, Trajectory
from sampling.settings import SamplingSettings


@dataclass(frozen=True)
class Request:
    """A schedule is built for this model and sampling. num_steps: number of steps of the uncached chain.

    reuse: how reused branches get their output, a key of `schedules.table.REUSES`, or "". notes: lines for
    the user, which the function that builds the schedule may add.
    """

    model: Backbone
    model_name: str | None
    sampling: SamplingSettings
    num_steps: int
    reuse: str = ""
    notes: list[str] = field(default_factory=list)

    def trajectory(self, schedule: Schedule | Rule | None = None) -> Trajectory:
        """What is sampled to plan a schedule, to fit its weights or to find a tolerance."""
        return self.sampling.trajectory(self.model, self.sampling.chain(self.model), schedule)
