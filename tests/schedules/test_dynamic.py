"""Caches that decide while they sample: which steps they compute where the signal is known."""

import copy
import gc
from functools import partial

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, apply_first_block_cache
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from diffusers.hooks.mag_cache import apply_mag_cache
from tiny_transformers import FAMILIES, dit, inputs, pixart

from backbones.diffusers_dit import DiffusersDiT
from backbones.families import find_branches
from backbones.hooks import Hooks, apply_schedule
from backbones.stream import watch_stream
from diffusion import create_diffusion
from execution.graphs import Captured
from models import DiT
from router import Schedule
from sampling.loop import Trajectory, denoise_loop, sample
from sampling.settings import SamplingSettings
from schedules.dynamic import DynamicCache, Rule
from schedules.forecasts import taylor
from schedules.methods import load_method
from schedules.settings import MethodSettings
from schedules.thresholds import (
    find_tolerance,
    fitted_rescale,
    magnitude_ratios,
    magnitude_schedule,
    reached,
)


class Toy:
    """A model of four blocks whose signals are given: what `told` says, the stream before block 1 carries."""

    branches = ("0.attn", "0.mlp", "1.attn", "1.mlp", "2.attn", "2.mlp", "3.attn", "3.mlp")
    branch_macs, other_macs, branch_size = (2, 3) * 4, 5, 7

    def __init__(self):
        self.tells = {}

    def watch_stream(self, place, tell):
        return self._watch(place, tell)

    def watch_input(self, tell):
        return self._watch("input", tell)

    def _watch(self, place, tell):
        self.tells[place] = tell
        return Handle(self.tells, place)


class Handle:
    def __init__(self, tells, place):
        self.remove = lambda: tells.pop(place)


def rule(num_steps: int, **fields) -> Rule:
    return Rule("test", num_steps, Toy.branches, **fields)


def drive(rule: Rule, signals: list[list[float]], halves: int = 1, dtype=None):
    """Run a toy; signals: those of each step, executed first to last, one number a row.

    Returns which branches ran at each step, and what the first reusable branch returned. A branch's own
    output at a step is the step's position in the order of execution.
    """
    toy, ran, outputs = Toy(), [], []
    policy = DynamicCache(rule, toy, halves, dtype)
    for position, values in enumerate(signals):
        x = torch.tensor(values).view(-1, 1, 1).expand(-1, 2, 3)
        policy.step = rule.num_steps - 1 - position
        ran.append([])
        for branch in range(len(toy.branches)):
            if branch == 0 and "input" in toy.tells:
                toy.tells["input"](x)
            place = branch // 2
            if branch % 2 == 0 and place in toy.tells:
                toy.tells[place](torch.zeros_like(x) if place == 0 else x)

            def run(branch=branch, position=position, x=x):
                ran[-1].append(branch)
                return torch.full_like(x, float(position))

            output = policy(branch, run)
            if branch == rule.reusable.start:
                outputs.append(output[:, 0, 0].tolist())
    return ran, outputs


def computed_steps(ran: list[list[int]]) -> list[int]:
    """Positions at which all branches ran; the others ran fewer."""
    return [position for position, branches in enumerate(ran) if len(branches) == len(Toy.branches)]


RISING = [[1.0], [1.05], [1.1], [1.15], [1.2], [1.27], [1.28], [1.4]]


def test_first_block_compares_with_the_last_computed_step():
    """5 % and 10 % from 1.0, then 15 %; 4.3 % and 10.4 % from 1.15, 11.3 %, 21.7 %."""
    ran, outputs = drive(rule(8, tolerance=0.12), RISING)
    assert computed_steps(ran) == [0, 3, 7]
    assert ran[1] == [0, 1]  # the first block alone
    assert [row[0] for row in outputs] == [0, 0, 0, 3, 3, 3, 3, 7]


