"""Pictures in every mode, folders of them, and arrays in files: read right, or refused by name."""

import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from common.arrays import ArrayFile
from common.images import Images, PictureError, open_picture

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (9, 12)).astype(np.uint8)
COLOUR = RNG.integers(0, 256, (9, 12, 3)).astype(np.uint8)


def png(kind: int, rows: np.ndarray) -> bytes:
    """A 16-bit PNG; kind 0 is grey, 2 RGB, 4 grey with opacity."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], 16, kind, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def sixteen(array: np.ndarray) -> np.ndarray:
    return array.astype(np.uint16) * 257


def test_sixteen_bits_are_scaled_not_cut(tmp_path):
    opaque = np.stack([sixteen(GREY), np.full(GREY.shape, 65535)], axis=-1)
    (tmp_path / "grey.png").write_bytes(png(0, sixteen(GREY)))
    (tmp_path / "colour.png").write_bytes(png(2, sixteen(COLOUR)))
    (tmp_path / "opaque.png").write_bytes(png(4, opaque))
    (tmp_path / "grey.pgm").write_bytes(b"P5 12 9 65535\n" + sixteen(GREY).astype(">u2").tobytes())
    (tmp_path / "colour.ppm").write_bytes(b"P6 12 9 65535\n" + sixteen(COLOUR).astype(">u2").tobytes())
    Image.fromarray(sixteen(GREY)).save(tmp_path / "grey.tif")
    for path in tmp_path.iterdir():
        image = open_picture(path)
        expected = GREY if path.stem == "grey" else COLOUR
        if path.stem == "opaque":
            expected = np.repeat(GREY[..., None], 3, axis=2)
        np.testing.assert_array_equal(np.asarray(image), expected, err_msg=path.name)
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(levels).save(tmp_path / "levels.png")
    error = np.asarray(open_picture(tmp_path / "levels.png")) - levels / 257
    assert np.abs(error).max() <= 0.5


def test_what_eight_bits_hold_is_read_exactly(tmp_path):
    palette = Image.fromarray(COLOUR // 64 * 64).convert("P", palette=Image.Palette.ADAPTIVE)
    pictures = {
        "grey.png": (Image.fromarray(GREY), GREY),
        "colour.png": (Image.fromarray(COLOUR), COLOUR),
        "colour.bmp": (Image.fromarray(COLOUR), COLOUR),
        "opaque.png": (Image.fromarray(COLOUR).convert("RGBA"), COLOUR),
        "opaque-grey.png": (Image.fromarray(GREY).convert("LA"), GREY),
        "palette.png": (palette, np.asarray(palette.convert("RGB"))),
        "bits.png": (Image.fromarray(GREY > 99), np.where(GREY > 99, 255, 0)),
        "one.gif": (palette, np.asarray(palette.convert("RGB"))),
    }
    for name, (picture, expected) in pictures.items():
        picture.save(tmp_path / name)
        np.testing.assert_array_equal(np.asarray(open_picture(tmp_path / name)), expected, err_msg=name)
    turned = Image.fromarray(COLOUR)
    orientation = turned.getexif()
    orientation[274] = 6
    turned.save(tmp_path / "turned.png", exif=orientation)
    np.testing.assert_array_equal(np.asarray(open_picture(tmp_path / "turned.png")), COLOUR)
    Image.fromarray(COLOUR).convert("CMYK").save(tmp_path / "print.jpg", quality=100)
    assert open_picture(tmp_path / "print.jpg").mode == "RGB"


def test_transparent_parts_are_white(tmp_path):
    """Whatever colour is stored beneath them."""
    picture = Image.fromarray(COLOUR).convert("RGBA")
    opacity = np.full(GREY.shape, 255, np.uint8)
    opacity[0, 0], opacity[0, 1] = 0, 51
    picture.putalpha(Image.fromarray(opacity))
    picture.save(tmp_path / "rgba.png")
    expected = COLOUR.astype(float)
    expected[0, 0], expected[0, 1] = 255, 0.2 * COLOUR[0, 1] + 0.8 * 255
    found = np.asarray(open_picture(tmp_path / "rgba.png"))
    np.testing.assert_allclose(found, expected, atol=1)
    Image.fromarray(GREY).save(tmp_path / "key.png", transparency=int(GREY[0, 0]))
    expected = np.where(GREY[0, 0] == GREY, 255, GREY)
    np.testing.assert_array_equal(np.asarray(open_picture(tmp_path / "key.png")), expected)
    indices = Image.fromarray(COLOUR).convert("P", palette=Image.Palette.ADAPTIVE)
    indices.save(tmp_path / "palette.png", transparency=int(np.asarray(indices)[0, 0]))
    assert tuple(np.asarray(open_picture(tmp_path / "palette.png"))[0, 0]) == (255, 255, 255)


def write_unreadable(folder) -> dict[str, str]:
    """Files that are no pictures of 8 bits, and the words that say why."""
    colour, grey = Image.fromarray(COLOUR), Image.fromarray(GREY)
    colour.save(folder / "whole.png")
    colour.save(folder / "whole.jpg")
    for name in ("whole.png", "whole.jpg"):
        content = (folder / name).read_bytes()
        (folder / name.replace("whole", "cut")).write_bytes(content[: len(content) * 2 // 3])
        (folder / name).unlink()
    (folder / "empty.png").touch()
    (folder / "page.jpg").write_bytes(b"<html>Not found</html>")
    (folder / "dangling.png").symlink_to("nowhere")
    grey.convert("F").save(folder / "float.tif")
    grey.convert("I").save(folder / "integers.tif")
    for name in ("moving.gif", "pages.tif", "moving.webp", "moving.png"):
        grey.save(folder / name, save_all=True, append_images=[Image.fromarray(255 - GREY)])
    known, frames = "no picture of a known format", "holds 2 frames"
    return {
        "cut.png": "runcated",
        "cut.jpg": "runcated",
        "empty.png": known,
        "page.jpg": known,
        "dangling.png": "No such file",
        "float.tif": "mode F",
        "integers.tif": "mode I",
    } | dict.fromkeys(("moving.gif", "pages.tif", "moving.webp", "moving.png"), frames)


def test_what_cannot_be_read_is_named_in_one_line(tmp_path):
    for name, words in write_unreadable(tmp_path).items():
        with pytest.raises(PictureError) as error:
            open_picture(tmp_path / name)
        line = str(error.value)
        assert words in line
        assert line.startswith(str(tmp_path / name))
        assert "\n" not in line


def test_folder_is_read_in_natural_order(tmp_path):
    """With its folders; what is hidden, and what is no picture, is left out, the latter with a note."""
    images = RNG.integers(0, 256, (23, 6, 4, 3)).astype(np.uint8)
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    (tmp_path / "sub").mkdir()
    Image.fromarray(images[0]).save(tmp_path / "sub" / "10.PNG")
    Image.fromarray(images[1]).save(tmp_path / "sub" / "9.bmp")
    (tmp_path / "sub" / "again").symlink_to(tmp_path)
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".hidden.png").touch()
    found = Images(tmp_path)
    assert found.shape == (25, 6, 4, 3)
    assert found.names == [*map(str, range(23)), "sub/9", "sub/10"]
    expected = np.concatenate([images, images[[1, 0]]])
    batches = list(found.batches(7))
    assert [len(batch) for batch in batches] == [7, 7, 7, 4]
    np.testing.assert_array_equal(torch.cat(batches).numpy(), expected)
    assert len(found.notes) == 1
    assert "1 files are no pictures" in found.notes[0]


def test_folder_is_grey_where_all_its_pictures_are(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(png(0, sixteen(GREY)))
    found = Images(tmp_path)
    assert found.shape == (2, 9, 12, 1)
    for image in torch.cat(list(found.batches(1))):
        np.testing.assert_array_equal(image[..., 0].numpy(), GREY)
    Image.fromarray(COLOUR).save(tmp_path / "c.png")
    found = Images(tmp_path)
    assert found.shape == (3, 9, 12, 3)
    np.testing.assert_array_equal(next(found.batches(1))[0, ..., 2].numpy(), GREY)


def test_folder_that_is_no_set_of_images(tmp_path):
    with pytest.raises(ValueError, match="holds no pictures"):
        Images(tmp_path)
    np.save(tmp_path / "x.npy", GREY)
    with pytest.raises(ValueError, match="holds no pictures"):
        Images(tmp_path)
    Image.fromarray(GREY).save(tmp_path / "a.png")
    Image.fromarray(GREY[:5]).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png is 12 x 5, .*a\.png 12 x 9"):
        Images(tmp_path)
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(PictureError, match=r"b\.png is no picture"):
        Images(tmp_path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_of_any_layout_hold_the_same_images(tmp_path, save):
    images = RNG.integers(0, 256, (10, 6, 4, 3)).astype(np.uint8)
    save(tmp_path / "c.npz", arr_0=images, arr_1=np.arange(10))
    save(tmp_path / "fortran.npz", arr_0=np.asfortranarray(images))
    save(tmp_path / "other.npz", samples=images, labels=np.arange(10), extra=np.zeros(3))
    np.save(tmp_path / "plain.npy", images)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(images))
    for path in tmp_path.iterdir():
        found = Images(path)
        assert found.shape == images.shape
        batches = list(found.batches(4))
        assert [len(batch) for batch in batches] == [4, 4, 2]
        np.testing.assert_array_equal(torch.cat(batches).numpy(), images, err_msg=path.name)
        notes = " ".join(found.notes)
        assert ("read from samples" in notes) == (path.stem == "other")
        assert ("Fortran order" in notes) == (path.stem == "fortran")


def test_arrays_that_are_no_images_say_what_to_do(tmp_path):
    images = RNG.integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    for array, words in (
        (images.transpose(0, 3, 1, 2), "transpose(0, 2, 3, 1)"),
        (images / 255, "grey levels 0 .. 255"),
        (images.astype(int), "grey levels 0 .. 255"),
        (images[..., 0], "x[..., None]"),
        (images[0], "x[None]"),
        (images[..., [0, 1, 2, 0]], "x[..., :3]"),
        (images[:0], "uint8 (n, H, W, 3 or 1) is needed"),
        (images.astype(object), "uint8 (n, H, W, 3 or 1) is needed"),
        (images.astype(str), "uint8 (n, H, W, 3 or 1) is needed"),
    ):
        np.savez(tmp_path / "x.npz", arr_0=array)
        with pytest.raises(ValueError, match=r"x\.npz: arr_0 is") as error:
            Images(tmp_path / "x.npz")
        assert words in str(error.value)
    np.savez(tmp_path / "x.npz", one=images, two=images)
    with pytest.raises(ValueError, match=r"x\.npz holds one, two; call the images arr_0"):
        Images(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", latents=np.zeros((2, 4, 8, 8), np.float32))
    with pytest.raises(ValueError, match=r"latents is float32 \(2, 4, 8, 8\); uint8"):
        Images(tmp_path / "x.npz")
    torch.save({"x": torch.zeros(3)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt holds no arrays, no images"):
        Images(tmp_path / "x.pt")


def test_one_picture_is_no_set(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.PNG")
    with pytest.raises(ValueError, match=r"a\.PNG is one picture; give the folder"):
        Images(tmp_path / "a.PNG")


def test_header_and_content_that_differ_are_damage_before_the_pass(tmp_path):
    """As where a file was written from an assumed shape, or ends early."""
    images = RNG.integers(0, 256, (10, 6, 4, 3)).astype(np.uint8)
    np.save(tmp_path / "x.npy", images)
    content = (tmp_path / "x.npy").read_bytes()
    for wrong in (content[:-5], content + b"more"):
        (tmp_path / "x.npy").write_bytes(wrong)
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
            archive.writestr("arr_0.npy", wrong)
        for name in ("x.npy", "x.npz"):
            with pytest.raises(ValueError, match=rf"{name}.* is damaged \({len(wrong)} bytes where"):
                Images(tmp_path / name)
    np.savez(tmp_path / "x.npz", arr_0=images)
    stored = bytearray((tmp_path / "x.npz").read_bytes())
    stored[len(stored) // 2] ^= 1
    (tmp_path / "x.npz").write_bytes(stored)
    with pytest.raises(ValueError, match="arr_0 is damaged"):
        list(Images(tmp_path / "x.npz").batches(3))


def test_arrays_arrive_in_native_bytes(tmp_path):
    values = RNG.normal(size=(3, 4))
    np.savez(tmp_path / "x.npz", big=values.astype(">f8"), half=values.astype(">f2"), text=np.array(["a"]))
    file = ArrayFile(tmp_path / "x.npz")
    for name, dtype in (("big", np.float64), ("half", np.float16)):
        array = file.read(name, "f", "(n, D)")
        assert array.dtype == dtype
        assert array.dtype.isnative
        np.testing.assert_array_equal(array, values.astype(dtype))
    for name, kinds, axes in (("big", "iu", None), ("big", "f", "(n,)"), ("text", "fiu", None)):
        with pytest.raises(ValueError, match=f"x.npz: {name} is .*are needed"):
            file.read(name, kinds, axes)


def test_folder_that_may_not_be_read_is_not_left_out(tmp_path, monkeypatch):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(PermissionError, match="closed"):
        Images(tmp_path)
