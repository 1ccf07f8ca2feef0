"""What only a GPU shows: the same numbers as a CPU's, and training that repeats its bits."""

import copy

import pytest
import torch
from commands import run
from conftest import relative_error
from tiny_transformers import pixart

from backbones.loading import load_model
from backbones.pixart import PixArt, random_prompts
from diffusion import create_diffusion
from execution import Captured, prepare
from execution.settings import ExecutionSettings
from router import Schedule, find_router, load_router
from sampling.loop import Trajectory, generate_seeded
from schedules.baselines import fora_schedule
from schedules.forecasts import taylor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("forecast_order", [0, 2])
def test_cached_sampling_equals_the_cpus(forecast_order):
    model, labels = load_model("DiT-digits/2"), torch.arange(10)
    schedule = Schedule(torch.rand(10, 24, generator=torch.Generator().manual_seed(0)) > 0.4)
    setting = create_diffusion("10"), 1.5, taylor(schedule, forecast_order)
    on_cpu = generate_seeded(Trajectory(model, *setting), labels, 1)
    on_gpu = generate_seeded(Trajectory(copy.deepcopy(model).cuda(), *setting), labels, 1)
    assert relative_error(on_gpu.cpu(), on_cpu) < 1e-3


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_captured_trajectory_equals_the_plain_one(sampler):
    """For new noise and labels too, and for a second schedule beside the first."""
    model, diffusion, captured = load_model("DiT-digits/2").cuda(), create_diffusion("10"), Captured()
    for seed, schedule in ((1, None), (2, fora_schedule(10, 24, 2)), (3, None), (4, None)):
        trajectory = Trajectory.of(model, diffusion, 1.5, sampler, schedule)
        labels = (torch.arange(10) + seed) % 10
        plain = generate_seeded(trajectory, labels, seed)
        replayed = generate_seeded(trajectory, labels, seed, sample=captured)
        assert relative_error(replayed, plain) < 1e-5


@pytest.mark.parametrize("sampler", ["dpm-solver++", "sa-solver"])
def test_captured_trajectory_of_prompts_equals_the_plain_one(sampler):
    """The embeddings of other prompts are copied into the graph."""
    model, captured = PixArt(pixart().requires_grad_(False).cuda(), random_prompts(5, 7, 16)), Captured()
    trajectory = Trajectory.of(model, create_diffusion("6"), 4.5, sampler, fora_schedule(6, 6, 2))
    for seed, labels in ((1, torch.tensor([0, 1])), (2, torch.tensor([4, 2])), (3, torch.tensor([0, 1]))):
        plain = generate_seeded(trajectory, labels, seed)
        assert relative_error(generate_seeded(trajectory, labels, seed, sample=captured), plain) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_trajectory_is_near_the_plain_one(dtype):
    """With branches reused, and combined from three outputs."""
    model, diffusion = load_model("DiT-digits/2", device="cuda", dtype=dtype), create_diffusion("10")
    own, labels = copy.deepcopy(model), torch.arange(10)
    settings = ExecutionSettings(compile=True).on(torch.device("cuda"))
    assert settings.cuda_graph
    compiled = prepare(settings, own, torch.device("cuda"))
    schedule = taylor(fora_schedule(10, 24, 2), 2)
    for seed, chosen in ((1, None), (2, schedule), (3, schedule)):
        plain = generate_seeded(Trajectory(model, diffusion, 1.5, chosen), labels, seed)
        fast = generate_seeded(Trajectory(own, diffusion, 1.5, chosen), labels, seed, sample=compiled)
        assert relative_error(fast, plain) < (1e-3 if dtype == torch.float32 else 0.1)
        # What was freed is taken and overwritten: a graph must not have needed it.
        taken = [torch.full((n,), torch.nan, device="cuda") for n in range(16, 4096, 16)]
        del taken


@pytest.mark.parametrize("compiled", [False, True])
def test_float8_stays_near_bfloat16(compiled):
    """Its error is a hundredth of the sample; under a cache it is of the same size."""
    model, diffusion = load_model("DiT-digits/2", device="cuda", dtype=torch.bfloat16), create_diffusion("10")
    own, labels = copy.deepcopy(model), torch.arange(20) % 10
    settings = ExecutionSettings(quantize="fp8", compile=compiled)
    quantised = prepare(settings, own, torch.device("cuda"))
    for chosen in (None, fora_schedule(10, 24, 2)):
        plain = generate_seeded(Trajectory(model, diffusion, 1.5, chosen), labels, 1)
        fast = generate_seeded(Trajectory(own, diffusion, 1.5, chosen), labels, 1, sample=quantised)
        assert 1e-3 < relative_error(fast, plain) < 0.1


L2C = ["--method", "l2c", "--data", "digits", "--target-cur", 0.3]
BEYOND = ["--method", "end-to-end", "--target-speedup", 1.6, "--max-steps", 20]


@pytest.mark.parametrize(
    ("precision", "method"),
    [("fp32", []), ("tf32", []), ("bf16", []), ("fp32", L2C), ("bf16", BEYOND)],
)
def test_training_repeats_its_bits(tmp_path, precision, method):
    arguments = ["--model", "DiT-digits/2", "--num-sampling-steps", 5, "--max-steps", 15, "--lr", 0.05]
    arguments += ["--global-batch-size", 8, "--precision", precision, *method]
    logits, weights = [], []
    for name in ("one", "other"):
        run("train_router.py", "--results-dir", tmp_path / name, *arguments)
        router = load_router(find_router(next((tmp_path / name).iterdir())))
        logits.append(router.logits)
        weights.append(torch.zeros(0) if router.weights is None else router.weights)
    assert torch.equal(*logits)
    assert torch.equal(*weights)
