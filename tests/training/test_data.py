"""What Learning-to-Cache trains on: pictures that cannot be read, and arrays of the wrong type or shape."""

import multiprocessing
import os
import re
import signal

import numpy as np
import pytest
import torch
from commands import error_line, run
from PIL import Image
from ranks import run_on_ranks

from models import DiT
from training.data import center_crop, numbered_batches, open_data

TRAIN = ["train_router.py", "--method", "l2c", "--model", "DiT-digits/2", "--device", "cpu"]
TRAIN += ["--num-sampling-steps", 6, "--global-batch-size", 4, "--max-steps", 2]


@pytest.fixture(scope="module")
def latent_model() -> DiT:
    return DiT(input_size=4, hidden_size=24, depth=1, num_heads=2, num_classes=2)


@pytest.fixture
def pictures(tmp_path):
    for label in ("cats", "dogs"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for number in range(4):
            noise = Image.effect_noise((70, 50), 50 + number)
            noise.save(tmp_path / "pictures" / label / f"{number}.png")
    return tmp_path / "pictures"


def cut(path):
    path.write_bytes(path.read_bytes()[:900])


def test_pictures_of_any_mode_are_those_that_they_show(pictures, latent_model):
    """16 bits, a palette, opacity: the same tensor as the plain RGB picture gives."""
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (50, 70)).astype(np.uint8)
    kinds = pictures / "kinds"
    kinds.mkdir()
    Image.fromarray(grey).convert("RGB").save(kinds / "0.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(kinds / "1.png")
    Image.fromarray(grey).save(kinds / "2.png")
    Image.fromarray(grey).convert("P").save(kinds / "3.png")
    Image.fromarray(grey).convert("RGBA").save(kinds / "4.tif")
    latent_model.num_classes = 3
    data = open_data(str(pictures), latent_model)
    latent_model.num_classes = 2
    own = [x for x, label in data if label == data.class_to_idx["kinds"]]
    crop = center_crop(Image.fromarray(grey).convert("RGB"), 32)
    expected = torch.from_numpy(np.array(crop)).permute(2, 0, 1)
    assert len(own) == 5
    assert all(torch.equal(x, expected) for x in own)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_picture_that_cannot_be_read_is_named_when_its_batch_comes(pictures, latent_model, num_workers):
    cut(pictures / "dogs" / "2.png")
    batches = numbered_batches(open_data(str(pictures), latent_model), 0, 0, 2, 0, 1, num_workers)
    whole = []
    with pytest.raises(OSError, match=r"dogs/2\.png cannot be read as a picture \(.*truncated") as error:
        whole.extend(batches)
    assert "\n" not in str(error.value)
    assert not multiprocessing.active_children()  # the workers have ended
    assert len(whole) < 4
    assert all(x.shape == (2, 3, 32, 32) and labels.shape == (2,) for x, labels in whole)


def test_several_frames_and_floats_are_refused_in_a_worker_too(pictures, latent_model):
    picture = Image.open(pictures / "cats" / "1.png").copy()
    for label in ("cats", "dogs"):
        for path in (pictures / label).iterdir():
            path.unlink()
    picture.save(pictures / "cats" / "pages.tif", save_all=True, append_images=[picture])
    data = open_data(str(pictures), latent_model)
    with pytest.raises(OSError, match=r"pages\.tif holds 2 frames"):
        next(numbered_batches(data, 0, 0, 1, 0, 1, 1))


def test_worker_that_was_killed_is_one_line():
    """As the system does where memory is short."""

    class Killed(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, _):
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(OSError, match=r"DataLoader worker .*--num-works 0 reads without workers") as error:
        next(numbered_batches(Killed(), 0, 0, 2, 0, 1, 1))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_picture_that_cannot_be_read_ends_all_processes_with_one_line(pictures, tmp_path):
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4, **blocks)
    vae.save_pretrained(tmp_path / "vae")
    cut(pictures / "cats" / "0.png")  # the first of all: no process reads it but the one whose turn it is
    arguments = ["--model", "DiT-S/8", "--random-weights", "--image-size", 64, "--num-classes", 2]
    arguments += ["--data", pictures, "--vae", tmp_path / "vae", "--num-works", 1, "--max-steps", 9]
    arguments += ["--results-dir", tmp_path / "results"]
    text = run_on_ranks(2, *TRAIN, *arguments, status=2)
    assert len(re.findall(r"^train_router\.py: error: .*cats/0\.png cannot be read", text, re.MULTILINE)) == 1
    assert "common/cli.py" not in text  # no traceback of ours, from neither process


