"""Sets of uint8 images: an array in a file, or a folder of pictures, read in batches.

Pictures are read as ADM reads them, pixel by pixel: an orientation that EXIF asks for and colour profiles are
ignored, CMYK becomes RGB by Pillow's formula. Beyond that nothing is lost in silence: 16-bit pictures are
scaled to 8 bits, transparent ones laid on white, and what has no one meaning in 8 bits (floats, 32-bit
integers, several frames) is refused by name.
"""

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from common.arrays import ArrayFile, Header

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
_GREY = ("1", "L", "LA")


class PictureError(OSError):
    """A file that cannot be read as a picture. Every process tells of its own: others may never meet it."""


# ---- one picture -----------------------------------------------------------------------------------


def open_picture(path: str | Path) -> Image.Image:
    """A picture in 8 bits, grey (mode L) or in colour (RGB). Raises PictureError, in one line."""
    with _opened(path) as image:
        image.load()
        return _in_eight_bits(image)


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """A picture of which the header alone was read. Whatever fails while it is open names the file."""
    try:
        with Image.open(path) as image:
            if fault := _fault(image):
                raise PictureError(f"{path} {fault}, or remove it")
            yield image
    except (PictureError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise PictureError(f"{path} is no picture of a known format; replace or remove it") from None
    except Exception as error:  # damaged pictures fail in as many ways as there are formats
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        raise PictureError(f"{path} cannot be read as a picture ({reason}); replace or remove it") from None


def _fault(image: Image.Image) -> str | None:
    """Why a picture has no one meaning in 8 bits, and what to do."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # which is a camera's JPEG, with previews after the picture
        return f"holds {frames} frames; save one of them in its place"
    if image.mode in ("F", "I", "LAB") and not _is_sixteen_bit(image):
        return f"is of mode {image.mode}, which has no one scale in 8 bits; convert it"
    return None


def _is_sixteen_bit(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _is_grey(image: Image.Image) -> bool:
    return image.mode in _GREY or _is_sixteen_bit(image)


def _in_eight_bits(image: Image.Image) -> Image.Image:
    if _is_sixteen_bit(image):
        values = np.asarray(image).astype(np.uint32)
        grey = ((values + 128) // 257).astype(np.uint8)  # 65535 is 257 * 255
        if "transparency" in image.info:
            grey[values == image.info["transparency"]] = 255
        return Image.fromarray(grey)
    mode = "L" if _is_grey(image) else "RGB"
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert(mode)


# ---- a set of images -------------------------------------------------------------------------------


class Images:
    """Images of one size, from an .npz (`arr_0`, or its only such array), an .npy, or a folder of pictures.

    `shape` is (n, H, W, C), C 1 or 3; `names` the names of a folder's files, else None; `notes` lines for
    the user. Raises OSError or ValueError where there are no images, or images of several sizes.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._source = _PictureFolder(self.path) if self.path.is_dir() else _ImageArray(self.path)
        self.shape, self.names, self.notes = self._source.shape, self._source.names, self._source.notes

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int) -> Iterator[Tensor]:
        """Batches uint8 (n, H, W, C). Only an array in Fortran order is read as a whole."""
        return self._source.batches(size)


def image_array(file: ArrayFile) -> str | None:
    """The name of the array of images in a file: `arr_0`, or else the only one in four dimensions.

    Raises ValueError where several could be meant.
    """
    if "arr_0" in file.names:
        return "arr_0"
    found = [name for name in file.names if len(file.header(name).shape) == 4]
    for names in ([name for name in found if file.header(name).dtype == np.uint8], found):
        if len(names) > 1:
            raise ValueError(f"{file.label} holds {', '.join(names)}; call the images arr_0")
        if names:
            return names[0]
    return None