def test_dbcache_has_a_warm_up_last_blocks_and_a_limit_of_steps_in_a_row():
    fields = {"tolerance": 9.0, "first_blocks": 2, "last_blocks": 1, "warm_up": 3, "most_reused": 2}
    ran, _ = drive(rule(8, **fields), RISING)
    assert computed_steps(ran) == [0, 1, 2, 5]
    assert ran[3] == [0, 1, 2, 3, 6, 7]


def test_teacache_sums_the_changes_of_consecutive_steps_and_computes_the_last():
    """Every step changes by 10 %; a sum of 0.2 is below 0.23, of 0.3 is not and begins anew."""
    rising = [[1.1**k] for k in range(8)]
    fields = {"first_blocks": 0, "accumulates": True, "last_step": True}
    ran, _ = drive(rule(8, tolerance=0.23, **fields), rising)
    assert computed_steps(ran) == [0, 3, 6, 7]
    assert ran[1] == []  # nothing at all
    ran, _ = drive(rule(8, tolerance=0.23, rescale=(0.5, 0.0), **fields), rising)  # half of each change
    assert computed_steps(ran) == [0, 5, 7]


@pytest.mark.parametrize("per_sample", [False, True])
def test_threshold_zero_computes_all_and_an_endless_one_only_what_must_be(per_sample):
    same = [[1.0, 2.0]] * 5
    nothing = rule(5, tolerance=0.0, per_sample=per_sample)
    assert computed_steps(drive(nothing, same)[0]) == [0, 1, 2, 3, 4]
    assert nothing.cur == 0
    endless = rule(5, tolerance=float("inf"), warm_up=2, per_sample=per_sample)
    assert computed_steps(drive(endless, [[2.0**k, 1.0] for k in range(5)])[0]) == [0, 1]
    assert endless.computed()[:, 0].tolist() == [1.0] * 5
    assert endless.computed()[:, 7].tolist() == [0, 0, 0, 1, 1]  # row T-1 is the first step
    reusing = 3 * (6 * (2 + 3) / 2)  # three steps without three blocks of 2 + 3 MACs
    assert endless.macs(Toy) == pytest.approx(5 * (20 + 5) - reusing)


def test_what_is_no_number_is_computed():
    ran, _ = drive(rule(4, tolerance=9.0), [[1.0], [float("nan")], [1.0], [1.0]])
    assert computed_steps(ran) == [0, 1, 2]  # the second is what the third is compared with


def test_each_sample_decides_for_itself_and_halves_share():
    """Sample 0 stands still, sample 1 doubles; under guidance a half that moves decides for its sample."""
    alone = rule(4, tolerance=0.3, per_sample=True)
    ran, outputs = drive(alone, [[1.0, 2.0**k] for k in range(4)])
    assert outputs == [[0, 0], [0, 1], [0, 2], [0, 3]]
    assert computed_steps(ran) == [0, 1, 2, 3]  # sample 1 needs them
    assert alone.computed()[:, 2].tolist() == [0.5, 0.5, 0.5, 1.0]
    # Rows [cond 0, cond 1, uncond 0, uncond 1]: only the unconditional half of sample 1 moves.
    guided = rule(4, tolerance=0.3, per_sample=True)
    _, outputs = drive(guided, [[1.0, 1.0, 1.0, 2.0**k] for k in range(4)], halves=2)
    assert outputs == [[0] * 4, [0, 1, 0, 1], [0, 2, 0, 2], [0, 3, 0, 3]]
    assert guided.computed()[:, 2].tolist() == [0.5, 0.5, 0.5, 1.0]
    whole = rule(4, tolerance=0.3)
    _, outputs = drive(whole, [[1.0, 1.0, 1.0, 1.0 + 0.1 * k] for k in range(4)], halves=2)
    assert outputs == [[0] * 4] * 4  # on average it hardly moves


