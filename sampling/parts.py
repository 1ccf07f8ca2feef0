"""The parts of a large sampling: batches on disk, with which any later run goes on, and the .npz of them."""

import contextlib
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from backbones.contract import Backbone
from common.files import make_folder, read_json, remove_partials, replacing, write_json, writing
from common.identity import differences
from sampling.decoding import decode
from sampling.loop import Sample, Trajectory, generate_seeded, sample
from sampling.seeds import SAMPLING_STREAM, draw_labels, sample_generator

# Matrix products of other shapes may round otherwise. Every forward pass takes a multiple of this many
# samples, at the same places, so that the batch size changes nothing.
BLOCK = 16
_LABEL_KEY = 1  # (seed, stream, k, this) draws sample k's random label; its noise is drawn without it


@dataclass
class Parts:
    """The finished batches of an .npz to come: FIRST-COUNT.npy holds samples FIRST .. FIRST + COUNT - 1.

    They lie in a folder beside the .npz, which one process at a time opens. settings: all that the images
    depend on, except for the weights of reuse (T, B, K) that a calibrated method solves; those lie beside the
    batches, and all batches are drawn with them. notes: lines for the user on what was found.
    """

    output: Path
    settings: dict
    image_shape: tuple[int, int, int]
    num_samples: int
    reuse_weights: Tensor | None = None
    notes: list[str] = field(default_factory=list)
    _held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, repr=False)

    @cached_property
    def folder(self) -> Path:
        return self.output.with_name(f"{self.output.name}.parts")

    @cached_property
    def _facts(self) -> Path:
        """The file beside the .npz with the settings that it was sampled with."""
        return self.output.with_name(f"{self.output.name}.settings.json")

    @property
    def _image_bytes(self) -> int:
        return int(np.prod(self.image_shape))

    def __enter__(self) -> "Parts":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Let another process open them; remove the folder if it is empty."""
        self._held.close()
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def open(self, solve: Callable[[], Tensor] | None = None) -> bool:
        """Open the folder and check it before the first batch; returns whether all samples are done already.

        solve: returns the weights of reuse; called where none are kept. Raises ValueError where samples of
        another command are in the way, OSError for too little space, a folder that is not writable or another
        process at work.
        """
        if self._is_done() and not self.folder.exists():
            return True
        make_folder(self.output.parent)
        if not os.access(self.output.parent, os.W_OK):
            raise PermissionError(f"folder {self.output.parent} is not writable; give another --output")
        if self._facts.is_dir():
            raise IsADirectoryError(f"{self._facts} is a folder, a file is to come there; remove it")
        make_folder(self.folder)
        self.notes += self._held.enter_context(writing(self.folder))
        if self._is_done():  # killed before the parts were removed, or another process was faster
            self._remove_folder()
            return True
        remove_partials(self.folder)
        for path in self.output.parent.iterdir():  # a killed assembly
            if re.fullmatch(rf"{re.escape(self.output.stem)}\.\d+\.part\.npz", path.name):
                path.unlink()
        kept = self._settings_of_parts()
        self._drop_unsound()
        self._check_space()
        if solve is not None:
            self._choose_reuse_weights(kept.get("reuse_weights"), solve)
        write_json(self.folder / "settings.json", self._all_settings())
        return False

    def _is_done(self) -> bool:
        if not self.output.exists():
            return False
        if not self._facts.is_file():
            raise ValueError(f"{self.output} exists, not of this command; take another --output")
        try:
            self._refuse_others(self._facts, read_json(self._facts))
        except ValueError as error:
            raise ValueError(f"{error}; remove the old samples or take another --output") from None
        if self.output.stat().st_size < self.num_samples * self._image_bytes:
            raise ValueError(f"{self.output} is not whole; remove it and run the same command again")
        return True

    def _settings_of_parts(self) -> dict:
        """The settings that the finished batches were drawn with; batches without settings are removed."""
        path, found = self.folder / "settings.json", {}
        try:
            found = read_json(path)
        except FileNotFoundError:
            reason = f"{path} is missing"
        except (ValueError, OSError) as error:
            reason = str(error)
        if not found:
            self._discard_all(reason)
            return {}
        try:
            self._refuse_others(path, found)
        except ValueError as error:
            raise ValueError(f"{error}; remove the old samples or take another --output") from None
        return found

    def _refuse_others(self, path: Path, found: dict) -> None:
        if others := differences(found, self.settings):
            name, value = others[0]
            raise ValueError(f"{path} says {name} {value}, this command {self.settings[name]}")

    def _discard_all(self, reason: str) -> None:
        finished = self._finished()
        if finished:
            self.notes.append(f"{reason}: its {len(finished)} batches are drawn again")
        for *_, path in finished:
            path.unlink()

    def _drop_unsound(self) -> None:
        for first, count, path in self._finished():
            try:
                self._read(first, count, path)
            except ValueError as error:
                self.notes.append(f"{error}: its samples are drawn again")
                path.unlink()

    def _check_space(self) -> None:
        missing = len(self.missing())  # the missing parts, then the .npz beside all parts
        needed = (missing + self.num_samples) * self._image_bytes
        free = shutil.disk_usage(self.output.parent).free
        if needed > free:
            raise OSError(
                f"{self.output} needs {needed / 1e9:.1f} GB with its parts, {self.output.parent} has "
                f"{free / 1e9:.1f} GB free; make space or give another --output"
            )

    def _choose_reuse_weights(self, wanted: str | None, solve: Callable[[], Tensor]) -> None:
        """Load the weights that the batches were drawn with, or solve them.

        wanted: their checksum; None: there is no batch.
        """
        path = self.folder / "weights.safetensors"
        with contextlib.suppress(OSError, KeyError, safetensors.SafetensorError):
            weights = load_file(path)["weights"]
            if checksum(weights) == wanted:
                self.reuse_weights = weights
                return
        self.reuse_weights = solve()
        if wanted not in (None, checksum(self.reuse_weights)):
            self._discard_all(f"{path} does not read, and this machine solves other weights")
        with replacing(path) as temporary:
            save_file({"weights": self.reuse_weights.contiguous()}, temporary)

    def _all_settings(self) -> dict:
        return self.settings | (
            {} if self.reuse_weights is None else {"reuse_weights": checksum(self.reuse_weights)}
        )

    def _finished(self) -> list[tuple[int, int, Path]]:
        names = ((re.fullmatch(r"(\d+)-(\d+)\.npy", path.name), path) for path in self.folder.glob("*.npy"))
        return sorted((int(match[1]), int(match[2]), path) for match, path in names if match)

    def missing(self) -> list[int]:
        """Samples that no finished batch holds, in order."""
        there = np.zeros(self.num_samples, dtype=bool)
        for first, count, _ in self._finished():
            there[first : first + count] = True
        return np.flatnonzero(~there).tolist()

    def write(self, first: int, images: Tensor) -> None:
        """Samples from `first` on, uint8 (n, H, W, C); a checksum follows the array."""
        data = images.numpy().tobytes()
        path = self.folder / f"{first:07d}-{len(images):05d}.npy"
        with replacing(path) as temporary, open(temporary, "wb") as file:
            _write_header(file, (len(images), *self.image_shape))
            file.write(data)
            file.write(_trailer(data))

    def _read(self, first: int, count: int, path: Path) -> memoryview:
        """The bytes of a batch. Raises ValueError, naming the file, where it is not what its name says."""
        shape = (count, *self.image_shape)
        if not count or first + count > self.num_samples:
            raise ValueError(f"{path} is beyond the {self.num_samples} samples")
        try:
            stream = BytesIO(path.read_bytes())
            np.lib.format.read_magic(stream)
            found = np.lib.format.read_array_header_1_0(stream)
        except Exception:  # a damaged header fails in many ways
            raise ValueError(f"{path} does not read") from None
        if found != (shape, False, np.uint8):
            raise ValueError(f"{path} holds {found[2]} {found[0]}, not uint8 {shape}")
        data = stream.getbuffer()[stream.tell() :]
        size = count * self._image_bytes
        if len(data) < size or data[size:] not in (b"", _trailer(data[:size])):  # earlier versions wrote none
            raise ValueError(f"{path} is cut or damaged")
        return data[:size]

    def assemble(self) -> None:
        """Write one .npz of all parts and remove them. Raises ValueError where a sample is missing."""
        if missing := self.missing():
            raise ValueError(
                f"{self.folder} lacks {len(missing)} samples that were drawn: is the same command running "
                "elsewhere? Run it again when that has ended"
            )
        write_json(self._facts, self._all_settings())
        member = zipfile.ZipInfo("arr_0.npy", date_time=(1980, 1, 1, 0, 0, 0))  # same samples, same bytes
        with (
            replacing(self.output) as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
            archive.open(member, "w", force_zip64=True) as stream,
        ):
            _write_header(stream, (self.num_samples, *self.image_shape))
            position = 0
            for first, count, path in self._finished():
                skipped = position - first  # samples that the batch before holds too
                if skipped < count:
                    stream.write(self._read(first, count, path)[skipped * self._image_bytes :])
                    position = first + count
        self._remove_folder()

    def _remove_folder(self) -> None:
        self._held.close()  # a shared file system keeps a file that is open
        shutil.rmtree(self.folder, ignore_errors=True)


def _write_header(stream, shape: tuple[int, ...]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)


def _trailer(data) -> bytes:
    """The line after a batch in its file, which numpy does not read."""
    return f"crc32 {zlib.crc32(data):08x}\n".encode()


def checksum(tensor: Tensor) -> str:
    return f"{zlib.crc32(tensor.contiguous().numpy().tobytes()):08x}"


def batches(missing: list[int], batch_size: int, num_samples: int) -> list[range]:
    """Ranges of samples that cover the missing ones: aligned to BLOCK, at most batch_size long."""
    blocks = sorted({k // BLOCK for k in missing})
    result: list[range] = []
    for block in blocks:
        first, stop = block * BLOCK, min((block + 1) * BLOCK, num_samples)
        if result and result[-1].stop == first and stop - result[-1].start <= batch_size:
            result[-1] = range(result[-1].start, stop)
        else:
            result.append(range(first, stop))
    return result


def random_labels(model: Backbone, seed: int, samples: range) -> Tensor:
    """Labels (n,) that depend on (seed, k) alone, for samples k."""
    return draw_labels(model, [sample_generator(seed, SAMPLING_STREAM, k, _LABEL_KEY) for k in samples])


def uniform_labels(model: Backbone, samples: range) -> Tensor:
    """Labels (n,): class k % classes for sample k."""
    return torch.tensor([k % model.num_classes for k in samples])


def choose_labels(model: Backbone, labels: str, seed: int, samples: range) -> Tensor:
    """Labels (n,) of samples k, "random" or "uniform"."""
    return uniform_labels(model, samples) if labels == "uniform" else random_labels(model, seed, samples)


def draw(
    trajectory: Trajectory, seed: int, samples: range, vae=None, labels: str = "random", run: Sample = sample
) -> Tensor:
    """uint8 images (n, H, W, C) of some samples, which begin at a multiple of BLOCK.

    labels: "random" or "uniform". The last block is filled up with samples that are then dropped. run:
    `sampling.sample`, or a function of `execution` in its place.
    """
    filled = range(samples.start, -(-samples.stop // BLOCK) * BLOCK)
    model = trajectory.backbone
    y = choose_labels(model, labels, seed, filled)
    x_0 = generate_seeded(trajectory, y, seed, first=samples.start, sample=run)
    return decode(x_0, vae, first=samples.start)[: len(samples)]
