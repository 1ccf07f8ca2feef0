"""The state of a router's training: what is trained, and what a checkpoint has to hold of it."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from common import distributed
from router import Router, Schedule
from training.target import RegWeightControl, Target

ADAM = ("step", "exp_avg", "exp_avg_sq")  # torch's names of Adam's state of a parameter


class State:
    """Tensors and plain values by name: the one place that copies them out for a checkpoint and back in.

    What is added is read and written where it lives, at every call: nothing is kept here.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], None]]] = {}

    def add(self, name: str, read: Callable[[], Tensor], write: Callable[[Tensor], None]) -> None:
        """A tensor that `read` returns. `write` gets one of the same shape, dtype and device."""
        self._entries[name] = read, write

    def add_attribute(self, owner: object, attribute: str, name: str | None = None) -> None:
        """A parameter, tensor or number that is an attribute; `name` in the file, by default the same."""

        def write(tensor: Tensor) -> None:
            value = getattr(owner, attribute)
            if isinstance(value, nn.Parameter):
                with torch.no_grad():
                    value.copy_(tensor)
            elif isinstance(value, Tensor):
                setattr(owner, attribute, tensor.to(value.dtype))
            else:
                setattr(owner, attribute, type(value)(tensor.item()))

        self.add(name or attribute, lambda: _as_tensor(getattr(owner, attribute)), write)

    def add_adam(self, optimizer: torch.optim.Optimizer, parameters: nn.Parameter | Sequence) -> None:
        """Adam's state of one parameter; of several parameters of one shape, stacked in their order."""
        alone = isinstance(parameters, nn.Parameter)

        def of(parameter: nn.Parameter, key: str) -> Tensor:
            """Zero before the first update, of which torch keeps nothing."""
            like = parameter.new_zeros(()) if key == "step" else torch.zeros_like(parameter)
            return optimizer.state.get(parameter, {}).get(key, like)

        def read(key: str) -> Tensor:
            return of(parameters, key) if alone else torch.stack([of(one, key) for one in parameters])

        def write(key: str, tensor: Tensor) -> None:
            pairs = [(parameters, tensor)] if alone else zip(parameters, tensor, strict=True)
            for parameter, one in pairs:
                optimizer.state[parameter][key] = one.clone()

        for key in ADAM:
            self.add(key, lambda key=key: read(key), lambda tensor, key=key: write(key, tensor))

    def tensors(self) -> dict[str, Tensor]:
        """A copy of everything as it is now."""
        return {name: read().detach().clone() for name, (read, _) in self._entries.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` returned. Raises ValueError, changing nothing, for another state's."""
        now = self.tensors()
        for name, tensor in now.items():
            if name not in tensors:
                raise ValueError(f"--resume: the checkpoint holds no {name!r}; start a new run")
            found, wanted = tuple(tensors[name].shape), tuple(tensor.shape)
            if found != wanted:
                raise ValueError(
                    f"--resume: {name!r} of the checkpoint has the shape {found}, this training's {wanted}; "
                    "start a new run"
                )
        for name, (_, write) in self._entries.items():
            write(tensors[name].to(now[name].device, now[name].dtype, copy=True))


def _as_tensor(value: Tensor | float) -> Tensor:
    """Numbers in 64 bits; bools as bytes."""
    if isinstance(value, Tensor):
        return value.to(torch.uint8) if value.dtype == torch.bool else value
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


class Training:
    """What every method trains: a schedule that sampling would take, after so many train steps.

    steps_per_round: train steps of a round, which a resumed run repeats as a whole. state: everything that
    the coming round depends on; a subclass adds its own.
    """

    def __init__(self, steps_per_round: int, target: Target | None):
        self.steps_per_round, self.target = steps_per_round, target
        self.train_steps = 0
        self.state = State()
        self.state.add_attribute(self, "train_steps")

    @property
    def round(self) -> int:
        """The round that the next train step belongs to."""
        return self.train_steps // self.steps_per_round

    @property
    def between_rounds(self) -> bool:
        return self.train_steps % self.steps_per_round == 0

    @property
    def schedule(self) -> Schedule:
        """What sampling would compute now."""
        raise NotImplementedError

    @property
    def router_to_save(self) -> Router:
        raise NotImplementedError

    @property
    def target_met(self) -> bool:
        return self.target is None or self.target.met(self.schedule)

    def facts(self) -> dict[str, object]:
        """What the file of a router says of its training beyond its settings."""
        return {}

    def figures(self) -> dict[str, object]:
        """What a line of metrics.jsonl holds beyond the losses."""
        return {}

    def round_done(self, total_steps: int) -> None:
        """Called between two rounds of a run of `total_steps` train steps."""


class RowTraining(Training):
    """A router whose rows are trained one by one, its optimizer, lambda and beta.

    reg_weight: beta; with a target it is only the start, and beta is moved until the schedule at `threshold`
    meets the target. rows_per_step: the rows that a train step updates, on average.
    """

    def __init__(
        self,
        router: Router,
        lr: float,
        device: torch.device,
        steps_per_round: int,
        threshold: float,
        reg_weight: float,
        target: Target | None = None,
        rows_per_step: float = 1.0,
    ):
        super().__init__(steps_per_round, target)
        self.router, self.threshold = router.to(device), threshold
        self.rows_per_step = rows_per_step
        self._fixed_reg_weight = reg_weight
        self._control = target and RegWeightControl(target, threshold, math.log(reg_weight))
        self.optimizer = torch.optim.AdamW(self.router.parameters(), lr=lr, weight_decay=0.0, fused=True)
        self.proxy_weights = torch.ones(router.num_steps, device=device)
        self.state.add_adam(self.optimizer, list(self.router.rows))
        self.state.add("logits", lambda: self.router.logits, self.router.set_logits)
        self.state.add_attribute(self, "proxy_weights")
        if self._control:
            self.state.add_attribute(self._control, "log_weight", "log_reg_weight")

    @property
    def reg_weight(self) -> float:
        """beta"""
        return self._control.reg_weight if self._control else self._fixed_reg_weight

    @property
    def schedule(self) -> Schedule:
        return self.router.schedule(self.threshold)

    @property
    def router_to_save(self) -> Router:
        return self.router

    def facts(self) -> dict[str, object]:
        return {"reg_weight": self.reg_weight}

    def figures(self) -> dict[str, object]:
        return {"reg_weight": self.reg_weight, "proxy_weights": self.proxy_weights.tolist()}

    def round_done(self, total_steps: int) -> None:
        """Move beta towards the target."""
        if self._control:
            per_row = [
                steps * self.rows_per_step / self.router.num_steps
                for steps in (self.steps_per_round, total_steps - self.train_steps)
            ]
            self._control.update(self.router, self.optimizer, *per_row)
            self._control.log_weight = distributed.from_main(self._control.log_weight)  # to the last bit
