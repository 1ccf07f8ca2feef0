import numpy as np
import pytest
import torch
from conftest import relative_error

from backbones.loading import build_model
from common import cli
from diffusion import create_diffusion
from router import Router, Schedule
from sampling.decoding import decode, load_vae
from sampling.loop import Trajectory, denoise_loop, generate, generate_seeded, sample
from sampling.seeds import draw_labels, draw_noise, sample_generator


@pytest.fixture
def reference_run(reference_model, ten_steps, expected, case):
    return (reference_model, ten_steps, expected["sample.labels"], expected["sample.z"], case["cfg_scale"])


def test_ddim_trajectory_matches_the_released_one(reference_run, expected):
    model, diffusion, labels, noise, cfg_scale = reference_run
    steps = denoise_loop(Trajectory(model, diffusion, cfg_scale), labels, noise)
    trajectory = torch.stack([x for _, x in steps])
    assert relative_error(trajectory, expected["ddim.trajectory"]) < 1e-5
    assert relative_error(generate(*reference_run), expected["ddim.sample"]) < 1e-5


def test_ddpm_matches_the_released_one(reference_run, expected):
    torch.manual_seed(123)
    assert relative_error(generate(*reference_run, sampler="ddpm"), expected["ddpm.sample_seed123"]) < 1e-5


def test_ddim_with_eta_matches_the_released_one(reference_run, expected):
    torch.manual_seed(321)
    x_0 = generate(*reference_run[:-1], cfg_scale=1.0, eta=0.5)
    assert relative_error(x_0, expected["ddim_eta0.5_nocfg.sample_seed321"]) < 1e-5


@pytest.mark.parametrize("threshold", ["0.1", "0.5", "0.9"])
def test_cached_sampling_matches_the_released_one(reference_run, expected, threshold):
    schedule = Router.from_logits(expected["cached.router_prob"]).schedule(float(threshold))
    assert (
        relative_error(
            generate(*reference_run, schedule=schedule), expected[f"cached.sample_thres{threshold}"]
        )
        < 1e-5
    )
    torch.manual_seed(77)
    x_0 = generate(*reference_run, sampler="ddpm", schedule=schedule)
    assert relative_error(x_0, expected[f"cached.ddpm_thres{threshold}_seed77"]) < 1e-5


@pytest.mark.parametrize(
    "options", [{}, {"sampler": "ddpm"}, {"eta": 0.7}, {"cfg_scale": 2.0, "sampler": "ddpm"}]
)
def test_a_sample_depends_on_its_seed_and_index_alone(tiny_model, options):
    diffusion, labels = create_diffusion("5"), torch.tensor([0, 1, 2, 3, 4, 0])
    trajectory = Trajectory.of(tiny_model, diffusion, **options)
    together = generate_seeded(trajectory, labels, seed=7)
    in_batches = generate_seeded(trajectory, labels, seed=7, batch_size=4)
    assert relative_error(in_batches, together) < 1e-5
    assert not torch.allclose(together[0], together[5], atol=1e-2)  # same label, other index
    other = generate_seeded(trajectory, labels, seed=8)
    assert not torch.allclose(together[0], other[0], atol=1e-2)


def test_noise_is_standard_normal_and_labels_uniform(tiny_model):
    generators = [sample_generator(3, 0, k) for k in range(2000)]
    noise, labels = draw_noise(tiny_model, generators), draw_labels(tiny_model, generators)
    assert abs(noise.mean()) < 0.02
    assert noise.std() == pytest.approx(1.0, abs=0.02)
    assert (torch.bincount(labels, minlength=5) > 300).all()


def test_streams_of_randomness_never_meet():
    """Sampling's k-th noise is not the training's of trajectory k, nor another seed's."""
    keys = [(42, 0, 1), (42, 1, 1), (42, 1, 1, 0), (42, 0, 1, 0), (42, 1, 0, 1), (1, 0, 42), (0, 42, 1)]
    heads = {tuple(torch.randn(4, generator=sample_generator(*key)).tolist()) for key in keys}
    assert len(heads) == len(keys)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sampler": "dpm"}, "sampler 'dpm' is unknown"),
        ({"schedule": Schedule(torch.ones(20, 4, dtype=torch.bool))}, "for 20 steps, the sampler takes 10"),
        ({"schedule": Schedule(torch.ones(10, 56, dtype=torch.bool))}, "for 56 branches, the model has 4"),
        ({"eta": 1.5}, "eta 1.5 is outside"),
        ({"labels": torch.tensor([1])}, "1 labels for 3 noise samples"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_model, ten_steps, tiny_batch, options, words):
    noise, labels = tiny_batch
    with pytest.raises(ValueError, match=words):
        generate(tiny_model, ten_steps, **{"labels": labels, "noise": noise} | options)


def test_bf16_stays_close_to_fp32(tiny_model, ten_steps, tiny_batch):
    import copy

    noise, labels = tiny_batch
    full = generate(tiny_model, ten_steps, labels, noise, 1.5)
    half = generate(copy.deepcopy(tiny_model).bfloat16(), ten_steps, labels, noise, 1.5)
    assert half.dtype == torch.float32
    assert 0 < relative_error(half, full) < 0.1


