"""Schedules on diffusers' transformers: what is computed, what is left behind, what is refused."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from tiny_transformers import FAMILIES, dit, flux, inputs, pixart, sd3
from torch import Tensor, nn

from backbones import apply_schedule, remove_schedule, scheduled, summary
from backbones.families import find_branches
from cache import StaticCache
from router import Router, Schedule, save_router
from schedules.forecasts import taylor

TIMESTEPS = (900.0, 700.0, 500.0, 300.0, 200.0, 100.0)
T = len(TIMESTEPS)


def random_schedule(model: nn.Module, seed: int = 3) -> Schedule:
    shape = (T, len(find_branches(model)))
    return Schedule(torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.4)


@torch.no_grad()
def trajectory(model: nn.Module, n: int = 2, timesteps=TIMESTEPS) -> Tensor:
    """Outputs at all steps, each on noise of its own."""
    outputs = [model(**inputs(model, t, k, n), return_dict=False)[0] for k, t in enumerate(timesteps)]
    return torch.stack(outputs)


def attributes(model: nn.Module) -> dict[str, set[str]]:
    """All attributes of all modules, and how many hooks of torch they have."""
    return {
        name: {
            *vars(module),
            *(f"{key}{len(value)}" for key, value in vars(module).items() if "_hooks" in key),
        }
        for name, module in model.named_modules()
    }


@pytest.fixture(params=FAMILIES)
def model(request) -> nn.Module:
    return FAMILIES[request.param]()


def test_a_schedule_that_computes_all_changes_no_bit(model):
    plain = trajectory(model)
    everything = Schedule(torch.ones(T, len(find_branches(model)), dtype=torch.bool))
    with scheduled(model, everything):
        assert torch.equal(trajectory(model), plain)


def test_branches_run_where_the_schedule_computes(model):
    """Calls of the modules themselves, counted from below the hooks, and of what feeds them alone."""
    schedule, calls = random_schedule(model), Counter()
    branches = find_branches(model)
    for branch in branches:
        for part in (branch.module, *branch.feeders):
            inner = next(child for child in part.modules() if isinstance(child, (nn.Linear, nn.Conv2d)))
            inner.register_forward_pre_hook(
                lambda _module, _args, name=branch.name, part=part: calls.update([(name, id(part))])
            )
    with scheduled(model, schedule) as session:
        first = trajectory(model)
        session.start()
        assert torch.equal(trajectory(model), first)  # again: the same
        found = summary(model)
    for index, branch in enumerate(branches):
        wanted = 2 * int(schedule.compute[:, index].sum())
        for part in (branch.module, *branch.feeders):
            # A feeder that is a linear layer itself is called by its hook, which returns nothing of it.
            assert calls[branch.name, id(part)] == wanted or isinstance(part, nn.Linear), branch.name
        assert (session.computed[index], session.reused[index]) == (wanted, 2 * T - wanted)
    assert found["all"]["computed"] == 2 * int(schedule.compute.sum())
    assert found["all"]["stored_bytes"] > 0


def test_norms_of_reused_branches_do_not_run(model):
    nothing = Schedule(torch.zeros(T, len(find_branches(model)), dtype=torch.bool))
    tokens = Counter()
    for branch in find_branches(model):
        for norm in branch.norms:
            norm.register_forward_hook(
                lambda module, _args, output: tokens.update({id(module): output.shape[1]}), always_call=True
            )
    with scheduled(model, nothing):
        trajectory(model, timesteps=TIMESTEPS[:1])
        once = dict(tokens)
        tokens.clear()
        trajectory(model, timesteps=TIMESTEPS[1:])
    assert not any(tokens.values())
    assert all(once.values())


def test_reuse_is_what_static_cache_does(model):
    """The same outputs from a policy of `cache.py` in forwards that are patched, without any hook."""
    schedule = taylor(random_schedule(model), 2)
    with scheduled(model, schedule):
        hooked = trajectory(model)
    cache, branches = StaticCache(schedule), find_branches(model)
    pairs: dict[int, int] = {}
    for index, branch in enumerate(branches):
        branch.module.forward = patched(branch.module.forward, cache, index, pairs)
    outputs = []
    with torch.no_grad():
        for k, t in enumerate(TIMESTEPS):
            cache.step = T - 1 - k
            outputs.append(model(**inputs(model, t, k), return_dict=False)[0])
    assert torch.equal(torch.stack(outputs), hooked)


def patched(forward, cache: StaticCache, index: int, pairs: dict[int, int]):
    def ask(*args, **kwargs):
        def compute() -> Tensor:
            output = forward(*args, **kwargs)
            if isinstance(output, tuple):
                pairs[index] = output[0].shape[1]
                output = torch.cat(output, 1)
            return output

        output = cache(index, compute)
        return output.tensor_split([pairs[index]], 1) if index in pairs else output

    return ask


def test_removal_leaves_nothing_behind(model):
    before, plain = attributes(model), trajectory(model)
    apply_schedule(model, random_schedule(model))
    assert not torch.equal(trajectory(model), plain)
    assert attributes(model) != before
    remove_schedule(model)
    assert attributes(model) == before
    assert torch.equal(trajectory(model), plain)
    with pytest.raises(ValueError, match="no schedule is applied"):
        remove_schedule(model)


def test_applying_again_replaces(model):
    with scheduled(model, random_schedule(model, 4)):
        wanted = trajectory(model)
    before = attributes(model)
    apply_schedule(model, random_schedule(model, 3))
    apply_schedule(model, random_schedule(model, 4))
    assert torch.equal(trajectory(model), wanted)
    remove_schedule(model)
    assert attributes(model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_are_stored_in_another_dtype(dtype):
    model = pixart()
    schedule = random_schedule(model)
    with scheduled(model, schedule):
        exact = trajectory(model)
        most = summary(model)["all"]["stored_bytes"]
    with scheduled(model, schedule, cache_dtype=dtype):
        rounded = trajectory(model)
        assert summary(model)["all"]["stored_bytes"] * 2 == most
    assert rounded.dtype == exact.dtype
    assert 0 < (rounded - exact).abs().max() < 0.1


def test_what_is_stored_is_what_will_be_read():
    model = pixart()
    schedule = random_schedule(model)
    tokens = (8 // 2) ** 2
    with scheduled(model, schedule):
        trajectory(model)
        stored = summary(model)["all"]["stored_bytes"]
    assert stored == schedule.stored_outputs() * 2 * tokens * 32 * 4


def test_a_router_file_at_its_threshold_or_another(tmp_path):
    model = pixart()
    router = Router(T, len(find_branches(model)), torch.Generator().manual_seed(0))
    save_router(tmp_path / "r.safetensors", router, method="test", threshold=0.4)
    for threshold in (None, 0.6):
        session = apply_schedule(model, tmp_path / "r.safetensors", threshold)
        assert torch.equal(session.schedule.compute, router.schedule(threshold or 0.4).compute)
    remove_schedule(model)


def test_a_changed_batch_or_shape_within_a_trajectory_is_refused():
    model = pixart()
    with scheduled(model, random_schedule(model)) as session:
        trajectory(model, timesteps=TIMESTEPS[:2])
        with pytest.raises(ValueError, match=r"session\.start\(\) before each trajectory"):
            trajectory(model, n=3, timesteps=TIMESTEPS[2:3])
        session.start()
        assert len(trajectory(model, n=3)) == T


def test_more_steps_than_the_schedule_has_are_refused():
    model = dit()
    with scheduled(model, random_schedule(model)):
        trajectory(model)
        with pytest.raises(ValueError, match="is for 6 steps and all were taken"):
            trajectory(model, timesteps=(50.0,))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_exception_the_next_call_is_clean(error):
    model = pixart()
    schedule = random_schedule(model)
    with scheduled(model, schedule):
        wanted = trajectory(model)
    with scheduled(model, schedule):
        trajectory(model, timesteps=TIMESTEPS[:3])

        def fail(*_):
            raise error("stop")

        handle = model.transformer_blocks[1].attn1.to_q.register_forward_pre_hook(fail)
        with pytest.raises(error):
            trajectory(model, timesteps=TIMESTEPS[:1])
        handle.remove()
        assert torch.equal(trajectory(model), wanted)


@pytest.mark.parametrize("copying", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_hooked_model_is_refused(copying):
    model = pixart()
    with (
        scheduled(model, random_schedule(model)),
        pytest.raises(ValueError, match="call remove_schedule first"),
    ):
        copying(model)
    copying(model)


def test_unknown_classes_are_refused_by_name():
    with pytest.raises(ValueError, match="Linear is not supported; supported are DiTTransformer2DModel, Pix"):
        apply_schedule(nn.Linear(2, 2), Schedule(torch.ones(2, 2, dtype=torch.bool)))
    with pytest.raises(ValueError, match="object has no transformer"):
        apply_schedule(object(), Schedule(torch.ones(2, 2, dtype=torch.bool)))


def test_a_schedule_of_another_width_is_refused():
    before = attributes(model := pixart())
    with pytest.raises(ValueError, match="is for 5 branches, PixArtTransformer2DModel has 6"):
        apply_schedule(model, Schedule(torch.ones(T, 5, dtype=torch.bool)))
    assert attributes(model) == before


def test_chunking_and_other_caches_are_refused():
    model = dit()
    model.transformer_blocks[0].set_chunk_feed_forward(2, 1)
    with pytest.raises(ValueError, match="computes in chunks"):
        apply_schedule(model, random_schedule(model))
    from diffusers import FirstBlockCacheConfig

    model = flux()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"another cache is enabled.*disable_cache"):
        apply_schedule(model, random_schedule(model))
    model.disable_cache()
    apply_schedule(model, random_schedule(model))
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="another cache is enabled"):
        trajectory(model)


def test_a_replaced_branch_is_noticed():
    """What a LoRA does to the fused output of Flux's single blocks."""
    model = flux()
    with scheduled(model, random_schedule(model)) as session:
        trajectory(model)
        block = model.single_transformer_blocks[0]
        block.proj_out = nn.Sequential(block.proj_out)
        session.start()
        with pytest.raises(ValueError, match=r"single_transformer_blocks\.0\.proj_out was replaced"):
            trajectory(model)


