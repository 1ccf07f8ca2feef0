"""Settings of a training: what the flags make of them, and what a checkpoint records."""

import dataclasses
import itertools

import pytest

from training.arguments import parse_args
from training.settings import EndToEndSettings, HarmonicaSettings, L2CSettings, TrainSettings

# What checkpoints have held since there are any; the model adds its own facts.
RECORDED = {
    "method", "model", "num_sampling_steps", "sampler", "cfg_scale", "ste_threshold", "l1", "target_cur",
    "target_speedup", "cost", "lambda_c", "proxy", "data_loss", "router_train", "rollout", "data",
    "every_row", "groups", "lr", "trajectories", "global_seed", "precision", "vae", "terms", "init",
    "window", "pool", "moments_weight", "open_share", "search", "search_samples",
    "any_speed",
}  # fmt: skip


def settings_of(*words) -> TrainSettings:
    return TrainSettings.from_arguments(parse_args(list(map(str, words))))


def test_defaults_by_hand_are_those_of_the_flags():
    assert settings_of() == TrainSettings()
    with_data = settings_of("--method", "l2c", "--data", "digits").method
    assert with_data == L2CSettings(data="digits")
    assert settings_of("--method", "end-to-end", "--target-cur", 0.4).method == EndToEndSettings()


@pytest.mark.parametrize(("method", "others"), [
    (["harmonica"], [["--proxy", "none"], ["--l1", 0], ["--target-cur", 0.4], ["--lambda-c", 7]]),
    (["l2c", "--data", "digits"], [["--l1", 0], ["--every-row"], ["--groups", 4]]),
    (["l2c", "--data", "FOLDER"], [["--l1", 0], ["--vae", "mse"], ["--groups", 4]]),
    (["end-to-end", "--target-cur", 0.4], [["--terms", 0], ["--pool", 99], ["--vae", "FOLDER"]]),
])  # fmt: skip
def test_a_checkpoint_records_what_the_flags_leave_with_an_effect(tmp_path, method, others):
    """The table of flags without effect and `record` agree, whatever is combined."""
    for number in range(len(others) + 1):
        for chosen in itertools.combinations(others, number):
            words = [str(tmp_path) if word == "FOLDER" else word for word in (*method, *sum(chosen, []))]
            if {"--l1", "--target-cur"} <= set(words):
                continue  # refused
            args = parse_args(list(map(str, ["--method", *words])))
            wanted = RECORDED - args.unread
            wanted |= {"max_steps"} if args.method == "end-to-end" else set()
            wanted |= {"global_batch_size"} if args.method == "l2c" else set()
            record = TrainSettings.from_arguments(args).record()
            assert record.keys() == wanted
            flags = {name: getattr(args, name) for name in wanted - {"vae"}}
            assert {name: record[name] for name in flags} == flags


def test_a_record_names_the_vae_that_is_read(tmp_path):
    l2c = ["--method", "l2c", "--data", tmp_path]
    assert settings_of(*l2c).record()["vae"] == "ema"
    assert settings_of(*l2c).loaded_model.vae == "ema"
    assert settings_of(*l2c, "--vae", "mse").loaded_model.vae == "mse"
    assert settings_of(*l2c, "--model", "DiT-digits/2").loaded_model.vae == "none"
    assert settings_of("--method", "l2c", "--data", "digits", "--vae", "mse").loaded_model.vae == "none"
    assert settings_of("--vae", "mse").loaded_model.vae == "none"
    assert settings_of("--vae", tmp_path).loaded_model.vae == str(tmp_path)


@pytest.mark.parametrize(("words", "samples", "asked"), [
    (["--global-batch-size", 64], 32, None),
    (["--global-batch-size", 64, "--cfg-scale", 1], 64, None),
    (["--trajectories", 8], 8, 8),
    (["--method", "l2c", "--data", "digits", "--global-batch-size", 16], 16, None),
    (["--method", "end-to-end", "--target-cur", 0.4, "--trajectories", 3], 3, 3),
])  # fmt: skip
def test_samples_of_a_round(words, samples, asked):
    settings = settings_of(*words)
    assert settings.num_samples == samples
    assert settings.method.trajectories == asked
    counted = "global_batch_size" if settings.method.name == "l2c" else "trajectories"
    assert settings.record()[counted] == samples


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainSettings().global_seed = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        HarmonicaSettings().lr = 1.0
