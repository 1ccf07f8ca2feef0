"""Schedules in diffusers' real pipelines with tiny components."""

import warnings
from collections.abc import Iterator
from functools import partial
from itertools import count

import accelerate
import diffusers
import pytest
import torch
from tiny_pipeline import PIPELINES, draw, flux_pipeline, pixart_alpha, quiet, request, sd3_pipeline
from tiny_transformers import TEXT
from torch import nn

from backbones import apply_schedule, remove_schedule, scheduled, summary
from backbones.families import find_branches
from router import Router, Schedule, save_router

T = 6


@pytest.fixture(params=PIPELINES)
def pipe(request):
    return quiet(PIPELINES[request.param]())


def random_schedule(pipe, steps: int = T) -> Schedule:
    shape = (steps, len(find_branches(pipe.transformer)))
    return Schedule(torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.4)


def test_the_step_comes_from_the_scheduler(pipe):
    schedule = random_schedule(pipe)
    plain = request(pipe)
    with scheduled(pipe, schedule):
        first = request(pipe)
        found = summary(pipe)["all"]
        assert torch.equal(request(pipe), first)
    assert found["computed"] == int(schedule.compute.sum())
    assert found["reused"] == schedule.compute.numel() - int(schedule.compute.sum())
    assert not torch.equal(first, plain)
    assert torch.equal(request(pipe), plain)  # removed


def test_all_computed_is_plain(pipe):
    plain = request(pipe)
    with scheduled(pipe, Schedule(torch.ones(T, len(find_branches(pipe.transformer)), dtype=torch.bool))):
        assert torch.equal(request(pipe), plain)


def test_requests_do_not_touch_each_other(pipe):
    """Another prompt, batch or size after a first request: as from a fresh session."""
    schedule, wanted = random_schedule(pipe), []
    others = [{"seed": 5}, {"n": 2}] + ([] if isinstance(pipe, diffusers.DiTPipeline) else [{"side": 16}])
    if isinstance(pipe, diffusers.StableDiffusion3Pipeline):
        others.pop()  # the tiny model has positions for 8 x 8 alone
    for one in others:
        with scheduled(pipe, schedule):
            wanted.append(request(pipe, **one))
    with scheduled(pipe, schedule):
        request(pipe)
        for one, expected in zip(others, wanted, strict=True):
            assert torch.equal(request(pipe, **one), expected), one


def test_a_request_that_was_broken_off_leaves_no_trace(pipe):
    schedule = random_schedule(pipe)
    with scheduled(pipe, schedule):
        wanted = request(pipe)

        block = find_branches(pipe.transformer)[-1].block
        for after in (1, 3):
            handle = block.register_forward_pre_hook(partial(interrupt_at, after, count()))
            with pytest.raises(KeyboardInterrupt):
                request(pipe, seed=8)
            handle.remove()
            assert torch.equal(request(pipe), wanted)


def test_another_number_of_steps_is_refused(pipe):
    with scheduled(pipe, random_schedule(pipe)):
        with pytest.raises(
            ValueError, match="is for 6 steps, the pipeline takes 5; use num_inference_steps=6"
        ):
            request(pipe, steps=5)
        assert request(pipe).isfinite().all()


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        ("HeunDiscreteScheduler", "more than once a step"),
        ("KDPM2DiscreteScheduler", "more than once a step"),
        ("PNDMScheduler", "PNDMScheduler repeats"),
    ],
)
def test_schedulers_of_more_calls_a_step_are_refused(scheduler, words):
    pipe = quiet(pixart_alpha())
    pipe.scheduler = getattr(diffusers, scheduler)()
    with scheduled(pipe, random_schedule(pipe)), pytest.raises(ValueError, match=words):
        request(pipe)


@pytest.mark.parametrize(
    "scheduler",
    ["DPMSolverMultistepScheduler", "SASolverScheduler", "DDIMScheduler", "DDPMScheduler",
     "UniPCMultistepScheduler", "EulerDiscreteScheduler", "LCMScheduler"],
)  # fmt: skip
def test_schedulers_of_one_call_a_step_work(scheduler):
    pipe = quiet(pixart_alpha())
    pipe.scheduler = getattr(diffusers, scheduler)()
    schedule = random_schedule(pipe)
    with scheduled(pipe, schedule):
        first = request(pipe)
        assert torch.equal(request(pipe), first)
        assert summary(pipe)["all"]["computed"] == 2 * int(schedule.compute.sum())


