import pytest
import torch

from schedules.baselines import fora_schedule, full_schedule, random_schedule


@pytest.mark.parametrize(
    ("interval", "computed"),
    [(1, range(10)), (2, (9, 7, 5, 3, 1)), (3, (9, 6, 3, 0)), ("3/2", (9, 7, 6, 4, 3, 1, 0)), (20, (9,))],
)
def test_fora_computes_every_nth_step_from_the_first(interval, computed):
    table = fora_schedule(10, 4, interval).compute
    assert [step for step in range(10) if table[step].all()] == sorted(computed)
    assert (table.all(1) == table.any(1)).all()


def computed_steps(schedule) -> list[int]:
    return [step for step in reversed(range(schedule.num_steps)) if schedule.compute[step].all()]


@pytest.mark.parametrize(("num_steps", "interval"), [(20, 2), (20, 3), (10, 3), (10, 4), (7, 1), (50, 4)])
def test_anchored_at_the_last_step_it_is_the_released_fora(num_steps, interval):
    schedule = fora_schedule(num_steps, 4, interval, anchor="last")
    released = [s for s in reversed(range(num_steps)) if s == num_steps - 1 or s % interval == 0]
    assert computed_steps(schedule) == released
    assert schedule.source == f"FORA, interval {interval}, anchored at the last step"


@pytest.mark.parametrize(("num_steps", "interval"), [(20, 3), (10, 4), (50, 6), (9, 2)])
def test_two_first_steps_are_the_released_taylorseer(num_steps, interval):
    """Its counter: full while in the first two steps or `interval - 1` steps after the last full one."""
    released, since_full = [], 0
    for k in range(num_steps):
        if k < 2 or since_full == interval - 1:
            released.append(num_steps - 1 - k)
            since_full = 0
        else:
            since_full += 1
    assert computed_steps(fora_schedule(num_steps, 4, interval, first_steps=2)) == released


def test_numbers_of_rows_as_published():
    """HarmoniCa's tables count FORA at T = 20, N = 2 as 50.00 %; the released code computes 11 rows."""
    assert fora_schedule(20, 56, 2).cur == 0.5
    assert len(computed_steps(fora_schedule(20, 56, 2, anchor="last"))) == 11
    assert len(computed_steps(fora_schedule(20, 56, 3, anchor="last"))) == 8
    assert len(computed_steps(fora_schedule(20, 56, "9/4", anchor="last"))) == 10
    assert len(computed_steps(fora_schedule(20, 56, "9/4", first_steps=2))) == 10


def test_unknown_rules_are_refused():
    with pytest.raises(ValueError, match="anchor 'middle' is unknown; choose one of first, last"):
        fora_schedule(10, 4, 2, anchor="middle")
    for first_steps in (0, 11):
        with pytest.raises(ValueError, match=rf"first_steps {first_steps} is outside 1 .. 10"):
            fora_schedule(10, 4, 2, first_steps=first_steps)


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
