"""Sample many images into one ADM-style .npz (`arr_0`, uint8 NHWC), on any number of processes and nodes.

    torchrun --nproc_per_node=4 sample_ddp.py --model DiT-XL/2 --vae ema --num-samples 50000 \\
        --cfg-scale 1.5 --num-sampling-steps 20 --accelerate-method dynamiclayer --path ROUTER \\
        --output samples.npz
    python evaluate.py samples.npz --reference VIRTUAL_imagenet256_labeled.npz --inception-weights WEIGHTS.pth

Sample k depends on (seed, k) alone. Finished batches lie in OUTPUT.parts until all are there; after any
interruption the same command goes on with what is missing, on as many processes as one likes. On a CPU the
file comes out the same byte for byte, whatever the processes and the batch size, and so every process takes
one thread: start as many as there are cores. A GPU may round otherwise for another batch size. Several nodes
need a shared folder.
"""

from backbones import settings as model_settings
from backbones.settings import ModelSettings

from common import lifeline  # isort: skip  # noqa: F401  # first: under torchrun this process ends with it

import argparse
import contextlib
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from backbones.denoiser import check_guidance
from backbones.loading import pixels_of
from common import cli, devices, distributed
from common.distributed import Processes
from common.files import make_folder, read_json, remove_partials, replacing, write_json, writing
from common.identity import differences, weights_fingerprint
from execution import modes as execution
from models import DiT
from sampling.decoding import decode, image_shape
from sampling.loop import Sample, Trajectory, generate_seeded
from sampling.seeds import SAMPLING_STREAM, draw_labels, sample_generator
from schedules import methods
from schedules.methods import Method

# Matrix products of other shapes may round otherwise: every forward takes a multiple of this many samples, at
# the same places, so that the batch size changes nothing.
BLOCK = 16
_LABEL_KEY = 1  # (seed, stream, k, this) draws sample k's random label; its noise comes without this


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Sample many images into one .npz.")
    model_settings.add_arguments(parser, with_vae=True)
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--num-samples", "--num-fid-samples", type=cli.positive_int, default=50000)
    sampling.add_argument("--cfg-scale", type=cli.finite, default=1.5, help="guidance, 1 = off (default 1.5)")
    sampling.add_argument("--num-sampling-steps", default="50", help="N, or a respacing (default 50)")
    sampling.add_argument("--ddim-sample", action="store_true", help="DDIM, eta 0 (the default)")
    sampling.add_argument("--p-sample", action="store_true", help="DDPM (ancestral)")
    sampling.add_argument("--seed", "--global-seed", type=cli.seed, default=0)
    sampling.add_argument(
        "--labels",
        choices=("random", "uniform"),
        default="random",
        help="uniform: class k %% classes for sample k",
    )
    sampling.add_argument(
        "--batch-size", "--per-proc-batch-size", type=cli.positive_int, default=32,
        help=f"of a process, rounded up to a multiple of {BLOCK} (default 32)",
    )  # fmt: skip
    methods.add_arguments(parser)
    parser.add_argument("--output", type=Path, default=Path("samples.npz"))
    parser.add_argument("--sample-dir", type=Path, help="folder for --output (default: the current one)")
    execution.add_arguments(parser)
    devices.add_arguments(parser)
    args = cli.parse(parser)
    if args.ddim_sample and args.p_sample:
        parser.error("--ddim-sample and --p-sample exclude each other; give one")
    if args.output.suffix != ".npz":
        parser.error(f"--output {args.output} does not end in .npz")
    methods.check_arguments(parser, args)
    if args.sample_dir is not None:
        if args.output.is_absolute():
            args.notes.append(f"--sample-dir has no effect with an absolute --output, {args.output}")
        args.output = args.sample_dir / args.output
    return args