def test_a_sampler_that_the_router_was_not_trained_under_is_noted_once(tmp_path):
    pipe = quiet(pixart_alpha())
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler()
    file = tmp_path / "r.safetensors"
    save_router(file, Router.from_schedule(random_schedule(pipe)), method="test", sampler="dpm-solver++")
    heard = []
    with scheduled(pipe, file):
        for scheduler in (diffusers.DPMSolverMultistepScheduler(), diffusers.DDIMScheduler()):
            pipe.scheduler = scheduler
            for _ in range(2):
                with warnings.catch_warnings(record=True) as found:
                    warnings.simplefilter("always")
                    request(pipe)
                heard.append([str(one.message) for one in found if "was trained under" in str(one.message)])
    assert [len(messages) for messages in heard] == [0, 0, 1, 0]
    assert "under dpm-solver++, this pipeline samples with DDIMScheduler" in heard[2][0]


def test_sequential_guidance_has_a_store_for_each_half():
    """Flux's true guidance calls the model twice a step."""
    pipe = quiet(flux_pipeline())
    schedule = random_schedule(pipe)
    negative = {"negative_prompt_embeds": draw(1, TEXT, 32, seed=9), "true_cfg_scale": 3.0}
    negative["negative_pooled_prompt_embeds"] = draw(1, 32, seed=9)
    everything = Schedule(torch.ones_like(schedule.compute))
    plain = request(pipe, **negative)
    with scheduled(pipe, everything):
        assert torch.equal(request(pipe, **negative), plain)
    with scheduled(pipe, schedule):
        guided = request(pipe, **negative)
        assert summary(pipe)["all"]["computed"] == 2 * int(schedule.compute.sum())
        assert guided.isfinite().all()


def test_two_pipelines_on_one_transformer_are_two_sessions():
    one = quiet(pixart_alpha())
    other = quiet(diffusers.PixArtSigmaPipeline(
        None, None, one.vae, one.transformer, diffusers.DDIMScheduler(clip_sample=False)
    ))  # fmt: skip
    schedules = {one: random_schedule(one), other: Schedule(~random_schedule(other).compute)}
    wanted = {}
    for pipe, schedule in schedules.items():
        with scheduled(pipe, schedule):
            wanted[pipe] = request(pipe)
    for pipe, schedule in schedules.items():
        apply_schedule(pipe, schedule)
    for pipe in (one, other, one):
        assert torch.equal(request(pipe), wanted[pipe])
    remove_schedule(one)
    assert torch.equal(request(other), wanted[other])
    remove_schedule(other)
    assert not any("_diffusers_hook" in vars(module) for module in one.transformer.modules())


def test_image_to_image_begins_later():
    """The first steps are left out: what was never stored is computed."""
    pipe = quiet(sd3_pipeline())
    later = quiet(diffusers.StableDiffusion3Img2ImgPipeline(**pipe.components))
    schedule = random_schedule(later)
    more = {"image": draw(1, 3, 8, 8, seed=1).clamp(-1, 1), "strength": 0.5}
    with scheduled(later, schedule):
        latents = request(later, side=8, **more)
        found = summary(later)["all"]
    assert latents.isfinite().all()
    assert found["computed"] + found["reused"] == schedule.compute.numel() // 2
    branches = schedule.num_branches
    assert branches <= found["computed"] < branches + int(schedule.compute[:3].sum())


def interrupt_at(call: int, calls: Iterator[int], *_) -> None:
    if next(calls) == call:
        raise KeyboardInterrupt


