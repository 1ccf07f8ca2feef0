"""Many samples into one .npz: the same bytes for any processes, batch size and interruption."""

import io
import json
import os
import pkgutil
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from commands import (
    alive,
    error_line,
    file_size_limit,
    kill,
    run,
    start_torchrun,
    wait_for,
    writing_elsewhere,
)
from ranks import run_on_ranks

from backbones.loading import load_model
from common.distributed import Processes
from diffusion import create_diffusion
from sampling.decoding import decode
from sampling.loop import Trajectory, generate, generate_seeded
from sampling.parts import Parts, batches
from sampling.seeds import SAMPLING_STREAM, draw_noise, sample_generator
from schedules.baselines import fora_schedule

SAMPLE = ["sample_ddp.py", "--model", "DiT-digits/2", "--num-sampling-steps", 4, "--device", "cpu"]
SAMPLE += ["--accelerate-method", "fora", "--interval", 2, "--seed", 5]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """51 samples on one process in batches of 32."""
    path = tmp_path_factory.mktemp("samples") / "plain.npz"
    run(*SAMPLE, "--num-samples", 51, "--output", path)
    return path


def test_what_is_written(plain):
    with np.load(plain) as file:
        assert file.files == ["arr_0"]
        images = file["arr_0"]
    assert images.dtype == np.uint8
    assert images.shape == (51, 8, 8, 1)
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
    run(*SAMPLE, "--num-samples", 51, "--output", tmp_path / "x.npz", "--batch-size", batch_size)
    assert (tmp_path / "x.npz").read_bytes() == plain.read_bytes()


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(plain, tmp_path):
    run_on_ranks(2, *SAMPLE, "--num-samples", 51, "--output", tmp_path / "x.npz", "--batch-size", 16)
    assert (tmp_path / "x.npz").read_bytes() == plain.read_bytes()


def at_call(function, number: int):
    """The function, but its call of this number ends the process at once, as kill -9 would."""
    calls = iter(range(1, number))
    return lambda *given, **named: function(*given, **named) if next(calls, None) else os._exit(KILLED)


def after_call(function, number: int):
    """The same, at once after the call."""

    def called(*given, **named):
        result = function(*given, **named)
        return result if next(calls, None) else os._exit(KILLED)

    calls = iter(range(1, number))
    return called


def then_killed(name: str, kill, number: int, arguments: list) -> None:
    """Run the command in a process of its own, which ends at a call of the function of this name."""
    child = os.fork()
    if child == 0:
        try:
            with mock.patch(name, kill(pkgutil.resolve_name(name), number)):
                run(*arguments)
        finally:
            os._exit(1)  # it was not killed
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == KILLED


KILLED = 137  # what a shell says of kill -9
MOMENTS = {  # what is called at the end of the process, which of its calls, how many of 51 are left to draw
    "before the first batch": ("sampling.parts.Parts.write", at_call, 1, 51),
    "in the second batch's file": ("sampling.parts._trailer", at_call, 2, 35),
    "after the third batch": ("sampling.parts.Parts.write", after_call, 3, 3),
    "before the .npz": ("sampling.parts.Parts.assemble", at_call, 1, 0),
    "in the .npz": ("sampling.parts.Parts._read", at_call, 2, 0),
    "before the parts are removed": ("sampling.parts.Parts._remove_folder", at_call, 1, None),
    "before the folder is": ("shutil.rmtree", after_call, 1, None),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_run_again(plain, tmp_path, moment):
    """The next run, in other batches, draws only the rest."""
    name, kill, number, left = MOMENTS[moment]
    output = tmp_path / "x.npz"
    arguments = [*SAMPLE, "--num-samples", 51, "--output", output]
    then_killed(name, kill, number, [*arguments, "--batch-size", 16])
    assert output.exists() == (left is None)
    text = run(*arguments)
    assert ("holds these samples already" if left is None else f"{left} to draw") in text
    assert output.read_bytes() == plain.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"x.npz", "x.npz.settings.json"}
    assert "holds these samples already" in run(*arguments)


