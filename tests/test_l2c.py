"""Training Learning-to-Cache: its data, what it trains, processes and resuming, wrong use."""

import numpy as np
import pytest
import torch
from commands import error_line, run, torchrun
from PIL import Image

from data import center_crop, numbered_batches, open_data, to_model_space
from router import find_router, load_router
from sampling import build_model

TRAIN = [
    "train_router.py",
    "--model",
    "DiT-digits/2",
    "--method",
    "l2c",
    "--data",
    "digits",
    "--device",
    "cpu",
]
TRAIN += ["--num-sampling-steps", 6, "--global-batch-size", 4, "--lr", 0.05, "--l1", 1e-3, "--log-every", 5]


def trained(results):
    return load_router(find_router(next(results.glob("0*"))))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    run(*TRAIN, "--results-dir", results, "--max-steps", 20)
    return trained(results)


def test_even_rows_are_trained_and_odd_ones_compute(uninterrupted):
    initial = torch.randn(5, 24, generator=torch.Generator().manual_seed(42))
    assert not any(torch.equal(uninterrupted.rows[row], initial[row]) for row in (0, 2, 4))
    assert torch.isinf(uninterrupted.logits[1::2]).all()
    assert torch.isfinite(uninterrupted.logits[::2]).all()
    schedule = uninterrupted.schedule(0.9)
    assert schedule.compute[1::2].all()
    assert schedule.cur > 0.3
    assert uninterrupted.info["method"] == "l2c"
    assert uninterrupted.info["cfg_scale"] == 1.0


def test_every_row_trains_all_but_the_first(tmp_path):
    run(*TRAIN, "--results-dir", tmp_path, "--max-steps", 30, "--every-row")
    router = trained(tmp_path)
    assert torch.isfinite(router.logits).all()
    initial = torch.randn(5, 24, generator=torch.Generator().manual_seed(42))
    assert not any(torch.equal(router.rows[row], initial[row]) for row in range(5))
    assert router.info["method"] == "l2c-every-row"


def test_resumed_run_is_the_same(uninterrupted, tmp_path):
    run(*TRAIN, "--results-dir", tmp_path, "--max-steps", 9)
    run(*TRAIN, "--results-dir", tmp_path, "--max-steps", 20, "--resume", "auto")
    assert torch.equal(trained(tmp_path).logits, uninterrupted.logits)


@pytest.mark.slow
def test_two_processes_train_the_same_router(uninterrupted, tmp_path):
    torchrun(2, *TRAIN, "--results-dir", tmp_path, "--max-steps", 20)
    torch.testing.assert_close(trained(tmp_path).logits, uninterrupted.logits, atol=1e-5, rtol=1e-5)


def test_batches_cover_an_epoch_once_whoever_draws_them():
    data = open_data("digits", build_model("DiT-digits/2"))
    n, size = len(data), 600

    def drawn(world_size: int, first: int = 0) -> list[torch.Tensor]:
        streams = [numbered_batches(data, 3, first, size, rank, world_size, 0) for rank in range(world_size)]
        return [torch.cat([next(stream)[0] for stream in streams]) for _ in range(3 - first)]

    one = drawn(1)
    assert all(torch.equal(a, b) for a, b in zip(one, drawn(2), strict=True))
    assert torch.equal(one[1], drawn(1, first=1)[0])
    epoch = torch.cat(one)[:n].flatten(1)
    everything = torch.stack([data[i][0] for i in range(n)]).flatten(1)
    assert torch.equal(epoch.sum(0), everything.sum(0))  # the same images in another order
    assert not torch.equal(epoch, everything)


def test_crop_is_the_middle_square():
    pixels = np.zeros((40, 80, 3), dtype=np.uint8)
    pixels[:, 20:60] = 255
    assert np.asarray(center_crop(Image.fromarray(pixels), 16)).min() > 200
    assert center_crop(Image.fromarray(pixels), 16).size == (16, 16)


class FakeVae:
    """Encodes to the mean of 8 x 8 patches in four equal channels, without spread."""

    def encode(self, x):
        mean = torch.nn.functional.avg_pool2d(x, 8).mean(1, keepdim=True).repeat(1, 4, 1, 1)
        posterior = type("Posterior", (), {"mean": mean, "std": torch.zeros_like(mean)})
        return type("Encoded", (), {"latent_dist": posterior})