X, Y = np.random.default_rng(0).normal(size=(4, 1, 8, 8)).astype(np.float32), np.array([3, 1, 4, 1])
WRONG = {
    "a column of labels": (X, Y[:, None], r"labels is int64 (4, 1); integers (n,) are needed"),
    "one label": (X, Y[0], r"labels is int64 (); integers (n,) are needed"),
    "float labels": (X, Y.astype(float), "labels is float64 (4,); integers (n,) are needed"),
    "bools": (X, Y > 2, "labels is bool (4,)"),
    "strings": (X, Y.astype(str), "labels is <U21 (4,)"),
    "objects": (X, Y.astype(object), "labels is object (4,)"),
    "one-hot labels": (X, np.eye(10, dtype=int)[Y], "labels is int64 (4, 10)"),
    "a class too many": (X, Y + 6, "the labels within 0 .. 9"),
    "a negative class": (X, Y - 2, "the labels within 0 .. 9"),
    "huge labels": (X, Y.astype(np.uint64) + 2**63, "the labels within 0 .. 9"),
    "fewer labels": (X, Y[:3], "4 latents and 3 labels"),
    "nothing": (X[:0], Y[:0], "0 latents and 0 labels"),
    "integer latents": (X.astype(int), Y, "latents is int64 (4, 1, 8, 8); real floating-point numbers"),
    "complex latents": (X * 1j, Y, "latents is complex64"),
    "flat latents": (X.reshape(4, 64), Y, "latents is float32 (4, 64); real floating-point numbers (n,"),
    "NaN": (np.where(X[2, 0, 3, 3] == X, np.nan, X), Y, "hold NaN or infinity, the first in number 2"),
    "infinity": (np.where(X[1, 0, 3, 3] == X, -np.inf, X), Y, "the first in number 1"),
    "more than float32 holds": (X.astype(np.float64) * 1e300, Y, "latents hold NaN or infinity"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_arrays_are_checked_by_type_and_shape(tmp_path, case):
    latents, labels, words = WRONG[case]
    with np.errstate(over="ignore"):
        np.savez(tmp_path / "y.npz", latents=latents, labels=labels)
        line = error_line(*TRAIN, "--data", tmp_path / "y.npz", "--results-dir", tmp_path / "results")
    assert "y.npz" in line
    assert words in line
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("change", "label_type"),
    [
        (lambda x: x.astype(">f4"), ">i8"),
        (lambda x: x.astype(np.float16), np.uint8),
        (lambda x: x.astype(">f2"), ">u2"),
        (lambda x: x.astype(np.float64), np.uint64),
        (np.asfortranarray, np.int32),
    ],
)
def test_arrays_of_other_types_are_read(tmp_path, change, label_type):
    """What else the file holds is not looked at."""
    model = DiT(input_size=8, in_channels=1, hidden_size=24, depth=1, num_heads=2, num_classes=10)
    notes = np.array([{"any": "object"}], dtype=object)
    np.savez(tmp_path / "x.npz", latents=change(X), labels=Y.astype(label_type), notes=notes)
    data = open_data(str(tmp_path / "x.npz"), model)
    x, labels = data.tensors
    assert (x.dtype, labels.dtype) == (torch.float32, torch.int64)
    expected = torch.from_numpy(np.ascontiguousarray(change(X), dtype=np.float32))
    assert torch.equal(x, expected)
    assert labels.tolist() == Y.tolist()


def test_latents_that_were_not_scaled_are_warned_of(tmp_path):
    for factor, warned in ((1, False), (1 / 0.18215, True)):
        np.savez(tmp_path / "x.npz", latents=X * factor, labels=Y)
        text = run(*TRAIN, "--data", tmp_path / "x.npz", "--results-dir", tmp_path / "results")
        assert ("multiply them by the VAE's scaling factor" in text) == warned


def test_file_of_another_kind(tmp_path):
    np.save(tmp_path / "x.npy", X)
    torch.save({"latents": torch.from_numpy(X)}, tmp_path / "x.pt")
    (tmp_path / "x.npz").write_bytes(b"")
    for name, words in (
        ("x.npy", "cannot be read"),
        ("x.pt", "holds no arrays"),
        ("x.npz", "cannot be read"),
    ):
        assert words in error_line(*TRAIN, "--data", tmp_path / name)