@pytest.mark.parametrize("number", [1, 2])
def test_killed_with_weights_of_reuse(calibrated, tmp_path, number):
    """While they are solved, and after the first batch that was drawn with them."""
    output = tmp_path / "x.npz"
    arguments = [*SAMPLE, *CALIBRATED, "--num-samples", 40, "--output", output]
    name = ("schedules.methods.solved", "sampling.parts.Parts.write")[number - 1]
    then_killed(name, at_call, number, [*arguments, "--batch-size", 16])
    assert f"{(40, 24)[number - 1]} to draw" in run(*arguments)
    assert output.read_bytes() == calibrated.read_bytes()


def test_killed_while_it_puts_things_in_place(plain, tmp_path):
    """Each state between the last batch and the end: what is done is kept, what nobody answers for goes."""
    output = tmp_path / "x.npz"
    arguments = [*SAMPLE, "--num-samples", 51, "--output", output]
    settings = plain.with_name("plain.npz.settings.json").read_bytes()
    (tmp_path / "x.npz.settings.json").write_bytes(settings)  # killed before the .npz was in place
    (tmp_path / "x.1234.part.npz").write_bytes(b"half a file")
    parts = tmp_path / "x.npz.parts"
    parts.mkdir()
    np.save(parts / "0000000-00051.npy", np.zeros((51, 8, 8, 1), np.uint8))  # without settings: whose?
    assert "51 to draw" in run(*arguments)
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


IMAGES = np.arange(16 * 64, dtype=np.uint8).reshape(16, 8, 8, 1)


