"""What every command's flags take: numbers within what torch can hold, seeds of 64 bits."""

import argparse
import contextlib
import importlib

import pytest
import torch
from commands import error_line, run

from common import cli

COMMANDS = (
    "train_router", "sample", "sample_ddp", "evaluate", "benchmark", "demo", "study.measure", "study.run",
    "study.precisions", "examples.digits.train_dit", "examples.digits.classifier", "examples.digits.evaluate",
)  # fmt: skip
LABELS = ("sample", "labels")  # any integers: which ones fit is known with the model


def numeric_flags() -> list[tuple[str, argparse.Action]]:
    """Every flag of every command whose type is a number."""
    found = []
    for command in COMMANDS:
        parsers, original = [], argparse.ArgumentParser.parse_args

        def parse(parser, *_, seen=parsers):
            seen.append(parser)
            raise SystemExit

        argparse.ArgumentParser.parse_args = parse
        try:
            with contextlib.suppress(SystemExit):
                importlib.import_module(command).parse_args()
        finally:
            argparse.ArgumentParser.parse_args = original
        numeric = [one for one in parsers[0]._actions if is_number(one.type) and not one.choices]
        found += [(command, one) for one in numeric if (command, one.dest) != LABELS]
    return found


def is_number(kind) -> bool:
    try:
        return kind is not None and isinstance(kind("1"), int | float)
    except (argparse.ArgumentTypeError, ValueError):  # 1 is outside
        return kind in (cli.threshold, cli.below_one)


@pytest.mark.parametrize(("command", "action"), numeric_flags(), ids=lambda x: getattr(x, "dest", x))
def test_numbers_out_of_range_are_refused_before_anything_is_done(command, action):
    """Beyond 64 bits, beyond float32, no number at all: what is left fits."""
    for text in (str(2**64), "9" * 40, "-1e39", "nan", "1e400", "x"):
        try:
            value = action.type(text)
        except (argparse.ArgumentTypeError, ValueError):
            continue
        assert isinstance(value, float), (command, action.dest, text)
        assert abs(value) <= cli.LARGEST_FLOAT


def test_seeds_are_found_in_every_command_that_has_one():
    seeds = {(command, action.dest) for command, action in numeric_flags() if action.type is cli.seed}
    commands = {command for command, _ in seeds}
    assert commands == {
        "train_router", "sample", "sample_ddp", "study.measure", "study.precisions",
        "examples.digits.train_dit", "examples.digits.classifier", "examples.digits.evaluate",
    }  # fmt: skip
    assert ("sample", "schedule_seed") in seeds
    everything = {(command, action.dest) for command, action in numeric_flags() if "seed" in action.dest}
    assert everything == seeds


LARGEST = 2**64 - 1
TRAIN = ["train_router.py", "--model", "DiT-digits/2", "--num-sampling-steps", 3, "--max-steps", 2]
SAMPLE = ["sample.py", "--model", "DiT-digits/2", "--num-sampling-steps", 3, "--repeats", 0, "--labels", 1]


@pytest.mark.parametrize("method", [[], ["--method", "l2c", "--data", "digits"]])
def test_the_largest_seed_trains_and_the_next_one_is_one_line(tmp_path, method):
    arguments = [*TRAIN, *method, "--global-batch-size", 8, "--results-dir", tmp_path, "--global-seed"]
    run(*arguments, LARGEST)
    assert next(tmp_path.iterdir()).name.endswith(f"-seed{LARGEST}")
    line = error_line(*arguments, LARGEST + 1)
    assert f"--global-seed: {LARGEST + 1} is too large; give {LARGEST} or less" in line
    assert len(list(tmp_path.iterdir())) == 1


def test_the_largest_seeds_sample_and_the_next_ones_are_one_line(tmp_path):
    arguments = [*SAMPLE, "--output", tmp_path / "x.png", "--accelerate-method", "random", "--cur", 0.3]
    run(*arguments, "--seed", LARGEST, "--schedule-seed", LARGEST)
    for flag in ("--seed", "--schedule-seed"):
        assert f"{flag}: {LARGEST + 1} is too large" in error_line(*arguments, flag, LARGEST + 1)
    assert "--labels 36893488147419103232 is outside 0 .. 9" in error_line(*SAMPLE, "--labels", 2**65)
    run("examples.digits.train_dit", "--iterations", 1, "--batch-size", 2, "--seed", LARGEST, "--output",
        tmp_path / "x.safetensors")  # fmt: skip


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 7.45 EiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
    ],
)
def test_too_little_memory_is_one_line(monkeypatch, error):
    def main(_):
        raise error

    monkeypatch.setattr("sample.main", main)
    assert "out of memory; take a smaller batch size or model" in error_line(*SAMPLE)


def test_other_errors_of_the_program_are_not_hidden(monkeypatch):
    def main(_):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("sample.main", main)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        run(*SAMPLE)


def test_memory_that_torch_cannot_have_is_called_so():
    """What `cli.run` looks for in torch's words."""
    with pytest.raises(RuntimeError, match=cli._NO_MEMORY):
        torch.empty(2**58)


def test_what_is_given_is_told_from_what_is_default():
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=cli.positive_int, default=3)
    parser.add_argument("--flag", action="store_true")
    parser.add_argument("--name", default="x")
    args = cli.parse(parser, ["--count", "3"])
    assert (args.count, args.flag, args.name) == (3, False, "x")
    assert args.given == {"count"}
    table = [cli.Unread(("count", "name"), lambda args: args.name == "x", "with --name {name}")]
    cli.note_unread(parser, args, table)
    assert args.notes == ["--count has no effect with --name x"]
    assert args.unread == {"count", "name"}
