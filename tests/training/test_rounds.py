"""Rounds of HarmoniCa and Learning-to-Cache: what is drawn for them, shared among ranks, and refreshed."""

import pytest
import torch

from common.distributed import Processes
from diffusion import create_diffusion
from training.rounds import LABEL_DROPOUT, ROUNDS, Pairs, Trajectories
from training.settings import HarmonicaSettings, L2CSettings, TrainSettings


def rounds_of(model, method, rank: int = 0, world_size: int = 1, **settings):
    settings = {"num_sampling_steps": "4", "global_batch_size": 8} | settings
    settings = TrainSettings(method, **settings)
    processes = Processes(rank, world_size, torch.device("cpu"))
    return ROUNDS[method.name](settings, processes, model, create_diffusion("4"), None)


@pytest.fixture
def data(tiny_model, monkeypatch) -> torch.utils.data.TensorDataset:
    """Twenty samples of the tiny model's shape under the name `given`."""
    samples = torch.randn(20, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    data = torch.utils.data.TensorDataset(samples, torch.arange(20) % tiny_model.num_classes)
    monkeypatch.setattr("training.rounds.open_data", lambda *_: data)
    return data


def test_samples_are_those_of_seed_round_and_index(tiny_model):
    """Four trajectories: two ranks draw the halves of what one draws; rounds and seeds differ."""
    one = rounds_of(tiny_model, HarmonicaSettings())
    noise, labels = one.draw(one.generators(3))
    assert noise.shape == (4, 4, 4, 4)
    parts = [rounds_of(tiny_model, HarmonicaSettings(), rank, 2) for rank in (0, 1)]
    drawn = [part.draw(part.generators(3)) for part in parts]
    assert torch.equal(torch.cat([own for own, _ in drawn]), noise)
    assert torch.equal(torch.cat([own for _, own in drawn]), labels)
    assert not torch.equal(one.draw(one.generators(4))[0], noise)
    other = rounds_of(tiny_model, HarmonicaSettings(), global_seed=43)
    assert not torch.equal(other.draw(other.generators(3))[0], noise)


def test_a_trajectory_is_a_round(tiny_model):
    rounds = rounds_of(tiny_model, HarmonicaSettings(max_steps=9))
    training = rounds.new_training()
    updates = list(rounds.run(training))
    assert [update and update.step for update in updates] == [None, 2, 1, 0]
    assert training.steps_per_round == 4
    assert rounds.total_steps == 9
    assert rounds_of(tiny_model, HarmonicaSettings(epochs=2)).total_steps == 8


@pytest.mark.parametrize(("interval", "due"), [(4, [0, 4, 8, 12, 16]), (7, [0, 8, 16]), (500, [0])])
def test_lambda_is_refreshed_every_so_many_steps(tiny_model, monkeypatch, interval, due):
    """At the first trajectory that begins after a multiple of them."""
    refreshed = []

    def proxy(*_) -> torch.Tensor:
        refreshed.append(training.train_steps)
        return torch.full((4,), 2.0)

    monkeypatch.setattr("training.rounds.image_error_proxy", proxy)
    rounds = rounds_of(tiny_model, HarmonicaSettings(lambda_c=interval))
    training = rounds.new_training()
    for step in range(0, 20, 4):
        training.train_steps = step
        next(iter(rounds.run(training)))
    assert refreshed == due
    assert training.proxy_weights.tolist() == [2.0] * 4


def test_lambda_stays_one_without_a_proxy(tiny_model):
    rounds = rounds_of(tiny_model, HarmonicaSettings(proxy="none"))
    training = rounds.new_training()
    updates = [update for update in rounds.run(training) if update]
    assert training.proxy_weights.tolist() == [1.0] * 4
    for update in updates:
        expected = update.data_loss + 7e-8 * update.score_sum
        assert update.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_flags_make_the_variant(tiny_model):
    plain = rounds_of(tiny_model, HarmonicaSettings()).variant
    assert plain.branch_costs is None
    assert not any((plain.straight_through, plain.one_step))
    assert plain.data_loss == "all"
    others = {"cost": "macs", "data_loss": "eps", "router_train": "ste", "rollout": "one-step"}
    variant = rounds_of(tiny_model, HarmonicaSettings(**others)).variant
    assert variant.data_loss == "eps"
    assert variant.straight_through
    assert variant.one_step
    macs = torch.tensor(tiny_model.branch_macs, dtype=torch.float32)
    torch.testing.assert_close(variant.branch_costs, macs / macs.mean())
    assert isinstance(rounds_of(tiny_model, HarmonicaSettings()), Trajectories)


# ---- Learning-to-Cache -----------------------------------------------------------------------------


@pytest.mark.usefixtures("data")
def test_groups_are_equal_parts_of_the_batch(tiny_model, monkeypatch):
    """In the order of the data, each with its own step; ranks share them."""
    seen = {}

    def note(*given) -> None:
        seen[rank, world_size] = given[4]  # the pairs

    monkeypatch.setattr("training.rounds.train_pairs", note)
    for rank, world_size in ((0, 1), (0, 2), (1, 2)):
        rounds = rounds_of(tiny_model, L2CSettings(data="given", groups=4), rank, world_size)
        list(rounds.run(rounds.new_training()))
    pairs = seen[0, 1]
    assert [len(pair.x_0) for pair in pairs] == [2] * 4
    both = seen[0, 2] + seen[1, 2]
    for one, other in zip(pairs, both, strict=True):
        assert one.step == other.step
        for name in ("x_0", "noise", "labels"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    assert {pair.step for pair in pairs} <= {1, 3}


def test_labels_are_dropped_at_the_published_rate(tiny_model, data):
    rounds = rounds_of(tiny_model, L2CSettings(data="given", groups=1))
    null, x = tiny_model.num_classes, data.tensors[0][:1].expand(400, -1, -1, -1)
    generators = [torch.Generator().manual_seed(seed) for seed in range(400)]
    pair = rounds._pair(generators, x, torch.zeros(400, dtype=torch.long), 1)
    dropped = (pair.labels == null).float().mean().item()
    assert dropped == pytest.approx(LABEL_DROPOUT, abs=0.05)
    assert set(pair.labels.tolist()) == {0, null}


@pytest.mark.usefixtures("data")
def test_odd_rows_always_compute(tiny_model):
    router = rounds_of(tiny_model, L2CSettings(data="given")).new_router()
    assert router.logits[1::2].isinf().all()
    assert router.logits[::2].isfinite().all()
    every_row = rounds_of(tiny_model, L2CSettings(data="given", every_row=True)).new_router()
    assert every_row.logits.isfinite().all()


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize(("batch", "steps"), [(8, 6), (20, 3), (40, 3)])
def test_epochs_are_passes_of_the_data(tiny_model, batch, steps):
    """20 samples are two batches of 8, one of 20, and one at least."""
    rounds = rounds_of(tiny_model, L2CSettings(data="given", groups=1, epochs=3), global_batch_size=batch)
    assert rounds.total_steps == steps
    assert isinstance(rounds, Pairs)