class _ImageArray:
    names = None

    def __init__(self, path: Path):
        if path.is_file() and path.name.lower().endswith(SUFFIXES):
            raise ValueError(f"{path} is one picture; give the folder that holds them")
        self._file = ArrayFile(path)
        self._name = image_array(self._file)
        if self._name is None:
            raise ValueError(f"{path} holds {self._file.contents}, no images (arr_0)")
        self._header = self._file.header(self._name)
        if fault := _array_fault(self._header):
            raise ValueError(f"{self._file.place(self._name)} is {self._header}; {fault}")
        self.shape, self.notes = self._header.shape, []
        if self._name != "arr_0":
            self.notes.append(f"{path}: the images are read from {self._name}")
        if self._header.fortran_order:
            size = np.prod(self.shape, dtype=np.int64) / 1e9
            self.notes.append(f"{path} is in Fortran order: all its {size:.1f} GB are read at once")

    def batches(self, size: int) -> Iterator[Tensor]:
        if self._header.fortran_order:
            yield from torch.from_numpy(self._file.read(self._name, "u")).split(size)
            return
        for data in self._file.chunks(self._name, size):
            yield torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, *self.shape[1:])


def _array_fault(header: Header) -> str | None:
    """Why an array is no set of images, and how to save it as one; None where it is one."""
    shape = header.shape
    if header.dtype == np.uint8 and len(shape) == 4 and shape[3] in (1, 3) and all(shape):
        return None
    needed = "uint8 (n, H, W, 3 or 1) is needed"
    if len(shape) == 4 and shape[1] in (1, 3) and shape[3] not in (1, 3):
        return f"{needed}, the channels last: save x.transpose(0, 2, 3, 1)"
    if len(shape) == 3:
        return f"{needed}: save x[..., None] if the images are grey, x[None] if it is one image"
    if len(shape) == 4 and shape[3] == 4:
        return f"{needed}: save x[..., :3] if the last channel is opacity"
    if len(shape) == 4 and header.dtype != np.uint8:
        return f"{needed}: grey levels 0 .. 255"
    return needed


class _PictureFolder:
    def __init__(self, folder: Path):
        self._files, others = picture_files(folder)
        if not self._files:
            raise ValueError(f"{folder} holds no pictures ({' '.join(SUFFIXES)})")
        self.notes = []
        if others:
            self.notes.append(
                f"{folder}: {len(others)} files are no pictures and left out, such as {others[0]}"
            )
        self.names = [str(file.relative_to(folder).with_suffix("")) for file in self._files]
        with ThreadPoolExecutor() as pool:
            looks = pool.map(self._look, self._files)
            facts = list(tqdm(looks, f"pictures in {folder.name}", len(self._files), disable=None))
        size = facts[0][0]
        for file, (own, _) in zip(self._files, facts, strict=True):
            if own != size:
                raise ValueError(
                    f"{file} is {own[0]} x {own[1]}, {self._files[0]} {size[0]} x {size[1]}; a set has one "
                    "size, bring its images to it"
                )
        channels = 1 if all(grey for _, grey in facts) else 3
        self.shape = (len(self._files), size[1], size[0], channels)

    @staticmethod
    def _look(file: Path) -> tuple[tuple[int, int], bool]:
        with _opened(file) as image:
            return image.size, _is_grey(image)

    def _read(self, file: Path) -> Tensor:
        array = np.array(open_picture(file).convert("L" if self.shape[3] == 1 else "RGB"))
        return torch.from_numpy(array).view(self.shape[1:])

    def batches(self, size: int) -> Iterator[Tensor]:
        with ThreadPoolExecutor() as pool:
            for first in range(0, len(self._files), size):
                yield torch.stack(list(pool.map(self._read, self._files[first : first + size])))


def picture_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The pictures in a folder and its folders, in the natural order of their names (2.png before 10.png).

    Links are followed, hidden files and folders are not looked at. Returns the other files' names, too.
    """
    pictures, others, seen = [], [], set()
    for place, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        seen.add(os.path.realpath(place))
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(place, name)) not in seen
        ]
        for name in files:
            if not name.startswith("."):
                is_picture = name.lower().endswith(SUFFIXES)
                (pictures if is_picture else others).append(os.path.join(place, name))
    return [Path(path) for path in sorted(pictures, key=_natural)], sorted(others)


def _raise(error: OSError) -> None:
    raise error


def _natural(path: str) -> tuple:
    """Sorts numbers within names by their value."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)], path
