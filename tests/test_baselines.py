import pytest
import torch

from baselines import fora_schedule, full_schedule, random_schedule


@pytest.mark.parametrize(
    ("interval", "computed"),
    [(1, range(10)), (2, (9, 7, 5, 3, 1)), (3, (9, 6, 3, 0)), ("3/2", (9, 7, 6, 4, 3, 1, 0)), (20, (9,))],
)
def test_fora_computes_every_nth_step_from_the_first(interval, computed):
    table = fora_schedule(10, 4, interval).compute
    assert [step for step in range(10) if table[step].all()] == sorted(computed)
    assert (table.all(1) == table.any(1)).all()


@pytest.mark.parametrize("interval", [0.5, 0, -2])
def test_interval_below_one_is_refused(interval):
    with pytest.raises(ValueError, match="below 1; 1 computes every step"):
        fora_schedule(10, 4, interval)


def test_random_schedule_has_its_cur_and_is_nested():
    low, high = (random_schedule(10, 24, cur, seed=3) for cur in (0.25, 0.5))
    assert low.cur == pytest.approx(0.25)
    assert high.cur == pytest.approx(0.5)
    assert not (~low.compute & high.compute).any()  # what is reused at the lower CUR is reused at the higher
    assert not torch.equal(low.compute, random_schedule(10, 24, 0.25, seed=4).compute)
    assert random_schedule(10, 24, 0.9).cur == pytest.approx(0.9)
    with pytest.raises(ValueError, match=r"CUR 0.95 is outside 0 .. 0.9"):
        random_schedule(10, 24, 0.95)


def test_full_schedule_reuses_nothing():
    assert full_schedule(5, 3).cur == 0