def test_images_are_flipped_by_their_generator_encoded_and_scaled():
    x = torch.zeros(20, 3, 16, 16, dtype=torch.uint8)
    x[..., 8:] = 255
    generators = [torch.Generator().manual_seed(seed) for seed in range(20)]
    latents = to_model_space(x, FakeVae(), generators)
    assert latents.shape == (20, 4, 2, 2)
    torch.testing.assert_close(latents.abs(), torch.full_like(latents, 0.18215))
    flipped = int((latents[:, 0, 0, 0] > 0).sum())
    assert 4 < flipped < 16


@pytest.fixture
def image_folder(tmp_path):
    for label in ("cats", "dogs"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(3):
            Image.effect_noise((70, 50), 50 + number).save(tmp_path / "images" / label / f"{number}.png")
    return tmp_path / "images"


@pytest.mark.slow
def test_image_folder_through_a_vae(image_folder, tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=down,
        up_block_types=up,
    )
    vae.save_pretrained(tmp_path / "vae")
    arguments = ["--model", "DiT-S/8", "--random-weights", "--image-size", 64, "--num-classes", 2]
    arguments += ["--data", image_folder, "--vae", tmp_path / "vae", "--num-works", 1, "--max-steps", 3]
    run(*TRAIN, *arguments, "--results-dir", tmp_path / "results")
    assert trained(tmp_path / "results").info["train_steps"] == 3


def test_latents_from_a_file(tmp_path):
    np.savez(tmp_path / "x.npz", latents=np.zeros((5, 1, 8, 8), np.float32), labels=np.arange(5))
    run(*TRAIN, "--data", tmp_path / "x.npz", "--results-dir", tmp_path / "results", "--max-steps", 2)
    np.savez(tmp_path / "y.npz", latents=np.zeros((5, 4, 8, 8), np.float32), labels=np.arange(5))
    line = error_line(*TRAIN, "--data", tmp_path / "y.npz", "--results-dir", tmp_path / "no")
    assert "holds samples of shape (4, 8, 8), the model denoises (1, 8, 8)" in line
    np.savez(tmp_path / "l.npz", latents=np.zeros((5, 1, 8, 8), np.float32), labels=np.arange(6, 11))
    line = error_line(*TRAIN, "--data", tmp_path / "l.npz", "--results-dir", tmp_path / "no")
    assert "5 latents and 5 labels; as many are needed, the labels within 0 .. 9" in line
    (tmp_path / "cut.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:700])
    line = error_line(*TRAIN, "--data", tmp_path / "cut.npz", "--results-dir", tmp_path / "no")
    assert "cannot be read" in line
    np.savez(tmp_path / "z.npz", x=np.zeros(3))
    line = error_line(*TRAIN, "--data", tmp_path / "z.npz", "--results-dir", tmp_path / "no")
    assert "holds x; `latents` and `labels` are needed" in line
    assert not (tmp_path / "no").exists()


def test_wrong_use(tmp_path, image_folder):
    no_data = [part for part in TRAIN if part not in ("--data", "digits")]
    assert "--method l2c needs --data" in run(*no_data, status=2)
    assert "does not exist; give an image folder" in error_line(*TRAIN, "--data", "nowhere")
    assert "use digits" in error_line(*TRAIN, "--data", image_folder)
    latent = ["--model", "DiT-S/8", "--random-weights", "--image-size", 64, "--num-classes", 3]
    line = error_line(*TRAIN, *latent, "--data", image_folder, "--results-dir", tmp_path / "no")
    assert "has 2 folders, the model 3 classes" in line
    np.save(tmp_path / "x.npy", np.zeros(3))
    (tmp_path / "x.npy").rename(tmp_path / "x.npz")
    assert "cannot be read" in error_line(*TRAIN, "--data", tmp_path / "x.npz")
    assert "0 is not above 0" in run(*TRAIN, "--lr", 0, status=2)
    text = run(*TRAIN, "--results-dir", tmp_path / "r", "--max-steps", 1, "--proxy", "paper")
    assert "warning: --proxy has no effect with --method l2c" in text
