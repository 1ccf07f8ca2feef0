"""Writing, reading and locking files: what a kill, a full disk or a second process may leave."""

import fcntl
import os
import subprocess
import zipfile

import numpy as np
import pytest
import torch
from commands import file_size_limit, writing_elsewhere
from PIL import Image
from safetensors.torch import save_file

from common import files
from common.files import append_line, check_writable, make_folder, read_json, replacing, write_json, writing


def write_zip(path):
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as stream:
        stream.write(bytes(40_000))


NOISE = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
WRITERS = {
    "x.safetensors": lambda path: save_file({"logits": torch.zeros(10_000)}, path),
    "x.pt": lambda path: torch.save({"logits": torch.zeros(10_000)}, path),
    "x.npy": lambda path: np.save(path, np.zeros(10_000)),
    "x.npz": lambda path: np.savez(path, latents=np.zeros(10_000)),
    "y.npz": write_zip,
    "x.png": lambda path: Image.fromarray(NOISE).save(path),
    "x.jpg": lambda path: Image.fromarray(NOISE).save(path, quality=100),
    "x.json": lambda path: path.write_text("1" * 40_000),
}


@pytest.mark.parametrize("name", WRITERS)
def test_full_disk_is_one_error_and_leaves_what_was_there(tmp_path, name):
    """A limit on the size of files stands for the disk: every writer meets it as it would meet ENOSPC."""
    path = tmp_path / name
    path.write_bytes(b"what was there")
    with (
        file_size_limit(10_000),
        pytest.raises(OSError, match="cannot be written") as caught,
        replacing(path) as temporary,
    ):
        WRITERS[name](temporary)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [path]
    with replacing(path) as temporary:
        WRITERS[name](temporary)
    assert path.stat().st_size > 10_000


def test_a_disk_that_is_full_only_at_the_end(tmp_path, monkeypatch):
    """Network file systems say so when the bytes are to reach the disk."""

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"x\.json cannot be written \(No space left on device\)"):
        write_json(tmp_path / "x.json", {})
    assert not list(tmp_path.iterdir())


def test_errors_that_are_not_of_writing_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="other.npy"), replacing(tmp_path / "x.npy") as temporary:
        np.save(temporary, np.load(tmp_path / "other.npy"))
    with pytest.raises(RuntimeError, match="of something else"), replacing(tmp_path / "x.npy"):
        raise RuntimeError("of something else")
    assert not list(tmp_path.iterdir())


def test_a_line_is_appended_whole_or_not_at_all(tmp_path):
    path = tmp_path / "log.txt"
    append_line(path, "first")
    with file_size_limit(10), pytest.raises(OSError, match=r"log\.txt cannot be written \(File too large\)"):
        append_line(path, "second, which is longer")
    assert path.read_text() == "first\n"


def test_only_partial_files_of_killed_writers_are_removed(tmp_path):
    kept = ["0000006.safetensors", "x.part.npz", "part.7.json", "x.7.partial"]
    for name in [*kept, "0000012.77.part.safetensors", "schedule.7.part.png", "x.9.part"]:
        (tmp_path / name).touch()
    files.remove_partials(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_what_is_in_a_folders_way_is_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path, reason in (
        ("file", "file is a file"),
        ("file/below/it", "file is a file"),
        ("link", "link is a link to nothing"),
        ("link/below", "link is a link to nothing"),
    ):
        for attempt in (make_folder, lambda path: check_writable(path / "x.json", [".json"])):
            with pytest.raises(OSError, match=reason):
                attempt(tmp_path / path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "good").symlink_to(tmp_path / "folder")
    make_folder(tmp_path / "good")


@pytest.mark.parametrize("content", [b"", bytes(30), b'{"seed": 5', b"[1, 2]", b"null", b"\xff\xfe\x00"])
def test_json_that_does_not_read_is_one_line(tmp_path, content):
    path = tmp_path / "settings.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"settings\.json is damaged") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


# ---- one writer at a time --------------------------------------------------------------------------


def test_second_writer_is_told_who_is_at_work_until_that_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("common.files.PATIENCE_S", 0.2)
    with writing_elsewhere(tmp_path) as pid:
        wanted = rf"{tmp_path} is being written by process {pid} on \S+, since 20.*; wait for it"
        with pytest.raises(OSError, match=wanted), writing(tmp_path):
            pass
        monkeypatch.setattr("common.files.PATIENCE_S", 5)
        killer = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {pid}"])  # its child lives on
        with writing(tmp_path) as notes:
            assert killer.wait() == 0
            assert notes == []
            assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()
    assert not list(tmp_path.iterdir())


def test_the_lock_is_of_a_folder_whatever_its_name_and_of_this_process_once(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    with (
        writing(tmp_path / "folder"),
        pytest.raises(OSError, match="by this very process"),
        writing(tmp_path / "link"),
    ):
        pass
    with writing(tmp_path / "link"):  # free again after the refusal
        pass


def test_a_file_system_without_locks_is_noted(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with writing(tmp_path) as notes:
        assert "cannot be locked (No locks available); start no second command" in notes[0]
    assert not list(tmp_path.iterdir())
