"""How good samples are: FID, sFID, IS, precision, recall as ADM has them, and closeness to uncached samples.

    python evaluate.py SAMPLES.npz --reference VIRTUAL_imagenet256_labeled.npz --inception-weights WEIGHTS.pth
    python evaluate.py CACHED.npz --paired UNCACHED.npz                  # MSE, PSNR, SSIM of the same noise
    python evaluate.py DIGITS.npz --reference OTHER.npz --features digits

Samples are `arr_0` (n, H, W, C) uint8, as sample_ddp.py and ADM write them. A reference is such a file, or
statistics (`mu`, `sigma`, and `mu_s`, `sigma_s` for sFID), or both as in ADM's reference batches: the
statistics are taken where they are there, precision and recall need the images. The last line is JSON.
"""

import argparse
import json
import math
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import cli
from files import check_writable, read_json, replacing, write_json
from metrics.features import Extractor, load_extractor
from metrics.frechet import RunningStatistics, frechet_distance
from metrics.inception_score import SPLITS, inception_score
from metrics.lpips import SMALLEST, load_lpips
from metrics.paired import ssim
from metrics.precision_recall import precision_recall

_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError)
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate samples.")
    parser.add_argument("samples", type=Path, help=".npz with arr_0, uint8 (n, H, W, C)")
    parser.add_argument("--reference", type=Path, help=".npz of images, statistics, or both")
    parser.add_argument("--paired", type=Path, help=".npz of uncached samples of the same noise")
    parser.add_argument("--features", default="inception", help="inception (default) or digits")
    parser.add_argument(
        "--inception-weights", help="local file; torch-fidelity's port of TensorFlow's Inception"
    )
    parser.add_argument("--lpips-weights", help="local file, torchvision's AlexNet: adds LPIPS to --paired")
    parser.add_argument("--batch-size", type=cli.positive_int, default=64)
    parser.add_argument("--save-statistics", type=Path, metavar="FILE.npz", help="mu, sigma, mu_s, sigma_s")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="the last line, in a file too")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    args = parser.parse_args()
    args.notes, needs_features = [], args.reference or args.save_statistics
    if not (needs_features or args.paired):
        parser.error("nothing to do; give --reference, --paired or --save-statistics")
    if args.lpips_weights and not args.paired:
        args.notes.append("--lpips-weights has no effect without --paired")
    if args.inception_weights and (not needs_features or args.features != "inception"):
        args.notes.append("--inception-weights has no effect without --reference and --features inception")
    return args


# ---- files -----------------------------------------------------------------------------------------


class Images:
    """`arr_0` of an .npz, read in batches: never as a whole."""

    def __init__(self, path: Path):
        self.path = path
        with self._open() as (_, shape):
            self.shape = shape

    def _open(self):
        return _ArrayReader(self.path, "arr_0")

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int) -> Iterator[Tensor]:
        """uint8 (n, H, W, C)"""
        with self._open() as (stream, shape):
            image = math.prod(shape[1:])
            for first in range(0, len(self), size):
                n = min(size, len(self) - first)
                try:
                    data = stream.read(n * image)
                except _DAMAGE:
                    data = b""
                if len(data) != n * image:
                    raise ValueError(f"{self.path} is damaged or ends early; sample again")
                yield torch.frombuffer(bytearray(data), dtype=torch.uint8).view(n, *shape[1:])


class _ArrayReader:
    """A member of an .npz as a stream at its first value, and its shape."""

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name

    def __enter__(self):
        keys = keys_of(self.path)
        if self.name not in keys:
            raise ValueError(
                f"{self.path} holds {', '.join(sorted(keys)) or 'nothing'}, no images ({self.name})"
            )
        self._zip = zipfile.ZipFile(self.path)
        try:
            stream = self._zip.open(f"{self.name}.npy")
            first, header = np.lib.format.read_magic(stream), np.lib.format
            read = header.read_array_header_1_0 if first == (1, 0) else header.read_array_header_2_0
            shape, fortran, dtype = read(stream)
        except (*_DAMAGE, ValueError):
            raise ValueError(f"{self.path}: {self.name} is damaged; sample again") from None
        if dtype != np.uint8 or len(shape) != 4 or fortran or shape[3] not in (1, 3) or not shape[0]:
            raise ValueError(
                f"{self.path}: {self.name} is {dtype} {shape}; uint8 (n, H, W, 3 or 1) is needed"
            )
        return stream, shape

    def __exit__(self, *_):
        self._zip.close()


