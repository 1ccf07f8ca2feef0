"""Arrays of files: named, typed and shaped before a value is read."""

import io
import zipfile

import numpy as np
import pytest

from common.arrays import ArrayFile

VALUES = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


@pytest.fixture
def files(tmp_path):
    np.savez(tmp_path / "two.npz", x=VALUES, labels=np.arange(3))
    np.save(tmp_path / "one.npy", VALUES)
    return tmp_path


def test_names_and_headers(files):
    both = ArrayFile(files / "two.npz")
    assert (both.names, both.contents) == (["labels", "x"], "labels, x")
    assert str(both.header("x")) == "float32 (2, 3, 4)"
    assert ArrayFile(files / "one.npy").names == ["arr_0"]
    (files / "one.npy").rename(files / "anything")  # by content, not by name
    assert np.array_equal(ArrayFile(files / "anything").read("arr_0", "f"), VALUES)


@pytest.mark.parametrize("array", [VALUES, np.asfortranarray(VALUES), VALUES.astype(">f4")])
def test_an_array_is_read_in_c_order_and_native_bytes(tmp_path, array):
    np.save(tmp_path / "x.npy", array)
    found = ArrayFile(tmp_path / "x.npy").read("arr_0", "f", "(n, C, H)")
    assert found.flags.c_contiguous
    assert found.dtype == np.float32
    assert np.array_equal(found, VALUES)


def test_chunks_are_the_bytes_of_some_items(files):
    chunks = list(ArrayFile(files / "two.npz").chunks("labels", 2))
    assert [np.frombuffer(chunk, np.int64).tolist() for chunk in chunks] == [[0, 1], [2]]


def test_other_kinds_and_axes_are_refused_before_they_are_read(files):
    both = ArrayFile(files / "two.npz", label="--data two.npz")
    with pytest.raises(ValueError, match=r"--data two.npz: x is float32 \(2, 3, 4\); integers are needed"):
        both.read("x", "iu")
    with pytest.raises(ValueError, match=r"real floating-point numbers \(n,\) are needed"):
        both.read("x", "f", "(n,)")
    assert both.read("labels", "iu", "(n,)").tolist() == [0, 1, 2]


def test_damage_is_named(files, tmp_path):
    content = (files / "one.npy").read_bytes()
    for cut in (content[:-1], content[:40], content[:5], b""):
        (tmp_path / "cut.npy").write_bytes(cut)
        with pytest.raises(ValueError, match="cut.npy (is damaged|cannot be read)"):
            ArrayFile(tmp_path / "cut.npy").read("arr_0", "f")
    with pytest.raises(FileNotFoundError, match="absent.npz does not exist"):
        ArrayFile(tmp_path / "absent.npz")


def test_objects_are_never_loaded(tmp_path):
    stream = io.BytesIO()
    np.save(stream, np.array([{}], dtype=object))
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", stream.getvalue())
    with pytest.raises(ValueError, match="x.npz: x is object"):
        ArrayFile(tmp_path / "x.npz").read("x", "fiu")
