"""A training's state: everything goes into a checkpoint and comes back, under the names that files have."""

import pytest
import torch
from torch import nn

from backbones.loading import build_model
from end_to_end.rounds import EndToEndTraining
from router import Router
from training.state import RowTraining, State
from training.target import Target

ROW_NAMES = {"train_steps", "step", "exp_avg", "exp_avg_sq", "logits", "proxy_weights"}
OWN_NAMES = {
    "train_steps",
    "step",
    "exp_avg",
    "exp_avg_sq",
    "tables",
    "part",
    "current",
    "fitted",
    "scale",
    "moves",
}


def rows(seed: int, target: Target | None = None) -> RowTraining:
    router = Router(4, 24, torch.Generator().manual_seed(seed))
    return RowTraining(router, 0.1, torch.device("cpu"), 4, 0.1, 1e-3, target)


def own(seed: int, num_candidates: int = 3) -> EndToEndTraining:
    training = EndToEndTraining(num_candidates, (4, 24), 3, 0.1, None, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    training.candidates[:, :-1] = torch.rand(num_candidates, 3, 24, generator=generator) < 0.5
    training.fitted = torch.rand(training.fitted.shape, generator=generator)
    training.scale = torch.rand(training.scale.shape, generator=generator)
    return training


def step(training) -> None:
    """An update whose gradient depends on the parameters, so that all of Adam's state matters."""
    parameters = [training.router.rows[1]] if isinstance(training, RowTraining) else [training.moves]
    for parameter in parameters:
        parameter.grad = torch.sin(parameter.detach()) + 0.5
    training.optimizer.step()


@pytest.mark.parametrize("make", [rows, own])
def test_a_loaded_state_goes_on_in_the_same_bits(make):
    training, other = make(1), make(2)
    for _ in range(3):
        step(training)
    training.train_steps = 7
    saved = training.state.tensors()
    step(training)
    other.state.load(saved)
    assert other.train_steps == 7
    assert other.round == 7 // training.steps_per_round
    assert torch.equal(other.schedule.compute, other.schedule.compute)
    step(other)
    later, resumed = training.state.tensors(), other.state.tensors()
    later.pop("train_steps"), resumed.pop("train_steps")
    assert later.keys() == resumed.keys()
    assert all(torch.equal(later[name], resumed[name]) for name in later)
    assert not torch.equal(saved["exp_avg"], later["exp_avg"])  # a copy, which later steps do not touch


def test_names_and_types_in_a_file():
    target = Target("cur", 0.4, build_model("DiT-digits/2"), 4)
    assert rows(1).state.tensors().keys() == ROW_NAMES
    with_target = rows(1, target).state.tensors()
    assert with_target.keys() == ROW_NAMES | {"log_reg_weight"}
    assert with_target["log_reg_weight"].dtype == torch.float64
    assert with_target["step"].shape == (3,)
    tensors = own(1).state.tensors()
    assert tensors.keys() == OWN_NAMES
    assert tensors["tables"].dtype == torch.uint8
    assert tensors["part"].dtype == torch.float64
    assert tensors["current"].dtype == tensors["train_steps"].dtype == torch.int64
    assert tensors["step"].shape == ()


def test_types_come_back():
    training = own(1)
    training.current, training.exchange_share = 2, 0.005
    other = own(2)
    other.state.load(training.state.tensors())
    assert (other.current, other.exchange_share) == (2, 0.005)
    assert isinstance(other.current, int)
    assert other.candidates.dtype == torch.bool
    assert torch.equal(other.candidates, training.candidates)
    assert isinstance(other.moves, nn.Parameter)
    assert other.optimizer.param_groups[0]["params"][0] is other.moves


def test_the_weight_comes_back():
    target = Target("cur", 0.4, build_model("DiT-digits/2"), 4)
    training, other = rows(1, target), rows(1, target)
    training.round_done(100)
    assert training.reg_weight != other.reg_weight
    other.state.load(training.state.tensors())
    assert training.reg_weight == other.reg_weight
    assert other.facts() == {"reg_weight": training.reg_weight}


def test_a_state_of_another_shape_or_with_less_is_refused_as_it_is():
    training, before = own(1), own(1).state.tensors()
    shapes = (
        r"'tables' of the checkpoint has the shape \(2, 4, 24\), this training's \(3, 4, 24\); start a new"
    )
    with pytest.raises(ValueError, match=shapes):
        training.state.load(own(2, num_candidates=2).state.tensors())
    tensors = own(2).state.tensors()
    del tensors["scale"]
    with pytest.raises(ValueError, match="the checkpoint holds no 'scale'; start a new run"):
        training.state.load(tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in training.state.tensors().items())


def test_what_is_loaded_is_a_copy():
    class Holder:
        value, count, rate = torch.zeros(3), 1, 0.5

    holder, state = Holder(), State()
    for name in ("value", "count", "rate"):
        state.add_attribute(holder, name, f"{name}_in_the_file")
    tensors = state.tensors()
    state.load({name: tensor + 1 for name, tensor in tensors.items()})
    assert holder.value.tolist() == [1, 1, 1]
    assert (holder.count, holder.rate) == (2, 1.5)
    state.load(tensors)
    holder.value += 5
    assert tensors["value_in_the_file"].tolist() == [0, 0, 0]