@dataclass
class Parts:
    """The finished batches beside an .npz to be: FIRST-COUNT.npy of samples FIRST .. FIRST + COUNT - 1.

    One process at a time opens them. settings: all that the images depend on, but the `weights` of reuse that
    a calibrated method solves: those lie beside the batches, and all batches are drawn with them.
    """

    output: Path
    settings: dict
    image_shape: tuple[int, int, int]
    num_samples: int
    weights: Tensor | None = None
    notes: list[str] = field(default_factory=list)  # what there is to say of what was found
    _held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, repr=False)

    @cached_property
    def folder(self) -> Path:
        return self.output.with_name(f"{self.output.name}.parts")

    @cached_property
    def _facts(self) -> Path:
        """What the .npz was sampled with, beside it."""
        return self.output.with_name(f"{self.output.name}.settings.json")

    @property
    def _image_bytes(self) -> int:
        return int(np.prod(self.image_shape))

    def __enter__(self) -> "Parts":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Let another process have them; an empty folder goes."""
        self._held.close()
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def open(self, solve: Callable[[], Tensor] | None = None) -> bool:
        """Check before the first batch what can be known; returns whether all is done already.

        solve: returns the weights of reuse, where none are kept. Raises ValueError for other samples in the
        way, OSError for too little space, an unwritable folder or another process at work.
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
        if self._is_done():  # a kill between the .npz and its parts' end left them, or another was faster
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
            self._choose_weights(kept.get("reuse_weights"), solve)
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
        """What the batches that are there were drawn with; batches that nobody answers for are removed."""
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
        missing = len(self.missing())  # the parts that are to come, then the .npz beside them
        needed = (missing + self.num_samples) * self._image_bytes
        free = shutil.disk_usage(self.output.parent).free
        if needed > free:
            raise OSError(
                f"{self.output} needs {needed / 1e9:.1f} GB with its parts, {self.output.parent} has "
                f"{free / 1e9:.1f} GB free; make space or give another --output"
            )

    def _choose_weights(self, wanted: str | None, solve: Callable[[], Tensor]) -> None:
        """The weights that batches were drawn with. wanted: their checksum; None: no batch is there."""
        path = self.folder / "weights.safetensors"
        with contextlib.suppress(OSError, KeyError, safetensors.SafetensorError):
            weights = load_file(path)["weights"]
            if checksum(weights) == wanted:
                self.weights = weights
                return
        self.weights = solve()
        if wanted not in (None, checksum(self.weights)):
            self._discard_all(f"{path} does not read, and this machine solves other weights")
        with replacing(path) as temporary:
            save_file({"weights": self.weights.contiguous()}, temporary)

    def _all_settings(self) -> dict:
        return self.settings | ({} if self.weights is None else {"reuse_weights": checksum(self.weights)})

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
        """One .npz of all parts, streamed; then the parts go. Raises ValueError where one is missing."""
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
                skipped = position - first  # of a batch that begins inside the last one
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
    """What follows a batch in its file, where numpy does not look."""
    return f"crc32 {zlib.crc32(data):08x}\n".encode()


def checksum(tensor: Tensor) -> str:
    return f"{zlib.crc32(tensor.contiguous().numpy().tobytes()):08x}"


