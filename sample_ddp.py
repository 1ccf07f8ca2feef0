"""Sample many images into one ADM-style .npz (`arr_0`, uint8 NHWC), on any number of processes and nodes.

    torchrun --nproc_per_node=4 sample_ddp.py --model DiT-XL/2 --vae ema --num-samples 50000 \\
        --cfg-scale 1.5 --num-sampling-steps 20 --accelerate-method dynamiclayer --path ROUTER \\
        --output samples.npz
    python evaluate.py samples.npz --reference VIRTUAL_imagenet256_labeled.npz --inception-weights WEIGHTS.pth

Sample k depends on (seed, k) alone. Finished batches lie in OUTPUT.parts until all are there; after any
interruption the same command goes on with what is missing, on as many processes as one likes. On a CPU the
file comes out the same byte for byte, whatever the processes and the batch size; a GPU may round otherwise
for another batch size. Several nodes need a shared folder.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import zipfile
import zlib
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import cli
import distributed
import execution
import methods
from denoiser import check_guidance
from distributed import Processes
from files import replacing, write_json
from identity import differences, weights_fingerprint
from methods import Method
from models import DiT
from sampling import (
    SAMPLING_STREAM,
    Sample,
    Trajectory,
    choose_vae,
    decode,
    draw_labels,
    find_checkpoint,
    generate_seeded,
    image_shape,
    load_model,
    pixels_of,
    sample_generator,
)
from vae import read_vae_config

# Matrix products of other shapes may round otherwise: every forward takes a multiple of this many samples, at
# the same places, so that the batch size changes nothing.
BLOCK = 16
_LABEL_KEY = 1  # (seed, stream, k, this) draws sample k's random label; its noise comes without this


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Sample many images into one .npz.")
    cli.add_model_arguments(parser, with_vae=True)
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--num-samples", type=cli.positive_int, default=50000)
    sampling.add_argument("--cfg-scale", type=cli.finite, default=1.5, help="guidance, 1 = off (default 1.5)")
    sampling.add_argument("--num-sampling-steps", default="50", help="N, or a respacing (default 50)")
    sampling.add_argument("--ddim-sample", action="store_true", help="DDIM, eta 0 (the default)")
    sampling.add_argument("--p-sample", action="store_true", help="DDPM (ancestral)")
    sampling.add_argument("--seed", type=cli.seed, default=0)
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
    execution.add_arguments(parser)
    cli.add_device_arguments(parser)
    args = cli.parse(parser)
    if args.ddim_sample and args.p_sample:
        parser.error("--ddim-sample and --p-sample exclude each other; give one")
    if args.output.suffix != ".npz":
        parser.error(f"--output {args.output} does not end in .npz")
    methods.check_arguments(parser, args)
    return args


@dataclass(frozen=True)
class Parts:
    """The finished batches beside an .npz to be: FIRST-COUNT.npy of samples FIRST .. FIRST + COUNT - 1."""

    output: Path
    settings: dict
    image_shape: tuple[int, int, int]
    num_samples: int

    @cached_property
    def folder(self) -> Path:
        return self.output.with_name(f"{self.output.name}.parts")

    @cached_property
    def _facts(self) -> Path:
        """What the .npz was sampled with, beside it."""
        return self.output.with_name(f"{self.output.name}.settings.json")

    def open(self) -> bool:
        """Check before the first batch what can be known; returns whether all is done already.

        Raises ValueError for other samples in the way, OSError for too little space or an unwritable folder.
        """
        for path in (self._facts, self.folder / "settings.json"):
            if (path.parent == self.folder or self.output.exists()) and path.exists():
                self._refuse_others(path)
        if self.output.exists():
            if not self._facts.exists():
                raise ValueError(f"{self.output} exists, not of this command; take another --output")
            shutil.rmtree(self.folder, ignore_errors=True)  # a kill between the .npz and this left it
            return True
        self.output.parent.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "settings.json").exists():  # parts that nobody answers for
            shutil.rmtree(self.folder, ignore_errors=True)
        for path in self.output.parent.iterdir():  # a killed assembly
            if re.fullmatch(rf"{re.escape(self.output.stem)}\.\d+\.part\.npz", path.name):
                path.unlink()
        if not os.access(self.output.parent, os.W_OK):
            raise PermissionError(f"folder {self.output.parent} is not writable; give another --output")
        missing, image = len(self.missing()), int(np.prod(self.image_shape))
        needed = (missing + self.num_samples) * image  # the parts that are to come, then the .npz beside them
        free = shutil.disk_usage(self.output.parent).free
        if needed > free:
            raise OSError(
                f"{self.output} needs {needed / 1e9:.1f} GB with its parts, {self.output.parent} has "
                f"{free / 1e9:.1f} GB free; make space or give another --output"
            )
        self.folder.mkdir(exist_ok=True)
        write_json(self.folder / "settings.json", self.settings)
        return False

    def _refuse_others(self, path: Path) -> None:
        found = json.loads(path.read_text())
        if others := differences(found, self.settings):
            name, value = others[0]
            raise ValueError(
                f"{path} says {name} {value}, this command {self.settings[name]}; remove the old samples "
                "or take another --output"
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
        with replacing(self.folder / f"{first:07d}-{len(images):05d}.npy") as temporary:
            np.save(temporary, images.numpy())

    def assemble(self) -> None:
        """One .npz of all parts, streamed; then the parts go. Raises ValueError where one is missing."""
        if missing := self.missing():
            raise ValueError(
                f"{self.folder} lacks {len(missing)} samples that were drawn: is the same command running "
                "elsewhere? Run it again when that has ended"
            )
        write_json(self._facts, self.settings)
        shape = (self.num_samples, *self.image_shape)
        member = zipfile.ZipInfo("arr_0.npy", date_time=(1980, 1, 1, 0, 0, 0))  # same samples, same bytes
        with (
            replacing(self.output) as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
            archive.open(member, "w", force_zip64=True) as stream,
        ):
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(stream, header)
            position = 0
            for first, count, path in self._finished():
                skipped = position - first  # of a batch that begins inside the last one
                if skipped < count:
                    stream.write(np.load(path)[skipped:].tobytes())
                    position = first + count
        shutil.rmtree(self.folder)


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
    """All that the images depend on. vae: the loaded one of `vae_spec`."""
    schedule = None
    if method.schedule is not None:
        table = method.schedule.compute.numpy().tobytes()
        if method.schedule.weights is not None:
            table += method.schedule.weights.numpy().tobytes()
        schedule = f"{method.schedule.source}, CUR {method.schedule.cur:.6f}, {zlib.crc32(table):08x}"
    read = ("model", "num_samples", "seed", "labels", "cfg_scale", "num_sampling_steps", "accelerate_method")
    return {name: getattr(args, name) for name in read} | {
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


def run(args: argparse.Namespace, processes: Processes) -> None:
    precision, dtype = cli.set_precision(args.precision, processes.device)
    if not args.ckpt and not args.random_weights:
        args.ckpt = find_checkpoint(args.model, args.image_size, fetch=processes.world_size == 1)
    spec = choose_vae(args.vae, args.model, args.random_weights)
    vae_config = read_vae_config(spec)
    model = load_model(**cli.model_options(args), device=processes.device, dtype=dtype, vae=vae_config)
    if model.source:
        say(processes, f"weights: {model.source}")
    check_guidance(model, args.cfg_scale)
    vae = vae_config and vae_config.load(processes.device, fetch=processes.world_size == 1)
    with contextlib.nullcontext() if processes.is_main else contextlib.redirect_stdout(None):
        method = methods.load_method(args, model)
    shape = image_shape(model, vae_config)
    settings = settings_of(args, model, method, precision, spec, vae)
    parts = Parts(args.output, settings, shape, args.num_samples)
    if together(lambda: processes.is_main and parts.open()):
        say(processes, f"{args.output} holds these samples already")
        return
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
        f"{processes.world_size} processes, {precision} on {cli.hardware(processes.device)}",
    )
    mine = todo[processes.rank :: processes.world_size]
    bar = tqdm(total=sum(map(len, mine)), unit="image", disable=None if processes.is_main else True)

    def draw_mine() -> None:
        for samples in mine:
            parts.write(samples.start, draw(args, trajectory, vae, sample, samples))
            bar.update(len(samples))
        bar.close()

    together(draw_mine)
    if processes.is_main:  # the others need not wait
        parts.assemble()
        print(f"wrote {args.output}, {args.num_samples} images of {'x'.join(map(str, shape))}")


def together(function):
    """Call a function on every rank; where it fails on one, all end. Returns rank 0's result."""
    result = error = None
    try:
        result = function()
    except (ValueError, OSError) as caught:
        error = caught
    failed = distributed.any_rank(error is not None)
    if error is not None:
        raise error
    if failed:
        raise SystemExit(2)
    return distributed.from_main(result)


def say(processes: Processes, text: str) -> None:
    if processes.is_main:
        print(text, flush=True)


def main(args: argparse.Namespace) -> None:
    processes = distributed.start(
        args.device, timedelta(days=7)
    )  # ranks meet when all have drawn their share
    if processes.is_main:
        cli.show_notes(args)
    run(args, processes)
    distributed.stop()


if __name__ == "__main__":
    cli.run(main, parse_args())