@pytest.mark.parametrize("hooks_first", [True, False])
@pytest.mark.parametrize("kind", ["model", "sequential", "group"])
def test_offloading_in_either_order(kind, hooks_first):
    def offload(transformer: nn.Module) -> None:
        if kind == "model":
            accelerate.cpu_offload_with_hook(transformer, "cpu")
        elif kind == "sequential":
            for part in (transformer, pipe.vae):
                accelerate.cpu_offload(part, "cpu")
        else:
            diffusers.hooks.apply_group_offloading(
                transformer, torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
            )

    pipe = quiet(pixart_alpha())
    schedule = random_schedule(pipe)
    with scheduled(pipe, schedule):
        wanted = request(pipe)
    actions = [
        partial(apply_schedule, pipe, schedule),
        partial(offload, pipe.transformer),
    ]
    for action in actions if hooks_first else actions[::-1]:
        action()
    assert torch.equal(request(pipe), wanted)
    assert summary(pipe)["all"]["computed"] == int(schedule.compute.sum())
    remove_schedule(pipe)
    assert torch.isfinite(request(pipe)).all()


def test_saving_while_hooked(tmp_path):
    pipe = quiet(pixart_alpha())
    plain = request(pipe)
    with scheduled(pipe, random_schedule(pipe)):
        pipe.transformer.save_pretrained(tmp_path)
    loaded = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path).eval()
    pipe.transformer = loaded
    assert torch.equal(request(pipe), plain)


def test_lora_is_loaded_and_unloaded_while_hooked():
    peft = pytest.importorskip("peft")
    pipe = quiet(flux_pipeline())
    schedule = random_schedule(pipe)
    apply_schedule(pipe, schedule)
    wanted = request(pipe)
    inside = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    pipe.transformer.add_adapter(inside, "inside")  # within a branch: goes on
    adapted = request(pipe)
    assert not torch.equal(adapted, wanted)
    pipe.transformer.delete_adapters("inside")
    assert torch.equal(request(pipe), wanted)
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["proj_out"]), "output")
    with pytest.raises(ValueError, match="was replaced since the schedule was applied"):
        request(pipe)
    apply_schedule(pipe, schedule)
    assert request(pipe).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["model", "blocks"])
def test_compiled_outputs_are_the_same(how):
    pipe = quiet(pixart_alpha())
    schedule = random_schedule(pipe)
    with scheduled(pipe, schedule):
        wanted = request(pipe)
    apply_schedule(pipe, schedule)
    if how == "model":
        pipe.transformer.compile()
    else:
        for block in pipe.transformer.transformer_blocks:
            block.compile()
    assert torch.allclose(request(pipe), wanted, atol=1e-4)
    assert summary(pipe)["all"]["computed"] == int(schedule.compute.sum())


def test_a_control_net_adds_to_what_is_reused():
    pipe = quiet(sd3_pipeline())
    config = pipe.transformer.config
    names = ("sample_size", "patch_size", "in_channels", "out_channels", "attention_head_dim",
             "num_attention_heads", "joint_attention_dim", "caption_projection_dim", "pooled_projection_dim",
             "pos_embed_max_size")  # fmt: skip
    torch.manual_seed(0)
    control = diffusers.SD3ControlNetModel(num_layers=3, **{name: config[name] for name in names})
    for parameter in control.parameters():
        nn.init.normal_(parameter, std=0.1)
    parts = pipe.components | {"controlnet": control}
    pipe = quiet(diffusers.StableDiffusion3ControlNetPipeline(**parts))
    image = draw(1, 3, 8, 8, seed=3)

    def controlled(scale: float) -> torch.Tensor:
        torch.manual_seed(5)  # the pipeline encodes the image with noise of the global generator
        return request(pipe, control_image=image, controlnet_conditioning_scale=scale)

    plain, schedule = controlled(1.0), random_schedule(pipe)
    with scheduled(pipe, Schedule(torch.ones_like(schedule.compute))):
        assert torch.equal(controlled(1.0), plain)
    with scheduled(pipe, schedule):
        found = controlled(1.0)
        assert summary(pipe)["all"]["computed"] == int(schedule.compute.sum())
        assert not torch.equal(controlled(0.0), found)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_models_of_few_steps(steps):
    pipe = quiet(pixart_alpha())
    pipe.scheduler = diffusers.LCMScheduler()
    schedule = random_schedule(pipe, steps)
    with scheduled(pipe, schedule):
        assert request(pipe, steps=steps).isfinite().all()
        assert summary(pipe)["all"]["computed"] == int(schedule.compute.sum())
