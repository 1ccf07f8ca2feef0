"""Many samples into one .npz: the same bytes for any processes, batch size and interruption."""

import json
import signal
import subprocess
import sys
import time
from collections import namedtuple

import numpy as np
import pytest
import torch
from commands import ENVIRONMENT, ROOT, error_line, run, torchrun

from baselines import fora_schedule
from diffusion import create_diffusion
from sample_ddp import Parts, batches
from sampling import SAMPLING_STREAM, decode, draw_noise, generate, load_model, sample_generator

SAMPLE = ["sample_ddp.py", "--model", "DiT-digits/2", "--num-sampling-steps", 4, "--device", "cpu"]
SAMPLE += ["--accelerate-method", "fora", "--interval", 2, "--seed", 5]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """75 samples on one process in batches of 32."""
    path = tmp_path_factory.mktemp("samples") / "plain.npz"
    run(*SAMPLE, "--num-samples", 75, "--output", path)
    return path


def test_what_is_written(plain):
    with np.load(plain) as file:
        assert file.files == ["arr_0"]
        images = file["arr_0"]
    assert images.dtype == np.uint8
    assert images.shape == (75, 8, 8, 1)
    facts = json.loads(plain.with_name("plain.npz.settings.json").read_text())
    assert facts["accelerate_method"] == "fora"
    assert facts["seed"] == 5
    assert not list(plain.parent.glob("*.parts"))


def test_sample_k_is_drawn_from_seed_and_k_alone(plain):
    """By hand, without the command's code: sample 40 with its noise, its label and the schedule."""
    model, k = load_model("DiT-digits/2"), 40
    noise = draw_noise(model, [sample_generator(5, SAMPLING_STREAM, k)])
    label = torch.randint(10, (1,), generator=sample_generator(5, SAMPLING_STREAM, k, 1))
    x_0 = generate(model, create_diffusion("4"), label, noise, 1.5, schedule=fora_schedule(4, 24, 2))
    with np.load(plain) as file:
        difference = file["arr_0"][k].astype(int) - decode(x_0)[0].numpy().astype(int)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("batch_size", [1, 50, 500])
def test_batch_size_changes_no_byte(plain, tmp_path, batch_size):
    run(*SAMPLE, "--num-samples", 75, "--output", tmp_path / "x.npz", "--batch-size", batch_size)
    assert (tmp_path / "x.npz").read_bytes() == plain.read_bytes()


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(plain, tmp_path):
    torchrun(2, *SAMPLE, "--num-samples", 75, "--output", tmp_path / "x.npz", "--batch-size", 16)
    assert (tmp_path / "x.npz").read_bytes() == plain.read_bytes()


@pytest.mark.slow
def test_killed_and_run_again(plain, tmp_path):
    """kill -9 while batches are being written; the next run, in other batches, draws only the rest."""
    output = tmp_path / "x.npz"
    arguments = [*SAMPLE, "--num-samples", 75, "--output", output]
    command = [sys.executable, *map(str, arguments), "--batch-size", "16"]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT)
    parts, deadline = tmp_path / "x.npz.parts", time.monotonic() + 120
    while len(list(parts.glob("*-00016.npy"))) < 1:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    finished = {path.name for path in parts.glob("*-00016.npy")}
    (parts / f"0000016-00016.{process.pid}.part.npy").write_bytes(b"half a batch")  # what a kill leaves
    text = run(*arguments)
    assert f"{75 - 16 * len(finished)} to draw" in text
    assert output.read_bytes() == plain.read_bytes()
    assert not parts.exists()
    assert "holds these samples already" in run(*arguments)


def test_killed_while_it_puts_things_in_place(plain, tmp_path):
    """Each state between the last batch and the end: what is done is kept, what nobody answers for goes."""
    output = tmp_path / "x.npz"
    arguments = [*SAMPLE, "--num-samples", 75, "--output", output]
    settings = plain.with_name("plain.npz.settings.json").read_bytes()
    (tmp_path / "x.npz.settings.json").write_bytes(settings)  # killed before the .npz was in place
    (tmp_path / "x.1234.part.npz").write_bytes(b"half a file")
    parts = tmp_path / "x.npz.parts"
    parts.mkdir()
    np.save(parts / "0000000-00075.npy", np.zeros((75, 8, 8, 1), np.uint8))  # without settings: whose?
    assert "75 to draw" in run(*arguments)
    assert output.read_bytes() == plain.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"x.npz", "x.npz.settings.json"}
    parts.mkdir()  # killed while the parts were removed
    (parts / "0000000-00032.npy").write_bytes(b"")
    assert "holds these samples already" in run(*arguments)
    assert not parts.exists()


def test_other_commands_files_are_left_alone(tmp_path):
    """Beside x.npz another command puts together x.fora.npz."""
    theirs = tmp_path / "x.fora.1234.part.npz"
    theirs.write_bytes(b"half a file")
    Parts(tmp_path / "x.npz", {}, (8, 8, 1), 48).open()
    assert theirs.exists()


def test_a_gap_is_never_put_in_place(tmp_path):
    """The same command twice at once: the other one has finished and removed the parts before the last."""
    parts = Parts(tmp_path / "x.npz", {}, (8, 8, 1), 48)
    parts.output.write_bytes(b"what the other one wrote")
    parts.write(32, torch.zeros(16, 8, 8, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="lacks 32 samples that were drawn"):
        parts.assemble()
    assert parts.output.read_bytes() == b"what the other one wrote"


def test_batches_cover_what_is_missing_in_whole_blocks():
    missing = [*range(16, 48), *range(80, 100)]
    assert batches(missing, 32, 100) == [range(16, 48), range(80, 100)]
    assert batches(list(range(100)), 32, 100) == [range(0, 32), range(32, 64), range(64, 96), range(96, 100)]


def test_uniform_labels(tmp_path):
    """With labels in turn and hardly any step, samples still follow their labels more often than not."""
    from digits.classifier import load_classifier

    run(*SAMPLE, "--num-samples", 40, "--labels", "uniform", "--output", tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as file:
        x = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2).float() / 127.5 - 1
    recognised = load_classifier()(x).argmax(1) == torch.arange(40) % 10
    assert recognised.float().mean() > 0.9


def test_wrong_use_is_one_line(plain, tmp_path, monkeypatch):
    assert "seed 5, this command 6" in error_line(
        *SAMPLE, "--num-samples", 75, "--output", plain, "--seed", 6
    )
    other = tmp_path / "other.npz"
    other.write_bytes(b"")
    assert "exists, not of this command" in error_line(*SAMPLE, "--output", other)
    space = namedtuple("space", "free")(1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: space)
    new = tmp_path / "new.npz"
    assert "GB free; make space" in error_line(*SAMPLE, "--num-samples", 75, "--output", new)
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "is not writable" in error_line(*SAMPLE, "--num-samples", 75, "--output", new)
    assert not list(tmp_path.glob("new*"))
    text = run("sample_ddp.py", "--output", "x.png", status=2)
    assert "does not end in .npz" in text
    text = run(*SAMPLE, "--accelerate-method", "magic", status=2)
    assert "'magic' is unknown; choose one of none, fewer-steps, fora" in text