def test_forecasts_are_linear_in_each_samples_own_steps():
    """Outputs are their position, a line: two computed steps suffice for an exact forecast."""
    fields = {"tolerance": 0.3, "forecast": True, "per_sample": True}
    signals = [[1.0, 1.0], [2.0, 1.0], [2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]
    both = rule(5, **fields)
    _, outputs = drive(both, signals)
    # Sample 0 computes at 0 and 1, sample 1 at 0 and 2; where one was computed alone, it is copied.
    assert outputs == [[0, 0], [1, 0], [2, 2], [3, 3], [4, 4]]
    products = 2 * (1 + 2 + 2) / 2 * 6  # two weights a forecast: at position 2 one sample, then both
    assert both.macs(Toy) == pytest.approx(5 * 25 - 15 * (1 + 1 + 2 + 2) / 2 + products * 7)


def test_stored_outputs_take_another_dtype():
    _, outputs = drive(rule(3, tolerance=9.0), [[1.0]] * 3, dtype=torch.bfloat16)
    assert [row[0] for row in outputs] == [0, 0, 0]
    policy = DynamicCache(rule(3, tolerance=9.0), Toy(), dtype=torch.bfloat16)
    policy._enter(torch.zeros(1, 2))
    policy._leave(torch.ones(1, 2))
    policy(2, lambda: torch.ones(1, 2))
    assert policy.stored_bytes() == 4


# ---- on models -------------------------------------------------------------------------------------


def sampled(model, diffusion, labels, noise, schedule, cfg_scale=1.5):
    return sample(Trajectory(model, diffusion, cfg_scale, schedule=schedule), labels, noise)


@pytest.fixture(scope="module")
def model() -> DiT:
    """Three blocks with weights so large that every branch matters."""
    torch.manual_seed(0)
    model = DiT(input_size=4, patch_size=2, hidden_size=24, depth=3, num_heads=2, num_classes=5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("fields", [{}, {"first_blocks": 0, "accumulates": True}, {"per_sample": True}])
def test_threshold_zero_is_uncached_bit_for_bit(model, ten_steps, tiny_batch, fields):
    noise, labels = tiny_batch
    plain = sampled(model, ten_steps, labels, noise, None)
    nothing = Rule("test", 10, model.branches, 0.0, **fields)
    assert torch.equal(sampled(model, ten_steps, labels, noise, nothing), plain)
    assert nothing.speedup_macs(model) == 1
    gc.collect()
    hooks = [one._forward_pre_hooks or one._forward_hooks for one in model.modules()]
    assert not any(hooks)  # they went with the policy


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("per_sample", [False, True])
def test_an_endless_threshold_is_its_static_schedule_bit_for_bit(
    model, ten_steps, tiny_batch, order, per_sample
):
    noise, labels = tiny_batch
    endless = Rule(
        "test", 10, model.branches, float("inf"), warm_up=3, forecast=order > 0, per_sample=per_sample
    )
    table = torch.ones(10, 6, dtype=torch.bool)
    table[:7, 2:] = False
    static = taylor(Schedule(table), order)
    dynamic = sampled(model, ten_steps, labels, noise, endless)
    assert torch.equal(dynamic, sampled(model, ten_steps, labels, noise, static))
    assert endless.macs(model) == static.macs(model)
    assert endless.cur == pytest.approx(static.cur)


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_per_sample_is_per_batch_for_a_batch_of_one(model, ten_steps, tiny_batch, cfg_scale, dtype):
    """And a sample's result in a batch is that of its run alone."""
    model, (noise, labels) = copy.deepcopy(model).to(dtype), tiny_batch
    fields = {"tolerance": 1.05, "forecast": True}
    together = Rule("test", 10, model.branches, **fields, per_sample=True)
    in_batch, shares = sampled(model, ten_steps, labels, noise, together, cfg_scale), 0
    for k in range(3):
        one, alone = slice(k, k + 1), []
        for per_sample in (False, True):
            own = Rule("test", 10, model.branches, **fields, per_sample=per_sample)
            alone.append(sampled(model, ten_steps, labels[one], noise[one], own, cfg_scale))
        assert torch.equal(*alone)
        shares = shares + own.computed()
        if dtype == torch.float32:
            torch.testing.assert_close(in_batch[one], alone[0], atol=1e-4, rtol=1e-4)
    if dtype == torch.float32:
        torch.testing.assert_close(together.computed(), shares / 3)
        assert 0 < together.cur < 0.6
        assert together.computed().unique().numel() > 2  # the samples differ


def count_runs(module, call) -> int:
    runs = []
    handle = module.register_forward_hook(lambda *_: runs.append(1))
    call()
    handle.remove()
    return len(runs)


def called(steps: int) -> list[dict]:
    """Inputs that move from one noise to another, at one timestep: gates are alike then."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 2, 4, 8, 8, generator=generator)
    labels, t = torch.arange(2), torch.full((2,), 400)
    places = torch.linspace(0, 1, steps) ** 2
    return [
        {"hidden_states": torch.lerp(first, second, place), "timestep": t, "class_labels": labels}
        for place in places
    ]


@pytest.mark.parametrize("tolerance", [0.03, 0.1, 0.3])
def test_first_block_is_that_of_diffusers(tolerance):
    """The same steps are computed; at equal gates the outputs are the same but for rounding."""
    theirs, ours = dit(num_layers=4), dit(num_layers=4)
    apply_first_block_cache(theirs, FirstBlockCacheConfig(threshold=tolerance))
    _set_cache_context(theirs, CacheContext("test"))
    calls, backbone, runs = called(12), DiffusersDiT(ours), []
    own = Rule("test", 12, backbone.branches, tolerance)
    policy = DynamicCache(own, backbone)
    with torch.no_grad():
        for step, one in zip(reversed(range(12)), calls, strict=True):
            expected = []
            module = theirs.transformer_blocks[1].attn1
            runs.append(
                count_runs(module, partial(lambda one, to: to.append(theirs(**one).sample), one, expected))
            )
            backbone.hooks.policy, policy.step = policy, step
            torch.testing.assert_close(ours(**one).sample, expected[0], atol=1e-4, rtol=1e-4)
    assert own.computed()[:, 2].flip(0).tolist() == runs
    assert 1 < sum(runs) < 12


class Watched:
    """A transformer whose hooks ask a policy, with calls of its own."""

    def __init__(self, transformer):
        self.hooks = Hooks(transformer)
        self.branches = tuple(branch.name for branch in self.hooks.branches)

    def watch_stream(self, place, tell):
        return watch_stream(list(dict.fromkeys(one.block for one in self.hooks.branches)), place, tell)


@pytest.mark.slow  # cache-dit's import
def test_dbcache_is_that_of_cache_dit():
    """The same steps, and at equal gates the same outputs but for rounding, with and without a forecast."""
    cache_dit = pytest.importorskip("cache_dit")
    steps = 14
    base = inputs(pixart(), 400.0, seed=1)
    other = torch.randn(base["hidden_states"].shape, generator=torch.Generator().manual_seed(3))
    places = torch.linspace(0, 1, steps) ** 2
    calls = [base | {"hidden_states": torch.lerp(base["hidden_states"], other, place)} for place in places]
    cases = [(1, 0, 1, 0.1, None, False), (2, 1, 3, 0.15, 2, False), (1, 1, 4, 0.4, 3, True)]
    for first, last, warm_up, tolerance, most, linear in cases:
        theirs, model = pixart(num_layers=5), pixart(num_layers=5)
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=first, Bn_compute_blocks=last, residual_diff_threshold=tolerance,
            max_warmup_steps=warm_up, max_continuous_cached_steps=most or -1, num_inference_steps=steps,
            enable_separate_cfg=False,
        )  # fmt: skip
        calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if linear else None
        middle, runs = theirs.transformer_blocks[first].attn1, []
        cache_dit.enable_cache(theirs, cache_config=config, calibrator_config=calibrator)
        ours = Watched(model)
        own = Rule("test", steps, ours.branches, tolerance, first, last, warm_up, most, forecast=linear)
        policy = ours.hooks.policy = DynamicCache(own, ours)
        with torch.no_grad():
            for step, one in zip(reversed(range(steps)), calls, strict=True):
                expected = []
                call = partial(lambda one, to, model: to.append(model(**one).sample), one, expected, theirs)
                runs.append(count_runs(middle, call))
                policy.step = step
                torch.testing.assert_close(model(**one).sample, expected[0], atol=1e-4, rtol=1e-4)
        assert own.computed()[:, own.reusable.start].flip(0).tolist() == runs
        assert warm_up < sum(runs) < steps


@pytest.mark.parametrize("tolerance", [0.06, 0.2, 1.0])
def test_magcache_skips_the_steps_that_diffusers_skips(tolerance):
    ratios = [1.0, 1.3, 1.1, 1.05, 1.02, 1.01, 0.99, 1.0, 0.97, 0.95, 0.9, 0.8]
    theirs = dit(num_layers=2)
    config = MagCacheConfig(tolerance, num_inference_steps=12, mag_ratios=ratios)
    apply_mag_cache(theirs, config)
    runs = []
    with torch.no_grad():
        for one in called(12):
            runs.append(count_runs(theirs.transformer_blocks[1].attn1, lambda one=one: theirs(**one)))
    schedule = magnitude_schedule(ratios, 4, tolerance)
    assert schedule.compute[:, 0].flip(0).tolist() == list(map(bool, runs))
    assert 2 < sum(runs) < 12


def test_magnitude_ratios_of_a_residual_are_those_by_hand(model):
    """The residual of all blocks, taken from the blocks' own hooks in a plain run."""
    trajectory, seen = Trajectory(model, create_diffusion("4"), 1.5), []
    first, last = model.blocks[0], model.blocks[-1]
    handles = [
        first.register_forward_pre_hook(lambda _, args: seen.append([args[0].clone()])),
        last.register_forward_hook(lambda _, __, output: seen[-1].append(output.clone())),
    ]
    ratios = magnitude_ratios(trajectory, num_samples=2)
    for handle in handles:
        handle.remove()
    norms = [(after - before).norm(dim=-1) for before, after in seen]
    expected = [(new / old).mean().item() for old, new in zip(norms, norms[1:], strict=False)]
    assert ratios == pytest.approx([1.0, *expected], rel=1e-4)


def test_teacaches_signal_is_the_modulated_input_and_its_polynomial_fits(model):
    """The signal of our DiT and of diffusers' is what the first attention reads."""
    seen, told = [], []
    handles = [
        model.blocks[0].attn.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
        model.watch_input(told.append),
    ]
    coefficients = fitted_rescale(Trajectory(model, create_diffusion("6"), 1.0), num_samples=3)
    for handle in handles:
        handle.remove()
    assert torch.equal(torch.stack(seen), torch.stack(told))
    assert len(coefficients) == 5
    other = DiffusersDiT(dit(num_layers=2))
    theirs = []
    other.transformer.transformer_blocks[0].attn1.to_q.register_forward_pre_hook(
        lambda _, args: theirs.append(args[0])
    )
    told.clear()
    other.watch_input(told.append)
    next(denoise_loop(Trajectory(other, create_diffusion("2")), torch.arange(2), torch.randn(2, 4, 8, 8)))
    assert torch.equal(theirs[0], told[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_of_every_family_is_watched(family):
    """Before the second block, and after the last one, as the final norm reads it."""
    transformer = FAMILIES[family]()
    blocks = list(dict.fromkeys(branch.block for branch in find_branches(transformer)))
    told, read = {}, []
    for place in (0, 1, len(blocks)):
        watch_stream(blocks, place, lambda x, place=place: told.update({place: x.clone()}))
    transformer.norm_out.register_forward_pre_hook(lambda _, args: read.append(args[0].clone()))
    with torch.no_grad():
        transformer(**inputs(transformer, 400.0, seed=1))
    assert torch.equal(told[len(blocks)], read[0].to(told[1].dtype))
    assert told[0].shape == told[1].shape
    assert not torch.equal(told[0], told[1])


def test_a_librarys_model_is_sampled_as_by_its_schedule():
    model = DiffusersDiT(dit(num_layers=3).requires_grad_(False))
    noise, labels = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(2)
    table = torch.ones(5, 6, dtype=torch.bool)
    table[:4, 2:] = False
    endless = Rule("test", 5, model.branches, float("inf"), per_sample=True)
    setting = model, create_diffusion("5"), labels, noise
    assert torch.equal(sampled(*setting, endless), sampled(*setting, Schedule(table)))
    with pytest.raises(ValueError, match="a Rule is no static schedule"):
        apply_schedule(dit(), endless)


def test_a_graph_needs_a_static_schedule(model, ten_steps, tiny_batch):
    noise, labels = tiny_batch
    own = Rule("test", 10, model.branches, 0.1)
    with pytest.raises(ValueError, match="decides while it samples; add --no-cuda-graph"):
        Captured()(Trajectory(model, ten_steps, 1.5, own), labels, noise)


# ---- methods ---------------------------------------------------------------------------------------


def test_bisection_finds_the_nearest_step():
    def speedup(tolerance: float) -> float:
        return 1 + int(10 * min(tolerance, 3)) / 10  # 1.1 from 0.1 on, and so forth

    tolerance, found = find_tolerance(speedup, 2.53)
    assert found == 2.5
    assert int(10 * tolerance) == 15
    with pytest.raises(ValueError, match="--target-speedup 5 is out of reach: .* 4.000x at most"):
        find_tolerance(speedup, 5)
    with pytest.raises(ValueError, match="--target-speedup 1 is not above 1"):
        find_tolerance(speedup, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("first-block", {}),
        ("first-block", {"per_sample": True}),
        ("dbcache", {"first_blocks": 1, "warm_up": 2, "forecast": True}),
        ("teacache", {"rescale": 4}),
        ("magcache", {}),
    ],
)
def test_a_speed_is_asked_for(model, name, values):
    sampling = SamplingSettings("12", cfg_scale=1.5)
    method = load_method(MethodSettings(name, {"target_speedup": 1.4} | values), model, sampling)
    assert "--tolerance" in method.notes[-1]
    trajectory = method.trajectory(model, sampling)
    assert reached(trajectory) == pytest.approx(1.4, rel=0.07)
    again = load_method(MethodSettings(name, {"target_speedup": 1.4} | values), model, sampling)
    assert repr(again.schedule) == repr(method.schedule)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("first-block", {}, "first-block needs --tolerance, a number, or --target-speedup"),
        ("teacache", {"tolerance": 1.0, "target_speedup": 2.0}, "--target-speedup exclude each other"),
        ("calibrated-first-block", {"tolerance": 1.0}, "needs a static schedule, and first-block decides"),
        ("taylor-dbcache", {"tolerance": 1.0}, "needs a static schedule, and dbcache decides"),
    ],
)
def test_what_does_not_go_together_is_refused(name, values, message):
    with pytest.raises(ValueError, match=message):
        MethodSettings(name, values)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("dbcache", {"warm_up": 2}, "8 first and 0 last blocks are always computed, and the model has 3"),
        ("dbcache", {"first_blocks": 1}, "warm-up 8 leaves none of 6 steps"),
        ("magcache", {"retention": 1.5}, "retention 1.5 is outside 0 .. 1"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(model, name, values, message):
    with pytest.raises(ValueError, match=message):
        load_method(MethodSettings(name, {"tolerance": 0.1} | values), model, SamplingSettings("6"))
