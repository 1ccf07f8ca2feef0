"""What a study keeps: lines that a killed writer cannot spoil, routers by name, and what counts as done."""

import os
from unittest import mock

import pytest
import torch

from router import Router, load_router
from study.plan import Row, Training, tasks
from study.run import FULL
from study.store import Records, Study, router_hash

WEIGHTS = f"{'a' * 16}-{'b' * 64}"


@pytest.fixture
def records(tmp_path):
    return Records(tmp_path / "rows.jsonl")


def test_no_file_holds_no_records(records):
    assert records.read() == {}


def test_the_last_record_of_an_id_counts(records):
    for record in ({"id": "a", "n": 1}, {"id": "b", "n": 2}, {"id": "a", "n": 3}):
        records.add(record)
    assert records.read() == {"a": {"id": "a", "n": 3}, "b": {"id": "b", "n": 2}}
    records.tidy(["b", "absent"])
    assert [line[:9] for line in records.path.read_text().splitlines()] == ['{"id": "b', '{"id": "a']
    assert records.read()["a"]["n"] == 3


@pytest.mark.parametrize("half", ['{"id": "b", "n', '"b', "{"])
def test_half_a_line_of_a_killed_writer_is_passed_over_and_removed(records, half):
    records.add({"id": "a"})
    with open(records.path, "a") as file:
        file.write(half)
    assert records.read().keys() == {"a"}
    records.add({"id": "c"})
    assert records.path.read_text() == '{"id": "a"}\n{"id": "c"}\n'


def test_whole_line_without_its_newline_is_kept(records):
    records.path.write_text('{"id": "a"}')
    assert records.read().keys() == {"a"}
    records.add({"id": "b"})
    assert records.read().keys() == {"a", "b"}


@pytest.mark.parametrize("line", ['{"id": "b", "n', "[]", '{"n": 1}'])
def test_damaged_line_is_named(records, line):
    records.path.write_text(f'{{"id": "a"}}\n{line}\n{{"id": "c"}}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2 is no JSON object with an id"):
        records.read()


def test_what_cannot_be_written_leaves_what_was_there(records):
    records.add({"id": "a"})
    with pytest.raises(ValueError, match="only finite numbers"):
        records.add({"id": "b", "n": float("nan")})
    full = mock.patch.object(os, "fsync", side_effect=OSError(28, "No space left"))
    with full, pytest.raises(OSError, match="cannot be written"):
        records.tidy(["a"])
    assert records.path.read_text() == '{"id": "a"}\n'


# ---- what is done ----------------------------------------------------------------------------------


@pytest.fixture
def done(tmp_path):
    """A study with a training, an uncached row and a row of its router, all done; and its tasks."""
    row = Row("mine", 3, {"accelerate_method": "dynamiclayer"}, Training("one", {"lr": 0.1}), "2", 0)
    study, planned = Study(tmp_path), tasks([row], tmp_path, FULL)
    training, uncached, own = planned
    router = Router.from_logits(torch.tensor([[-5.0, 5.0]] * 3))
    router.info = {"settings": {"weights": WEIGHTS}, "threshold": 0.1}
    router.weights = torch.zeros(3, 2, 1)
    study.add_router(training, router)
    for task in (uncached, own):
        hashed = study.router_hash(task)
        study.rows.add({"id": task.id, "command": task.command, "router_hash": hashed, "weights": WEIGHTS})
    return Study(tmp_path), planned


def test_all_is_done_of_these_settings_and_weights(done):
    study, planned = done
    assert study.done(planned, WEIGHTS) == {task.id for task in planned}
    assert study.done(planned, f"{'c' * 16}-{'b' * 64}") == set()


def test_records_from_before_all_weights_were_hashed_count(done):
    study, planned = done
    row = study.rows.read()[planned[2].id]
    study.rows.add(row | {"weights": "a" * 16})
    assert planned[2].id in study.done(planned, WEIGHTS)


def test_other_settings_are_not_done(done, tmp_path):
    study, _ = done
    row = Row("mine", 3, {"accelerate_method": "l2c"}, Training("one", {"lr": 0.2}), "2", 0)
    assert study.done(tasks([row], tmp_path, FULL), WEIGHTS) == {"uncached-T3"}


@pytest.mark.parametrize("change", ["logits", "weights", "plain reuse", "threshold"])
def test_row_of_a_router_that_was_trained_anew_is_not_done(done, change):
    study, planned = done
    router = load_router(f"{study.folder}/routers.safetensors:one")
    if change == "logits":
        router.set_logits(router.logits + 0.25)
    elif change == "weights":
        router.weights = torch.ones(3, 2, 1)
    elif change == "plain reuse":
        router.weights = None
    else:
        router.info["threshold"] = 0.2
    study.add_router(planned[0], router)
    assert Study(study.folder).done(planned, WEIGHTS) == {"one", "uncached-T3"}


def test_hash_does_not_depend_on_where_a_router_lies(done):
    study, planned = done
    router = load_router(f"{study.folder}/routers.safetensors:one")
    assert router_hash(router) == study.router_hash(planned[2])
    assert study.router_hash(planned[1]) is None
