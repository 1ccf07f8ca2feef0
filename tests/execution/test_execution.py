"""How a model is executed: what is taken out of the loop, stored, compiled, captured, quantised."""

import copy
import importlib.util
import shutil
import sys
from functools import partial

import numpy as np
import pytest
import torch
from commands import error_line, run
from conftest import relative_error
from tiny_transformers import pixart

from backbones.denoiser import Denoiser
from backbones.loading import load_model
from backbones.pixart import PixArt, random_prompts
from benchmarks.training_cost import plain_loop
from cache import StaticCache
from diffusion import create_diffusion
from execution import Captured, ExecutionSettings, prepare, quantize, recompute_branches
from execution.quantization import branch_weight_bytes, weight_bytes
from objectives import train_trajectory
from router import Router, Schedule, find_router, load_router
from sampling.loop import Trajectory, denoise_loop, draw_step_noise, generate, sample
from schedules.baselines import fora_schedule, random_schedule
from schedules.forecasts import taylor

torchao_is_there = importlib.util.find_spec("torchao") is not None
DIGITS = ["--model", "DiT-digits/2", "--num-sampling-steps", 4, "--repeats", 0]


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
@pytest.mark.parametrize("chunk_size", [1, 4, 10])
def test_what_is_taken_out_of_the_loop_changes_nothing(
    tiny_model, ten_steps, tiny_batch, cfg_scale, chunk_size, monkeypatch
):
    noise, labels = tiny_batch
    rows = len(noise) * (1 if cfg_scale == 1 else 2)
    monkeypatch.setattr("backbones.denoiser.PREPARED_BYTES", chunk_size * 4 * rows * tiny_model.prepared_size)
    assert Denoiser(tiny_model, ten_steps, labels, cfg_scale).chunk_size == chunk_size
    expected = plain_loop(tiny_model, ten_steps, labels, noise, cfg_scale)
    assert relative_error(generate(tiny_model, ten_steps, labels, noise, cfg_scale), expected) < 1e-5


def test_a_reused_branch_needs_its_gate_alone(tiny_model, ten_steps, tiny_batch):
    noise, labels = tiny_batch
    schedule = random_schedule(10, 4, 0.5)
    cache = StaticCache(schedule)
    denoise = Denoiser(tiny_model, ten_steps, labels, 1.5, cache.computed)
    x_t = y_t = denoise.start(noise).x
    plain_cache = StaticCache(schedule)
    for step in reversed(range(10)):
        modulations = denoise._prepared_at(step).branches
        assert [one.shift is not None for one in modulations] == schedule.compute[step].tolist()
        x_t = ten_steps.ddim_step(denoise(x_t, step, cache), x_t, step)
        plain_cache.step = step
        t = ten_steps.timesteps(step, len(y_t), y_t.device)
        out = tiny_model.forward_with_cfg(y_t, t, denoise.condition, 1.5, plain_cache)
        y_t = ten_steps.ddim_step(out, y_t, step)
    assert relative_error(x_t, y_t) < 1e-5


def schedules() -> list[Schedule]:
    tables = [fora_schedule(10, 4, 2), fora_schedule(10, 4, 4), random_schedule(10, 4, 0.6)]
    read_far = torch.zeros(10, 4, 3)
    read_far[3, 1, 2] = 1.0  # one cell alone reads the last output but two
    table = torch.ones(10, 4, dtype=torch.bool)
    table[3, 1] = False
    return [*tables, *(taylor(one, 2) for one in tables), Schedule(table, weights=read_far)]