def test_latent_model_works_on_an_eighth_of_the_pixels():
    assert build_model("DiT-S/8", 512).input_size == 64
    with pytest.raises(ValueError, match="--image-size 100"):
        build_model("DiT-S/8", 100)
    for name, size, words in (
        ("DiT-S/8", 224, "multiples of 64 pixels .* try 192 or 256"),  # 28 latents, patches of 8
        ("DiT-S/4", 240, "multiples of 32 pixels .* try 224 or 256"),
        ("DiT-S/2", 8, "multiples of 16 pixels .* try 16"),
    ):
        with pytest.raises(ValueError, match=f"--image-size {size}: {name} takes {words}"):
            build_model(name, size)
    with pytest.raises(ValueError, match="--model DiT-XXL/2 is unknown"):
        build_model("DiT-XXL/2")
    with pytest.warns(UserWarning, match="no effect"):
        assert build_model("DiT-digits/2", 256, 1000).input_size == 8


def test_pixels_are_decoded_by_scaling():
    images = decode(torch.tensor([-1.0, 0.0, 1.0, 7.0]).reshape(1, 1, 2, 2))
    assert images.shape == (1, 2, 2, 1)
    assert images.flatten().tolist() == [0, 128, 255, 255]


def test_latents_are_decoded_by_the_vae_of_a_folder(tmp_path):
    """A small AutoencoderKL in the real format; scaling, range and layout as the official sampler's."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8, 8, 8), norm_num_groups=4,
                        down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4)  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    latents = torch.randn(3, 4, 4, 4)
    images = decode(latents, load_vae(str(tmp_path / "vae")), batch_size=2)
    with torch.no_grad():
        pixels = vae.eval().decode(latents / 0.18215).sample
    expected = (pixels.permute(0, 2, 3, 1).numpy() * 127.5 + 127.5).round().clip(0, 255)
    assert images.shape == (3, 32, 32, 3)
    assert np.abs(images.numpy() - expected).max() <= 1


def test_vae_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--vae .*nothing"):
        load_vae(str(tmp_path / "nothing"))
    assert load_vae("none") is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_sample_that_is_not_finite_is_named_and_never_drawn(value):
    """As uint8, NaN is black and infinity white: a picture like any other."""
    x_0 = torch.zeros(4, 1, 2, 2)
    x_0[2, 0, 1, 1] = value
    with pytest.raises(ValueError, match=r"sample 2: x_0 is not finite"):
        decode(x_0)
    with pytest.raises(ValueError, match=r"sample 34: x_0 is not finite"):
        decode(x_0, first=32)
    x_0[3] = value
    with pytest.raises(ValueError, match=r"sample 2 \(and 1 more of 4\)"):
        decode(x_0)


@pytest.mark.parametrize(("error", "is_said"), [(cli.OneProcessError, True), (ValueError, False)])
def test_what_one_process_meets_it_says_whatever_its_rank(monkeypatch, capsys, error, is_said):
    """A wrong flag all processes meet, and the first one says it; a bad sample is one process's own."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_RANK", "1")

    def main(_):
        raise error("sample 17")

    with pytest.raises(SystemExit) as ended:
        cli.run(main, None)
    assert ended.value.code == 2
    assert ("sample 17" in capsys.readouterr().err) == is_said


def test_decoded_image_that_is_not_finite_is_named():
    class Overflows:
        def decode(self, latents):
            return type("Out", (), {"sample": latents[:, :3] / (latents[:, :1] > 0)})

    latents = torch.ones(3, 4, 2, 2)
    latents[1] = -1.0
    with pytest.raises(ValueError, match="sample 1: the decoded image is not finite"):
        decode(latents, Overflows())


def test_seeded_samples_are_checked_with_their_number(tiny_model):
    """Whoever measures them: demo, study, precisions."""
    trajectory, labels = Trajectory(tiny_model, create_diffusion("3")), torch.arange(5)

    def sample_with_a_fault(*setting):
        x_0 = sample(*setting)
        x_0[-1, 0, 0, 0] = torch.nan
        return x_0

    with pytest.raises(ValueError, match=r"sample 103 \(and 1 more of 5\): x_0 is not finite"):
        generate_seeded(trajectory, labels, 0, batch_size=4, first=100, sample=sample_with_a_fault)


@pytest.mark.parametrize("step", [5, 1, 0])
def test_ddpm_without_learned_variance_equals_diffusers(step):
    """Its variance is then the posterior's, "fixed_small"."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False, variance_type="fixed_small")
    x, output = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    theirs = scheduler.step(output, step, x, generator=torch.Generator().manual_seed(step)).prev_sample
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(step))
    ours = create_diffusion("", learn_sigma=False).ddpm_step(output, x, step, noise)
    assert relative_error(ours, theirs) < 1e-4


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_model_without_null_label_or_learned_variance_samples(sampler):
    from backbones.loading import randomize

    model = build_model("DiT-S/8", 64, 10, class_dropout_prob=0.0, learn_sigma=False)
    randomize(model)
    diffusion = create_diffusion("3", learn_sigma=model.learn_sigma)
    schedule = Schedule(torch.tensor([[False], [True], [True]]).expand(3, 24).clone())
    trajectory = Trajectory.of(model, diffusion, sampler=sampler, schedule=schedule)
    x_0 = generate_seeded(trajectory, torch.tensor([9, 0]), 1)
    assert x_0.shape == (2, 4, 8, 8)
    with pytest.raises(ValueError, match="guidance 2 needs a null label"):
        generate_seeded(Trajectory(model, diffusion, 2.0), torch.tensor([9]), 1)