def batches(missing: list[int], batch_size: int, num_samples: int) -> list[range]:
    """Runs of samples that cover what is missing: aligned to BLOCK, of batch_size at most."""
    blocks = sorted({k // BLOCK for k in missing})
    result: list[range] = []
    for block in blocks:
        first, stop = block * BLOCK, min((block + 1) * BLOCK, num_samples)
        if result and result[-1].stop == first and stop - result[-1].start <= batch_size:
            result[-1] = range(result[-1].start, stop)
        else:
            result.append(range(first, stop))
    return result


def choose_labels(args: argparse.Namespace, model: DiT, samples: range) -> Tensor:
    if args.labels == "uniform":
        return torch.tensor([k % model.num_classes for k in samples])
    return draw_labels(model, [sample_generator(args.seed, SAMPLING_STREAM, k, _LABEL_KEY) for k in samples])


def draw(args: argparse.Namespace, trajectory: Trajectory, vae, run: Sample, samples: range) -> Tensor:
    """uint8 images (n, H, W, C); the last block is filled up with samples that are then dropped."""
    filled = range(samples.start, -(-samples.stop // BLOCK) * BLOCK)
    labels = choose_labels(args, trajectory.backbone, filled)
    x_0 = generate_seeded(trajectory, labels, args.seed, first=samples.start, sample=run)
    return decode(x_0, vae, first=samples.start)[: len(samples)]


def settings_of(
    args: argparse.Namespace, model: DiT, method: Method, precision: str, vae_spec: str, vae
) -> dict:
    """All that the images depend on; of a calibrated method what its weights are solved from.

    vae: the loaded one of `vae_spec`.
    """
    schedule = None
    if method.schedule is not None:
        table = method.schedule.compute.numpy().tobytes()
        if method.schedule.weights is not None:
            table += method.schedule.weights.numpy().tobytes()
        schedule = f"{method.schedule.source}, CUR {method.schedule.cur:.6f}, {zlib.crc32(table):08x}"
    read = ("model", "num_samples", "seed", "labels", "cfg_scale", "num_sampling_steps", "accelerate_method")
    settings = {name: getattr(args, name) for name in read} | {
        "weights": weights_fingerprint(model),
        "image_size": pixels_of(model),
        "null_label": model.has_null_label,
        "learn_sigma": model.learn_sigma,
        "vae": vae_spec,
        "vae_weights": vae and weights_fingerprint(vae),
        "sampler": "ddpm" if args.p_sample else "ddim",
        "executed_steps": method.diffusion.num_timesteps,
        "schedule": schedule,
        "precision": precision,
        "quantize": args.quantize,
        "cache_dtype": args.cache_dtype,
    }
    return settings | methods.calibration(args)


def run(args: argparse.Namespace, processes: Processes) -> None:
    parts, model, vae, method, precision = distributed.together(lambda: prepare(args, processes))
    with parts:
        solve = None
        if methods.calibration(args):
            solve = lambda: methods.solved(args, model, method).schedule.weights  # noqa: E731
        is_done = distributed.together(lambda: processes.is_main and parts.open(solve))
        for note in parts.notes:
            print(note, flush=True)
        if distributed.from_main(is_done):
            say(processes, f"{args.output} holds these samples already")
            return
        method = method.with_weights(distributed.from_main(parts.weights))
        try:
            draw_all(args, processes, parts, model, vae, method, precision)
        except OSError as error:
            raise OSError(
                f"{error}; finished batches are kept, the same command goes on with them"
            ) from error


def prepare(args: argparse.Namespace, processes: Processes) -> tuple[Parts, DiT, object, Method, str]:
    """All that can be refused before a file is written: the parts to come, the model, the VAE, the method."""
    precision, dtype = devices.set_precision(args.precision, processes.device)
    execution.check_available(args, processes.device)
    settings, alone = ModelSettings.from_arguments(args), processes.world_size == 1
    model, vae_config = settings.load(processes.device, dtype, fetch=alone)
    if model.source:
        say(processes, f"weights: {model.source}")
    check_guidance(model, args.cfg_scale)
    vae = vae_config and vae_config.load(processes.device, fetch=processes.world_size == 1)
    with contextlib.nullcontext() if processes.is_main else contextlib.redirect_stdout(None):
        method = methods.load_method(args, model, solve=False)
    settings = settings_of(args, model, method, precision, vae_config.spec if vae_config else "none", vae)
    parts = Parts(args.output, settings, image_shape(model, vae_config), args.num_samples)
    return parts, model, vae, method, precision


def draw_all(
    args: argparse.Namespace,
    processes: Processes,
    parts: Parts,
    model: DiT,
    vae,
    method: Method,
    precision: str,
) -> None:
    """Draw this process's share of what is missing; rank 0 puts all together."""
    sample = execution.prepare(args, model, processes.device)
    trajectory = method.trajectory(model, args.cfg_scale, "ddpm" if args.p_sample else "ddim")
    if args.random_weights:
        say(processes, cli.RANDOM_WEIGHTS)
    batch_size = -(-args.batch_size // BLOCK) * BLOCK
    todo = batches(distributed.from_main(parts.missing()), batch_size, args.num_samples)
    say(
        processes,
        f"{args.num_samples} samples of {args.model}, {method.diffusion.num_timesteps} steps, guidance "
        f"{args.cfg_scale:g}, {args.accelerate_method}; {sum(map(len, todo))} to draw on "
        f"{processes.world_size} processes, {precision} on {devices.hardware(processes.device)}",
    )
    mine = todo[processes.rank :: processes.world_size]
    bar = tqdm(total=sum(map(len, mine)), unit="image", disable=None if processes.is_main else True)

    def draw_mine() -> None:
        for samples in mine:
            parts.write(samples.start, draw(args, trajectory, vae, sample, samples))
            bar.update(len(samples))
        bar.close()

    distributed.together(draw_mine)
    if processes.is_main:  # the others need not wait
        parts.assemble()
        size = "x".join(map(str, parts.image_shape))
        print(f"wrote {args.output}, {args.num_samples} images of {size}")


def say(processes: Processes, text: str) -> None:
    if processes.is_main:
        print(text, flush=True)


def main(args: argparse.Namespace) -> None:
    # Ranks meet when all have drawn their share.
    processes = distributed.start(args.device, timedelta(days=7))
    if processes.is_main:
        cli.show_notes(args)
    with execution.one_thread(processes.device):
        run(args, processes)
    distributed.stop()


if __name__ == "__main__":
    cli.run(main, parse_args())
