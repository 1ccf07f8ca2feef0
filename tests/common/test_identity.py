"""Weights are the same where every value is; records of before are still of the same run."""

import copy

import pytest
import torch

from backbones.loading import load_model
from common.identity import differences, same_weights, weights_fingerprint
from models import DiT


def permuted_labels(model: DiT) -> None:
    table = model.y_embedder.embedding_table.weight
    table[1:] = table[1:].flip(0).clone()


def last_value(model: DiT) -> None:
    model.blocks[-1].mlp.fc2.weight[-1, -1] += 1e-3


def swapped_blocks(model: DiT) -> None:
    """The same tensors under one another's names, the last layers of the MLPs."""
    one, two = model.blocks[0].mlp.fc2.weight, model.blocks[1].mlp.fc2.weight
    kept = one.clone()
    one[2:], two[2:] = two[2:].clone(), kept[2:]


@pytest.mark.parametrize("change", [permuted_labels, last_value, swapped_blocks])
def test_every_value_counts(tiny_model, change):
    other = copy.deepcopy(tiny_model)
    assert weights_fingerprint(other) == weights_fingerprint(tiny_model)
    with torch.no_grad():
        change(other)
    assert weights_fingerprint(other) != weights_fingerprint(tiny_model)
    assert differences({"weights": weights_fingerprint(other)}, {"weights": weights_fingerprint(tiny_model)})


def test_dtype_counts_and_threads_do_not(tiny_model):
    full = weights_fingerprint(tiny_model)
    assert weights_fingerprint(copy.deepcopy(tiny_model).bfloat16()) != full
    torch.set_num_threads(2)
    try:
        assert weights_fingerprint(tiny_model) == full
    finally:
        torch.set_num_threads(1)


def test_records_of_before_are_of_the_same_weights():
    """The committed study and routers hold 16 digits, recorded before all values were hashed."""
    now = weights_fingerprint(load_model("DiT-digits/2"))
    assert same_weights("bcbd1b1bf0d96ad6", now)
    assert same_weights(now, now)
    assert not same_weights("bcbd1b1bf0d96ad7", now)
    assert not same_weights(now[:-1] + "x", now)
    assert not same_weights(None, now)
    assert not same_weights("bcbd1b1bf0d96ad6", "of another model")


def test_a_setting_that_came_later_is_taken_for_what_held_before():
    now = {"weights": f"{'0' * 16}-{'1' * 64}", "seed": 3}
    before = {"weights": "0" * 16, "seed": 3}
    later = {"null_label": True, "learn_sigma": True, "vae_weights": "a"}
    assert not differences(before, now)
    assert not differences(before, now | later)
    assert differences(before, now | later | {"null_label": False}) == [("null_label", True)]
    assert differences(before, now | {"learn_sigma": False}) == [("learn_sigma", True)]
    assert differences(before | {"vae_weights": "b"}, now | later) == [("vae_weights", "b")]
    assert differences(before, now | {"seed": 4}) == [("seed", 3)]
    assert differences({}, now)[0] == ("weights", None)
