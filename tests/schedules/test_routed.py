"""The schedule of a router file: its threshold, who trained it, and notes on another setting."""

import pytest
import torch

from backbones.loading import load_model
from router import Router, save_router
from sampling.settings import SamplingSettings
from schedules.request import Request
from schedules.routed import routed_schedule


@pytest.fixture(scope="module")
def model():
    return load_model("DiT-digits/2", random_weights=True)


@pytest.fixture
def request_(model):
    return Request(model, "DiT-digits/2", SamplingSettings("4", cfg_scale=2.0), 4)


def saved(path, score: float = 0.15, **facts):
    save_router(path, Router.from_logits(torch.full((4, 24), score).logit()), **facts)
    return path


def test_a_file_without_a_threshold_has_the_published_one(tmp_path, request_):
    path = saved(tmp_path / "r.safetensors")
    assert routed_schedule(request_, path).compute.all()  # 0.15 is above 0.1
    assert routed_schedule(request_, path, thres=0.2).cur == 0.75
    own = saved(tmp_path / "own.safetensors", threshold=0.5)
    assert routed_schedule(request_, own).cur == 0.75


@pytest.mark.parametrize(("method", "fits"), [("l2c", True), ("l2c-every-row", True), ("linear", False)])
def test_l2c_takes_routers_of_learning_to_cache_alone(tmp_path, request_, method, fits):
    path = saved(tmp_path / "r.safetensors", method=method)
    if fits:
        assert routed_schedule(request_, path, trained_by="l2c").num_steps == 4
        return
    with pytest.raises(ValueError, match="was trained by linear, not l2c"):
        routed_schedule(request_, path, trained_by="l2c")


def test_notes(tmp_path, request_):
    facts = {"image_size": 8, "cfg_scale": 1.0, "respacing": "ddim4", "threshold": 0.1}
    path = saved(tmp_path / "r.safetensors", **facts)
    routed_schedule(request_, path, thres=0.12)
    assert request_.notes == [
        "note: the router was trained at cfg_scale 1.0, this samples at 2.0",
        "note: the router was trained at respacing ddim4, this samples at 4",
        f"router {path}",
        "note: --thres 0.12 has no effect: no score lies between it and 0.1",
    ]


@pytest.mark.parametrize("reuse", ["", "taylor", "calibrated"])
def test_calibration_is_offered_for_another_sampler(tmp_path, model, reuse):
    path = saved(tmp_path / "r.safetensors", sampler="sa-solver")
    request = Request(model, "DiT-digits/2", SamplingSettings("4"), 4, reuse)
    routed_schedule(request, path)
    note = "note: the router was trained at sampler sa-solver, this samples at ddim"
    offer = "" if reuse == "calibrated" else "; --calibrate fits its weights of reuse to that"
    assert request.notes[0] == note + offer


def test_a_router_that_records_no_sampler_was_trained_under_ddim(tmp_path, model):
    path = saved(tmp_path / "r.safetensors")
    for sampler, notes in (("ddim", 1), ("dpm-solver++", 2)):
        request = Request(model, "DiT-digits/2", SamplingSettings("4", sampler), 4)
        routed_schedule(request, path)
        assert len(request.notes) == notes
    assert request.notes[0].startswith("note: the router was trained at sampler ddim, this samples at dpm")