@pytest.mark.parametrize("number", range(7))
def test_an_output_is_kept_until_its_last_reader(tiny_model, ten_steps, tiny_batch, number):
    """The figures of `Schedule`, and the bytes that lie in the store, against a look at all that is read."""
    noise, labels = tiny_batch
    schedule = schedules()[number]
    cache, most = StaticCache(schedule), 0
    denoise = Denoiser(tiny_model, ten_steps, labels, 1.5, cache.computed)
    one_output = 2 * len(noise) * tiny_model.branch_size * 4

    def counting(branch, compute):
        nonlocal most
        cache.step = counting.step
        output = cache(branch, compute)
        most = max(most, cache.stored_bytes())
        return output

    x_t = denoise.start(noise).x
    for step in reversed(range(10)):
        counting.step = step
        x_t = ten_steps.ddim_step(denoise(x_t, step, counting), x_t, step)
        assert cache.stored_bytes() == schedule.kept()[step].sum() * one_output
    assert most == schedule.stored_outputs() * one_output
    assert cache.stored_bytes() == 0
    # All that a schedule reads, and nothing that it does not, must be enough: a store of everything agrees.
    kept = torch.full_like(schedule.kept(), 10)
    hoarding = StaticCache(schedule)
    hoarding._kept = kept.tolist()
    *_, (_, expected) = denoise_loop(Trajectory(tiny_model, ten_steps, 1.5), labels, noise, hoarding)
    assert relative_error(x_t[: len(noise)], expected) < 1e-5


def test_fora_frees_its_outputs_before_the_next_full_step():
    kept = fora_schedule(6, 4, 3).kept()
    assert kept.flip(0)[:, 0].tolist() == [1, 1, 0, 1, 1, 0]
    assert fora_schedule(6, 4, 3).stored_outputs() == 4
    assert fora_schedule(6, 4, 1).stored_outputs() == 0


def test_cache_of_another_dtype(tiny_model, ten_steps, tiny_batch):
    noise, labels = tiny_batch
    schedule = fora_schedule(10, 4, 2)
    draw = partial(sample, Trajectory(tiny_model, ten_steps, 1.5, schedule), labels, noise)
    in_half, plain = draw(cache_dtype=torch.bfloat16), draw()
    assert 0 < relative_error(in_half, plain) < 0.02
    assert in_half.dtype == torch.float32
    cache = StaticCache(schedule, torch.bfloat16)
    cache.step = 9
    for branch in range(4):
        cache(branch, lambda: torch.ones(8))
    assert cache.stored_bytes() == 4 * 8 * 2


def test_step_noise_is_drawn_beforehand_in_order(tiny_model, ten_steps):
    noise = torch.zeros(2, 4, 4, 4)
    assert draw_step_noise(Trajectory(tiny_model, ten_steps, 1.5), noise, None) is None
    generators = [torch.Generator().manual_seed(k) for k in range(2)]
    drawn = draw_step_noise(Trajectory.of(tiny_model, ten_steps, 1.5, "ddpm"), noise, generators)
    again = [torch.Generator().manual_seed(k) for k in range(2)]
    for step in reversed(range(10)):
        own = torch.stack([torch.randn(4, 4, 4, generator=one) for one in again])
        assert torch.equal(drawn[step], torch.cat([own, own]))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_few_graphs_serve_all_schedules_and_give_the_same_samples(tiny_batch):
    noise, labels = tiny_batch
    noise = noise[:, :1].repeat(1, 1, 2, 2)
    model, diffusion = load_model("DiT-digits/2"), create_diffusion("6")
    expected = [generate(model, diffusion, labels, noise, 1.5, schedule=one) for one in digit_schedules()]
    compiled = prepare(ExecutionSettings(compile=True), model, torch.device("cpu"))
    torch._dynamo.utils.counters.clear()
    for one, plain in zip(digit_schedules(), expected, strict=True):
        assert relative_error(compiled(Trajectory(model, diffusion, 1.5, one), labels, noise), plain) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3 + 3  # of one, two and three outputs