def npy(array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def whole_part(tmp_path) -> bytes:
    """A batch as it is written."""
    parts = Parts(tmp_path / "other.npz", {}, (8, 8, 1), 48)
    parts.write(16, torch.from_numpy(IMAGES))
    return (parts.folder / "0000016-00016.npy").read_bytes()


UNSOUND = {
    "empty": lambda _: b"",
    "cut in its header": lambda content: content[:50],
    "cut in its data": lambda content: content[:600],
    "without its last byte": lambda content: content[:-16],
    "zero-filled": lambda content: bytes(len(content)),
    "zero-filled at its end": lambda content: content[:600] + bytes(len(content) - 600),
    "one bit another": lambda content: content[:300] + bytes([content[300] ^ 1]) + content[301:],
    "of nine images": lambda _: npy(IMAGES[:9]),
    "of another size": lambda _: npy(np.zeros((16, 4, 4, 1), np.uint8)),
    "of another dtype": lambda _: npy(IMAGES.astype(np.float32)),
    "in Fortran's order": lambda _: npy(np.asfortranarray(IMAGES)),
    "of objects": lambda _: npy(np.array([{}], dtype=object)),
    "of more than there is memory for": lambda _: npy(IMAGES).replace(b"(16, 8", b"(10**15, 8"),
    "a web page": lambda _: b"<html>" + bytes(2000),
}


@pytest.mark.parametrize("kind", UNSOUND)
def test_unsound_batch_is_drawn_again_and_named(tmp_path, kind):
    with Parts(tmp_path / "x.npz", {"seed": 1}, (8, 8, 1), 48) as parts:
        parts.open()
        for first in (0, 16):
            parts.write(first, torch.from_numpy(IMAGES))
        file = parts.folder / "0000016-00016.npy"
        file.write_bytes(UNSOUND[kind](whole_part(tmp_path)))
    with Parts(tmp_path / "x.npz", {"seed": 1}, (8, 8, 1), 48) as parts:
        assert not parts.open()
        assert parts.missing() == [*range(16, 48)]
        (note,) = parts.notes
        assert note.startswith(f"{file} ")
        assert note.endswith("its samples are drawn again")


def test_sound_batches_are_kept_also_those_without_a_checksum(tmp_path):
    """Earlier versions wrote none."""
    with Parts(tmp_path / "x.npz", {"seed": 1}, (8, 8, 1), 48) as parts:
        parts.open()
        parts.write(0, torch.from_numpy(IMAGES))
        np.save(parts.folder / "0000032-00016.npy", IMAGES)
        np.save(parts.folder / "0000040-00016.npy", IMAGES)  # beyond the last sample
    with Parts(tmp_path / "x.npz", {"seed": 1}, (8, 8, 1), 48) as parts:
        parts.open()
        assert parts.missing() == [*range(16, 32)]
        assert "is beyond the 48 samples" in parts.notes[0]
        parts.write(16, torch.from_numpy(IMAGES))
        parts.assemble()
    with np.load(tmp_path / "x.npz") as file:
        assert np.array_equal(file["arr_0"], np.concatenate([IMAGES] * 3))


def test_a_batch_that_is_damaged_while_it_waits_is_named_and_not_assembled(tmp_path):
    with Parts(tmp_path / "x.npz", {"seed": 1}, (8, 8, 1), 32) as parts:
        parts.open()
        for first in (0, 16):
            parts.write(first, torch.from_numpy(IMAGES))
        file = parts.folder / "0000016-00016.npy"
        file.write_bytes(file.read_bytes()[:-20] + bytes(20))
        with pytest.raises(ValueError, match=f"{file} is cut or damaged"):
            parts.assemble()
    assert not (tmp_path / "x.npz").exists()


@pytest.mark.parametrize("content", [b"", b"{", bytes(100), b"[]", b"null", None])
def test_batches_of_unreadable_settings_are_drawn_again(plain, tmp_path, content):
    output = tmp_path / "x.npz"
    parts = tmp_path / "x.npz.parts"
    parts.mkdir()
    np.save(parts / "0000000-00016.npy", IMAGES)
    if content is not None:
        (parts / "settings.json").write_bytes(content)
    text = run(*SAMPLE, "--num-samples", 51, "--output", output)
    assert f"{parts}/settings.json is {'missing' if content is None else 'damaged'}" in text
    assert "its 1 batches are drawn again" in text
    assert "51 to draw" in text
    assert output.read_bytes() == plain.read_bytes()


@pytest.mark.parametrize("content", [b"", b"{", bytes(100), b"[]"])
def test_samples_of_unreadable_settings_are_not_this_commands(plain, tmp_path, content):
    output = Path(shutil.copy(plain, tmp_path / "x.npz"))
    (tmp_path / "x.npz.settings.json").write_bytes(content)
    line = error_line(*SAMPLE, "--num-samples", 51, "--output", output)
    assert "x.npz.settings.json is damaged" in line
    assert "take another --output" in line
    output.unlink()  # then nobody needs them
    run(*SAMPLE, "--num-samples", 51, "--output", output)
    output.write_bytes(output.read_bytes()[:2000])
    assert "x.npz is not whole; remove it" in error_line(*SAMPLE, "--num-samples", 51, "--output", output)


CALIBRATED = ["--accelerate-method", "calibrated-fora", "--calibrate", 16]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibrated") / "plain.npz"
    run(*SAMPLE, *CALIBRATED, "--num-samples", 40, "--output", path)
    return path


def facts_of(path) -> dict:
    return json.loads(path.with_name(f"{path.name}.settings.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [CALIBRATED, ["--p-sample"], ["--accelerate-method", "none"]])
def test_threads_change_no_bit(tmp_path, monkeypatch, arguments):
    """Ten rows, the embeddings of ten steps, are a product that two threads round otherwise."""
    drawn, arguments = [], [*arguments, "--num-sampling-steps", 10, "--num-samples", 16]
    monkeypatch.setattr("sampling.parts.decode", lambda x_0, vae, **_: drawn.append(x_0) or decode(x_0, vae))
    for threads in (1, 3):
        torch.set_num_threads(threads)
        run(*SAMPLE, *arguments, "--output", tmp_path / f"{threads}.npz")
        assert torch.get_num_threads() == threads
        torch.set_num_threads(1)
        assert torch.equal(drawn[-1], drawn[0])
        assert facts_of(tmp_path / f"{threads}.npz") == facts_of(tmp_path / "1.npz")


@pytest.mark.parametrize("batch_size", [32, 64])
def test_batch_size_changes_no_bit_where_few_steps_are_made_ready_at_once(monkeypatch, batch_size):
    """As DiT-XL/2 has it in batches of 64: products of less than five rows are rounded otherwise."""
    model, labels = load_model("DiT-digits/2"), torch.arange(64)
    monkeypatch.setattr("backbones.denoiser.PREPARED_BYTES", 2**24)
    trajectory = Trajectory(model, create_diffusion("10"), 1.5, fora_schedule(10, 24, 10))
    wanted, found = (generate_seeded(trajectory, labels % 10, 0, n) for n in (16, batch_size))
    assert torch.equal(found, wanted)


def test_weights_of_reuse_are_solved_once(calibrated, tmp_path, monkeypatch):
    """A resumed run takes those that its batches were drawn with; a finished one is known without them."""
    output, parts = tmp_path / "x.npz", tmp_path / "x.npz.parts"
    arguments = [*SAMPLE, *CALIBRATED, "--num-samples", 40, "--batch-size", 16, "--output", output]
    with monkeypatch.context() as patch:
        patch.setattr("sampling.parts.Parts.assemble", lambda _: None)  # as if it had been killed
        run(*arguments)
    (parts / "0000016-00016.npy").unlink()

    def solved(*_):
        raise AssertionError("solved again")

    with monkeypatch.context() as patch:
        patch.setattr("schedules.methods.solved", solved)
        assert "16 to draw" in run(*arguments)
        assert "holds these samples already" in run(*arguments)
    assert output.read_bytes() == calibrated.read_bytes()
    assert facts_of(output)["reuse_weights"] == facts_of(calibrated)["reuse_weights"]
    line = error_line(*arguments, "--terms", 1)
    assert "says terms 3, this command 1" in line
    assert "says calibrate 16, this command 8" in error_line(*arguments, "--calibrate", 8)


@pytest.mark.parametrize("same", [True, False])
def test_lost_weights_of_reuse_are_solved_again(calibrated, tmp_path, monkeypatch, same):
    """Batches stay where the same weights come out, as they do but on another kind of machine."""
    output, parts = tmp_path / "x.npz", tmp_path / "x.npz.parts"
    arguments = [*SAMPLE, *CALIBRATED, "--num-samples", 40, "--batch-size", 16, "--output", output]
    with monkeypatch.context() as patch:
        patch.setattr("sampling.parts.Parts.assemble", lambda _: None)
        run(*arguments)
    (parts / "weights.safetensors").write_bytes(b"")
    if not same:
        facts = json.loads((parts / "settings.json").read_text()) | {"reuse_weights": "00000000"}
        (parts / "settings.json").write_text(json.dumps(facts))
    text = run(*arguments)
    assert f"{0 if same else 40} to draw" in text
    assert ("solves other weights: its 3 batches are drawn again" in text) == (not same)
    assert output.read_bytes() == calibrated.read_bytes()


@pytest.mark.slow
def test_calibrated_on_four_processes(calibrated, tmp_path):
    run_on_ranks(4, *SAMPLE, *CALIBRATED, "--num-samples", 40, "--output", tmp_path / "x.npz")
    assert (tmp_path / "x.npz").read_bytes() == calibrated.read_bytes()
    assert facts_of(tmp_path / "x.npz") == facts_of(calibrated)


def test_each_rank_draws_its_share(plain, tmp_path, monkeypatch):
    """One rank after the other, without a process group: the first one misses the share of the second."""
    arguments = [*SAMPLE, "--num-samples", 51, "--batch-size", 16, "--output", tmp_path / "x.npz"]
    parts = tmp_path / "x.npz.parts"
    for rank, firsts in ((0, [0, 32]), (1, [16, 48])):
        before = set(parts.glob("*.npy"))
        with monkeypatch.context() as patch:
            processes = Processes(rank, 2, torch.device("cpu"))
            patch.setattr("common.distributed.start", lambda *_, own=processes: own)
            if rank == 0:
                assert "lacks 19 samples that were drawn" in error_line(*arguments)
            else:
                patch.setattr("sampling.parts.Parts.missing", lambda _: list(range(51)))
                run(*arguments)
        drawn = sorted(int(path.stem[:7]) for path in set(parts.glob("*.npy")) - before)
        assert drawn == firsts
    assert "0 to draw" in run(*arguments)
    assert (tmp_path / "x.npz").read_bytes() == plain.read_bytes()


@pytest.mark.slow
def test_killed_on_two_processes(calibrated, tmp_path):
    """kill -9 of torchrun while batches are written: its processes end too, and the next run goes on."""
    arguments = [*SAMPLE, *CALIBRATED, "--num-samples", 40, "--batch-size", 16]
    arguments += ["--output", tmp_path / "x.npz"]
    process, parts = start_torchrun(2, *arguments), tmp_path / "x.npz.parts"
    wait_for(lambda: list(parts.glob("*-00016.npy")), process)
    assert len(alive(process)) >= 3
    assert kill(process) == []
    finished = sum(int(path.stem.split("-")[1]) for path in parts.glob("*[0-9].npy"))
    assert f"{40 - finished} to draw" in run_on_ranks(2, *arguments)
    assert (tmp_path / "x.npz").read_bytes() == calibrated.read_bytes()
    assert not list(tmp_path.glob("*.part*"))


def test_one_process_samples_into_a_file(plain, tmp_path, monkeypatch):
    monkeypatch.setattr("common.files.PATIENCE_S", 0.1)
    output, parts = tmp_path / "x.npz", tmp_path / "x.npz.parts"
    parts.mkdir()
    with writing_elsewhere(parts) as pid:
        line = error_line(*SAMPLE, "--num-samples", 51, "--output", output)
        assert f"{parts} is being written by process {pid} on" in line
    run(*SAMPLE, "--num-samples", 51, "--output", output)
    assert output.read_bytes() == plain.read_bytes()
    parts.mkdir()
    (parts / "0000000-00016.npy").touch()  # another one is removing its batches
    with writing_elsewhere(parts):
        assert "is being written" in error_line(*SAMPLE, "--num-samples", 51, "--output", output)
    assert "holds these samples already" in run(*SAMPLE, "--num-samples", 51, "--output", output)
    assert not parts.exists()


@pytest.mark.parametrize(
    ("limit", "what"), [(1500, "x.npz.parts/0000000-00032.npy"), (3000, "x.npz"), (300, "settings.json")]
)
def test_full_disk_is_one_line_and_batches_are_kept(plain, tmp_path, limit, what):
    output = tmp_path / "x.npz"
    arguments = [*SAMPLE, "--num-samples", 51, "--batch-size", 32, "--output", output]
    with file_size_limit(limit):
        line = error_line(*arguments)
    assert f"{what} cannot be written (" in line
    assert ("finished batches are kept" in line) == (limit > 300)
    assert not list(tmp_path.rglob("*.part.*"))
    assert not output.exists()
    assert f"{0 if limit == 3000 else 51} to draw" in run(*arguments)
    assert output.read_bytes() == plain.read_bytes()


def test_something_in_the_way_is_one_line_before_the_first_sample(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "x.npz.parts").touch()
    (tmp_path / "y.npz.settings.json").mkdir()
    (tmp_path / "z.npz").mkdir()
    for name, reason in (
        ("file/x.npz", "file is a file"),
        ("link/x.npz", "link is a link to nothing"),
        ("x.npz", "x.npz.parts is a file"),
        ("y.npz", "y.npz.settings.json is a folder"),
        ("z.npz", "exists, not of this command"),
    ):
        assert reason in error_line(*SAMPLE, "--num-samples", 51, "--output", tmp_path / name)


def test_the_spellings_of_neighbours(plain, tmp_path, monkeypatch):
    """DiT's and ADM's flags, and what older launchers pass on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    theirs = ["--num-fid-samples", 51, "--global-seed", 5, "--per-proc-batch-size", 16, "--sample-dir", "s/t"]
    run(*SAMPLE[:-2], *theirs, "--local-rank", 0)
    assert (tmp_path / "s" / "t" / "samples.npz").read_bytes() == plain.read_bytes()
    assert "holds these samples" in run(*SAMPLE[:-2], *theirs, "--local_rank=0", "--output", "samples.npz")
    text = run(*SAMPLE[:-2], *theirs, "--output", tmp_path / "s" / "t" / "samples.npz")
    assert "--sample-dir has no effect with an absolute --output" in text
    assert "holds these samples" in text


def test_quantization_without_its_package_is_one_line_before_a_file(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    line = error_line(*SAMPLE, "--quantize", "int8", "--output", tmp_path / "x.npz")
    assert "--quantize int8 needs torchao" in line
    assert not list(tmp_path.iterdir())


def test_batches_cover_what_is_missing_in_whole_blocks():
    missing = [*range(16, 48), *range(80, 100)]
    assert batches(missing, 32, 100) == [range(16, 48), range(80, 100)]
    assert batches(list(range(100)), 32, 100) == [range(0, 32), range(32, 64), range(64, 96), range(96, 100)]


def test_uniform_labels(tmp_path):
    """With labels in turn and hardly any step, samples still follow their labels more often than not."""
    from examples.digits.classifier import load_classifier

    run(*SAMPLE, "--num-samples", 40, "--labels", "uniform", "--output", tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as file:
        x = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2).float() / 127.5 - 1
    recognised = load_classifier()(x).argmax(1) == torch.arange(40) % 10
    assert recognised.float().mean() > 0.9


def test_wrong_use_is_one_line(plain, tmp_path, monkeypatch):
    assert "seed 5, this command 6" in error_line(
        *SAMPLE, "--num-samples", 51, "--output", plain, "--seed", 6
    )
    other = tmp_path / "other.npz"
    other.write_bytes(b"")
    assert "exists, not of this command" in error_line(*SAMPLE, "--output", other)
    space = namedtuple("space", "free")(1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: space)
    new = tmp_path / "new.npz"
    assert "GB free; make space" in error_line(*SAMPLE, "--num-samples", 51, "--output", new)
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "is not writable" in error_line(*SAMPLE, "--num-samples", 51, "--output", new)
    assert not list(tmp_path.glob("new*"))
    text = run("sample_ddp.py", "--output", "x.png", status=2)
    assert "does not end in .npz" in text
    text = run(*SAMPLE, "--accelerate-method", "magic", status=2)
    assert "'magic' is unknown; choose one of none, fewer-steps, fora" in text


def test_a_cache_that_decides_while_sampling(tmp_path):
    """Per sample the batch size changes nothing; per batch it belongs to the settings of the samples."""
    decided = [*SAMPLE[:-6], "--accelerate-method", "first-block", "--tolerance", 0.5, "--num-samples", 32]
    texts = [
        run(*decided, "--per-sample", "--batch-size", size, "--output", tmp_path / f"{size}.npz")
        for size in (16, 32)
    ]
    assert (tmp_path / "16.npz").read_bytes() == (tmp_path / "32.npz").read_bytes()
    reached = [next(line for line in text.splitlines() if "by MACs" in line) for text in texts]
    assert reached[0] == reached[1]
    assert "first-block cache, tolerance 0.5, per sample: " in reached[0]
    assert "100.00 %" not in reached[0]
    whole = [*decided, "--output", tmp_path / "whole.npz", "--batch-size"]
    assert "samples depend on --batch-size; --per-sample" in run(*whole, 32)
    assert "holds these samples already" in run(*whole, 32)
    assert "batch_size" in error_line(*whole, 16)