def keys_of(path: Path) -> set[str]:
    """The arrays in an .npz. Raises FileNotFoundError or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give an .npz")
    try:
        with zipfile.ZipFile(path) as file:
            return {name.removesuffix(".npy") for name in file.namelist()}
    except zipfile.BadZipFile:
        raise ValueError(f"{path} is no .npz; sample_ddp.py writes them") from None


def read_statistics(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What an .npz holds of ("pool": (mu, sigma), "spatial": (mu_s, sigma_s)), in float64."""
    keys, found = keys_of(path), {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for kind, names in STATISTICS.items():
                if set(names) <= keys:
                    found[kind] = tuple(file[name].astype(np.float64) for name in names)
    except (*_DAMAGE, ValueError) as error:
        raise ValueError(f"{path}: its statistics are damaged ({error}); make it again") from None
    for kind, (mean, covariance) in found.items():
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            names = " and ".join(STATISTICS[kind])
            raise ValueError(f"{path}: {names} of shapes {mean.shape} and {covariance.shape} do not fit")
    return found


# ---- features of a file ----------------------------------------------------------------------------


@dataclass
class Summary:
    """What is kept of a file's features: statistics; pool features and probabilities of every image."""

    statistics: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    pool: Tensor | None = None
    probabilities: Tensor | None = None


def summarize(images: Images, extractor: Extractor, batch_size: int) -> Summary:
    """One pass over the images. 50,000 under Inception keep 0.6 GB."""
    running = {kind: RunningStatistics() for kind in STATISTICS}
    pool = probabilities = None
    first = 0
    bar = tqdm(total=len(images), desc=f"features of {images.path.name}", unit="image", disable=None)
    for batch in images.batches(batch_size):
        features = extractor(batch)
        for kind, values in (("pool", features.pool), ("spatial", features.spatial)):
            if values is not None:
                running[kind].update(values.numpy())
        if pool is None:  # filled as batches come: joining them at the end would need them twice
            pool = torch.empty(len(images), features.pool.shape[1])
            probabilities = torch.empty(len(images), features.probabilities.shape[1])
        pool[first : first + len(batch)] = features.pool
        probabilities[first : first + len(batch)] = features.probabilities
        first += len(batch)
        bar.update(len(batch))
    bar.close()
    statistics = {kind: one.finish() for kind, one in running.items() if one.count}
    return Summary(statistics, pool, probabilities)


def against_reference(samples: Summary, args: argparse.Namespace, extractor: Extractor) -> dict[str, float]:
    """FID, sFID, IS; precision and recall where the reference holds images."""
    statistics, images = read_statistics(args.reference), None
    if "arr_0" in keys_of(args.reference):
        images = summarize(Images(args.reference), extractor, args.batch_size)
        images.probabilities = None  # not needed
    reference = (images.statistics if images else {}) | statistics
    result = {}
    for kind, name in (("pool", "fid"), ("spatial", "sfid")):
        if kind in reference and kind in samples.statistics:
            if reference[kind][0].shape != samples.statistics[kind][0].shape:
                raise ValueError(
                    f"{args.reference}: {STATISTICS[kind][0]} has {len(reference[kind][0])} values, the "
                    f"features of --features {args.features} {len(samples.statistics[kind][0])}; "
                    "use what made it"
                )
            result[name] = frechet_distance(*samples.statistics[kind], *reference[kind])
    result["inception_score"], result["inception_score_std"] = inception_score(samples.probabilities.numpy())
    if images:
        result["precision"], result["recall"] = precision_recall(samples.pool, images.pool)
    else:
        print(f"note: {args.reference} holds no images, precision and recall are left out")
    return result


def against_uncached(samples: Images, plain: Images, lpips, batch_size: int) -> dict[str, float]:
    """MSE of the grey levels scaled to [-1, 1], PSNR from it, the mean SSIM and LPIPS."""
    squares, similarity, distance = 0.0, 0.0, 0.0
    for one, other in zip(samples.batches(batch_size), plain.batches(batch_size), strict=True):
        squares += (one.double() - other.double()).square().sum().item()
        similarity += ssim(one, other).sum().item()
        distance += lpips(one, other).double().sum().item() if lpips else 0.0
    error = squares / math.prod(samples.shape)
    result = {"mse": error / 127.5**2, "psnr": 10 * math.log10(255**2 / error) if error else None}
    result["ssim"] = similarity / len(samples)
    return result | ({"lpips": distance / len(samples)} if lpips else {})


def check_pairs(samples: Images, plain: Images) -> None:
    """Refuse pairs of other shapes, or drawn from other noise where sample_ddp.py said from which."""
    if samples.shape != plain.shape:
        raise ValueError(f"{samples.path} is {samples.shape}, {plain.path} {plain.shape}; pairs are needed")
    files = [Path(f"{images.path}.settings.json") for images in (samples, plain)]
    if not all(file.is_file() for file in files):
        return
    one, other = map(read_json, files)
    for name in ("seed", "labels"):
        if one.get(name) != other.get(name):
            raise ValueError(
                f"{samples.path} was drawn with {name} {one.get(name)}, {plain.path} with {other.get(name)}; "
                "pairs need the same noise"
            )


def check_reference(path: Path) -> None:
    statistics = read_statistics(path)
    if "arr_0" in keys_of(path):
        Images(path)
    elif not statistics:
        raise ValueError(f"{path} holds neither arr_0 nor mu and sigma; it is no reference")


def main(args: argparse.Namespace) -> None:
    cli.show_notes(args)
    device = cli.choose_device(args.device)
    samples, result = Images(args.samples), {"samples": str(args.samples)}
    result["n"] = len(samples)
    # What can be wrong is found before the long pass over the images.
    for path, suffix in ((args.output, ".json"), (args.save_statistics, ".npz")):
        if path:
            check_writable(path, [suffix])
    if args.reference:
        check_reference(args.reference)
        if len(samples) < SPLITS:
            raise ValueError(
                f"{args.samples} holds {len(samples)} images; IS takes {SPLITS} splits, give more"
            )
    if args.paired:
        plain = Images(args.paired)
        check_pairs(samples, plain)
        lpips = load_lpips(args.lpips_weights, device) if args.lpips_weights else None
        if lpips and min(samples.shape[1:3]) < SMALLEST:
            raise ValueError(
                f"{args.samples} is {samples.shape}; LPIPS needs {SMALLEST} pixels a side, leave it out"
            )
    if args.reference or args.save_statistics:
        extractor = load_extractor(args.features, args.inception_weights, device)
        summary = summarize(samples, extractor, args.batch_size)
        result["features"] = args.features
        if args.save_statistics:
            arrays = {}
            for kind, pair in summary.statistics.items():
                arrays |= dict(zip(STATISTICS[kind], pair, strict=True))
            with replacing(args.save_statistics) as temporary:
                np.savez(temporary, **arrays)
        if args.reference:
            result["reference"] = str(args.reference)
            result |= against_reference(summary, args, extractor)
    if args.paired:
        result |= {"paired": str(args.paired)} | against_uncached(samples, plain, lpips, args.batch_size)
    for name, value in result.items():
        print(f"{name:20} {value:.6g}" if isinstance(value, float) else f"{name:20} {value}")
    if args.output:
        write_json(args.output, result)
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main, parse_args())