def test_calls_without_layers_bypass_the_store():
    """SD3's guidance that skips layers calls the model a third time in a step."""
    model = sd3()
    schedule = random_schedule(model)
    with scheduled(model, schedule):
        wanted = trajectory(model)
    outputs = []
    with torch.no_grad(), scheduled(model, schedule):
        for k, t in enumerate(TIMESTEPS):
            outputs.append(model(**inputs(model, t, k), return_dict=False)[0])
            model(**inputs(model, t, 50 + k), skip_layers=[1], return_dict=False)
    assert torch.equal(torch.stack(outputs), wanted)


def test_two_calls_a_step_have_a_store_each():
    """Guidance whose halves are calls of their own: as two trajectories."""
    model = pixart()
    schedule, halves = random_schedule(model), (0, 100)
    wanted = []
    for half in halves:
        with scheduled(model, schedule), torch.no_grad():
            wanted += [model(**inputs(model, t, half + k))[0] for k, t in enumerate(TIMESTEPS)]
    found: dict[int, list] = {half: [] for half in halves}
    with scheduled(model, schedule), torch.no_grad():
        for k, t in enumerate(TIMESTEPS):
            for half in halves:
                found[half].append(model(**inputs(model, t, half + k))[0])
    assert torch.equal(torch.stack(sum(found.values(), [])), torch.stack(wanted))


def test_gradient_checkpointing_of_the_library_is_refused_where_gradients_flow():
    """Its second run of a block would read a store that has moved on; in eval mode too."""
    model = pixart()
    model.enable_gradient_checkpointing()
    with scheduled(model, random_schedule(model)) as session:
        trajectory(model)
        session.start()
        with torch.enable_grad(), pytest.raises(ValueError, match="call disable_gradient_checkpointing"):
            model(**inputs(model, 900.0, 0))


def test_branches_of_three_outputs_are_refused():
    """Such as those of an IP-adapter."""
    model = flux()
    attention = model.transformer_blocks[0].attn
    plain = attention.forward
    attention.forward = lambda *args, **kwargs: (*plain(*args, **kwargs), None)
    with (
        scheduled(model, random_schedule(model)),
        pytest.raises(ValueError, match=r"returns 3 outputs \(an IP-"),
    ):
        trajectory(model)
