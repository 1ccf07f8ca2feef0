"""A target speed instead of a regularization weight: beta is adjusted until the schedule meets the target.

You usually know the speed you want, not the weight. A larger beta makes branches dearer and the schedule
faster. So beta is raised while the schedule saves too little and lowered while it saves too much: dual ascent
on the constraint "this much is saved". A schedule follows beta with a long delay (a logit moves by at most
about the learning rate per update), and a logit that has reached its limit hardly comes back. Beta therefore
follows the schedule extrapolated from Adam's moments, not the present one.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from backbones.contract import Backbone
from router import LOGIT_LIMIT, Router, Schedule

TOLERANCE = 0.01  # one point of CUR, or of the share of MACs that is saved
EXTRA_STEPS = 0.25  # share of its steps by which a run goes on that has not met its target
_GAIN = 0.25  # change of log beta per update, times the square root of the missing share
_LOG_WEIGHTS = math.log(1e-15), math.log(1e6)  # limits of log beta, beyond which nothing changes
_LEAST_HORIZON = 10  # updates: the memory of Adam's first moment


@dataclass(frozen=True)
class Target:
    """A CUR, or a speed-up by MACs. Raises ValueError for what no schedule reaches."""

    kind: str  # "cur" or "speedup"
    value: float
    model: Backbone
    num_steps: int
    threshold: float = 0.1
    even_rows: bool = False  # Learning-to-Cache reuses at even steps alone

    def __post_init__(self) -> None:
        lowest = 1 / (1 + math.exp(LOGIT_LIMIT))
        if self.threshold <= lowest:
            raise ValueError(
                f"--ste-threshold {self.threshold:g} reuses nothing: scores stay above {lowest:.2g}; with a "
                "target give more"
            )
        most = (self.num_steps // 2 if self.even_rows else self.num_steps - 1) / self.num_steps
        cacheable = sum(self.model.branch_macs) / (sum(self.model.branch_macs) + self.model.other_macs)
        least, most = (0, most) if self.kind == "cur" else (1, 1 / (1 - most * cacheable))
        if not least < self.value < most:
            raise ValueError(
                f"--target-{self.kind} {self.value:g} is outside {least} .. {most:.3g}, what "
                f"{self.num_steps} steps allow" + (" at even steps alone" if self.even_rows else "")
            )

    @property
    def saved(self) -> float:
        """The share of cells or MACs to save."""
        return self.value if self.kind == "cur" else 1 - 1 / self.value

    def missing(self, schedule: Schedule) -> float:
        """The share that the schedule still has to save; negative where it saves too much."""
        saved = schedule.cur if self.kind == "cur" else 1 - 1 / schedule.speedup_macs(self.model)
        return self.saved - saved

    def met(self, schedule: Schedule) -> bool:
        return abs(self.missing(schedule)) <= TOLERANCE


class RegWeightControl:
    """Beta, adjusted after every round of training. Its only state is `log_weight`, log beta."""

    def __init__(self, target: Target, threshold: float, log_weight: float):
        self.target, self.threshold, self.log_weight = target, threshold, log_weight

    def update(
        self, router: Router, optimizer: torch.optim.AdamW, updates: float, updates_left: float
    ) -> None:
        """Adjust beta after a round with `updates` of every row on average, before `updates_left` more."""
        extrapolated = Router.from_logits(_extrapolated(router, optimizer, updates_left))
        missing = self.target.missing(extrapolated.schedule(self.threshold))
        if abs(missing) > TOLERANCE / 4:  # the root: small lasting errors are corrected, too
            change = _GAIN * updates * math.copysign(math.sqrt(abs(missing)), missing)
            self.log_weight = min(max(self.log_weight + change, _LOG_WEIGHTS[0]), _LOG_WEIGHTS[1])

    @property
    def reg_weight(self) -> float:
        return math.exp(self.log_weight)


def _extrapolated(router: Router, optimizer: torch.optim.AdamW, updates_left: float) -> Tensor:
    """The logits (T, B) extrapolated by Adam's moments, over half their range or to the training's end."""
    (group,) = optimizer.param_groups
    (beta1, beta2), lr = group["betas"], group["lr"]
    horizon = min(LOGIT_LIMIT / lr, max(updates_left, _LEAST_HORIZON))
    logits = router.logits.detach().clone()
    for row, parameter in enumerate(router.rows):
        state = optimizer.state.get(parameter)
        if state and state["step"] > 0:
            count = float(state["step"])
            mean, square = state["exp_avg"] / (1 - beta1**count), state["exp_avg_sq"] / (1 - beta2**count)
            logits[row] -= horizon * lr * mean / (square.sqrt() + group["eps"])
    return logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