@pytest.fixture
def prompted():
    """A PixArt of two blocks with five prompts."""
    model = PixArt(pixart().requires_grad_(False), random_prompts(5, 7, 16))
    yield model
    model.close()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_few_graphs_serve_all_schedules_of_a_librarys_transformer(prompted):
    noise, labels = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(2)
    diffusion, fora, some = create_diffusion("6"), fora_schedule(6, 6, 2), random_schedule(6, 6, 0.4)
    chosen = [None, fora, some, taylor(fora, 2), taylor(some, 2)]
    expected = [generate(prompted, diffusion, labels, noise, 4.5, schedule=one) for one in chosen]
    compiled = prepare(ExecutionSettings(compile=True), prompted, torch.device("cpu"))
    torch._dynamo.utils.counters.clear()
    for one, plain in zip(chosen, expected, strict=True):
        assert (
            relative_error(compiled(Trajectory(prompted, diffusion, 4.5, one), labels, noise), plain) < 1e-5
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3 + 3  # branches; one to three outputs
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("sampler", ["dpm-solver++", "sa-solver"])
def test_what_is_captured_reads_no_prompts(prompted, monkeypatch, sampler):
    """They come from the host, so they are inputs of a CUDA graph. A function stands for the graph here."""
    condition, calls = PixArt.condition, []

    class Graph:
        def __init__(self, function, output):
            self.function, self.output = function, output

        def replay(self):
            with monkeypatch.context() as patch:
                patch.setattr(PixArt, "condition", None)
                self.output.copy_(self.function())

    def captured(function):
        calls.append(1)
        graph = Graph(function, torch.empty(2, 4, 8, 8))
        return graph, graph.output

    monkeypatch.setattr("execution.graphs.captured", captured)
    draw, diffusion = Captured(), create_diffusion("4")
    trajectories = [
        Trajectory.of(prompted, diffusion, 4.5, sampler, one) for one in (None, fora_schedule(4, 6, 2))
    ]
    for seed, labels in ((1, torch.tensor([0, 1])), (2, torch.tensor([4, 2]))):
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        for one in trajectories:
            own = [torch.Generator().manual_seed(7) for _ in range(2)]
            assert torch.equal(draw(one, labels, noise, own[0]), sample(one, labels, noise, own[1]))
    assert PixArt.condition is condition
    assert len(calls) == 2  # a graph per trajectory


def test_recomputed_branches_have_the_same_gradients(tiny_model, ten_steps, tiny_batch):
    """And are run a second time for them, which nothing without a gradient is."""
    noise, labels = tiny_batch
    model, logits, runs = copy.deepcopy(tiny_model), [], []
    for wrapped in (False, True):
        if wrapped:
            recompute_branches(model)
        calls = []
        handle = model.blocks[1].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        router = Router(10, 4, torch.Generator().manual_seed(0))
        optimizer = torch.optim.SGD(router.parameters(), lr=100.0)
        trajectory = train_trajectory(
            model, ten_steps, router, optimizer, noise, labels, 1.5, 0.1, torch.ones(10), 1e-3
        )
        for _ in trajectory:
            pass
        handle.remove()
        logits.append(router.logits)
        runs.append(len(calls))
    torch.testing.assert_close(*logits)
    assert runs == [1 + 2 * 9, 1 + 3 * 9]  # the first step; teacher, routed, and once more


def test_a_training_that_recomputes_ends_in_the_same_router(tmp_path):
    logits = []
    for name, flags in (("kept", []), ("recomputed", ["--recompute-branches"])):
        arguments = ["--model", "DiT-digits/2", "--num-sampling-steps", 3, "--max-steps", 4, "--lr", 0.1]
        arguments += ["--global-batch-size", 2, "--device", "cpu", "--results-dir", tmp_path / name]
        run("train_router.py", *arguments, *flags)
        logits.append(load_router(find_router(next((tmp_path / name).iterdir()))).logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    assert logits[0].std() > 0


def digit_schedules() -> list[Schedule | None]:
    fora, some = fora_schedule(6, 24, 2), random_schedule(6, 24, 0.4)
    return [None, fora, some, taylor(fora, 2), taylor(some, 2)]


def test_recomputed_branches_of_a_librarys_transformer(prompted):
    """Its branches are called by name, too; they are run a second time for the same gradients."""
    noise, labels = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(2)
    logits, runs = [], []
    for wrapped in (False, True):
        if wrapped:
            recompute_branches(prompted)
        calls = []
        handle = (
            prompted.branch_modules[2]
            .net[2]
            .register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        )
        router = Router(4, 6, torch.Generator().manual_seed(0))
        optimizer = torch.optim.SGD(router.parameters(), lr=100.0)
        setting = noise, labels, 4.5, 0.1, torch.ones(4), 1e-3
        for _ in train_trajectory(prompted, create_diffusion("4"), router, optimizer, *setting):
            pass
        handle.remove()
        logits.append(router.logits)
        runs.append(len(calls))
    torch.testing.assert_close(*logits)
    assert runs == [1 + 2 * 3, 1 + 3 * 3]


@pytest.mark.skipif(not torchao_is_there, reason="needs torchao")
@pytest.mark.parametrize("kind", ["int8wo", "int8"])
def test_quantised_branches_stay_close(kind, tiny_batch):
    noise, labels = tiny_batch
    noise = noise[:, :1].repeat(1, 1, 2, 2)
    model, diffusion = load_model("DiT-digits/2"), create_diffusion("6")
    expected = generate(model, diffusion, labels, noise, 1.5)
    conditioning = model.blocks[0].adaLN_modulation[1].weight
    quantize(model, kind, torch.device("cpu"))
    assert model.blocks[0].adaLN_modulation[1].weight is conditioning
    assert type(model.blocks[0].mlp.fc1.weight) is not torch.nn.Parameter
    assert 0 < relative_error(generate(model, diffusion, labels, noise, 1.5), expected) < 0.1


def test_what_cannot_be_done_is_named(tmp_path, monkeypatch):
    arguments = [*DIGITS, "--output", tmp_path / "x.png", "--device", "cpu"]
    assert "--cuda-graph needs a GPU" in error_line("sample.py", *arguments, "--cuda-graph")
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert "pip install torchao" in error_line("sample.py", *arguments, "--quantize", "int8")
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert "needs a C++ compiler" in error_line("sample.py", *arguments, "--compile")
    assert not (tmp_path / "x.png").exists()


def test_fp8_on_a_cpu_is_refused(tmp_path):
    arguments = [*DIGITS, "--output", tmp_path / "x.png", "--device", "cpu", "--quantize", "fp8"]
    assert "compute capability 8.9" in error_line("sample.py", *arguments)


def test_cache_dtype_from_the_command_line(tmp_path):
    """Stored in half the bytes, samples are near those of the model's own dtype, and not the same."""
    drawn = {}
    for dtype in ("fp32", "bf16"):
        latents = tmp_path / f"{dtype}.npz"
        run("sample.py", *DIGITS, "--accelerate-method", "fora", "--interval", 2, "--cache-dtype", dtype,
            "--output", tmp_path / "x.png", "--save-latents", latents, "--device", "cpu")  # fmt: skip
        with np.load(latents) as file:
            drawn[dtype] = torch.from_numpy(file["latents"])
    assert 0 < relative_error(drawn["bf16"], drawn["fp32"]) < 0.05


def test_weights_that_are_quantised_count_as_bytes():
    model = load_model("DiT-digits/2")
    whole, width = sum(4 * parameter.numel() for parameter in model.parameters()), 128
    assert weight_bytes(model) == whole
    linears = 12 * width**2 * len(model.blocks)  # qkv 3, projection 1, MLP 8
    assert weight_bytes(model, "int8wo") == whole - 3 * linears
    assert branch_weight_bytes(model, "int8wo") == [4 * width**2, 8 * width**2] * len(model.blocks)
