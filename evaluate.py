"""How good samples are: FID, sFID, IS, precision, recall as ADM has them, and closeness to uncached samples.

    python evaluate.py SAMPLES.npz --reference VIRTUAL_imagenet256_labeled.npz --inception-weights WEIGHTS.pth
    python evaluate.py CACHED.npz --paired UNCACHED.npz                  # MSE, PSNR, SSIM of the same noise
    python evaluate.py SAMPLES.npz --reference OTHER.npz --features NAME    # of an example's judge

Samples are `arr_0` (n, H, W, C) uint8, as sample_ddp.py and ADM write them, an .npy, or a folder of pictures
with all its folders, in the natural order of their names (2.png before 10.png). A reference is the same, or
statistics (`mu`, `sigma`, and `mu_s`, `sigma_s` for sFID), or both as in ADM's reference batches: the
statistics are taken where they are there, precision and recall need the images. IS is ADM's, the mean over
parts of 5,000 consecutive samples. The last line is JSON.
"""

import argparse
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common import cli, devices, registry
from common.arrays import ArrayFile
from common.cli import Unread
from common.files import check_writable, replacing, to_json, write_json
from common.images import Images, image_array
from metrics.checks import require_finite
from metrics.features import Extractor, Features, load_extractor
from metrics.frechet import RunningStatistics, check_statistics, frechet_distance
from metrics.inception_score import SPLIT_SIZE, inception_score
from metrics.lpips import SMALLEST, load_lpips
from metrics.paired import ssim
from metrics.precision_recall import K, precision_recall

STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate samples.")
    parser.add_argument(
        "samples", type=Path, help=".npz with arr_0, uint8 (n, H, W, C); or a folder of pictures"
    )
    parser.add_argument("--reference", type=Path, help="images likewise; .npz of statistics, or of both")
    parser.add_argument("--paired", type=Path, help="uncached samples of the same noise, in the same order")
    parser.add_argument(
        "--features", default="inception", help=f"inception (default) or {' or '.join(registry.features())}"
    )
    parser.add_argument(
        "--inception-weights", help="local file; torch-fidelity's port of TensorFlow's Inception"
    )
    parser.add_argument("--lpips-weights", help="local file, torchvision's AlexNet: adds LPIPS to --paired")
    parser.add_argument("--batch-size", type=cli.positive_int, default=64)
    parser.add_argument("--save-statistics", type=Path, metavar="FILE.npz", help="mu, sigma, mu_s, sigma_s")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="the last line, in a file too")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    args = cli.parse(parser)
    if not (_needs_features(args) or args.paired):
        parser.error("nothing to do; give --reference, --paired or --save-statistics")
    cli.note_unread(parser, args, UNREAD)
    return args


def _needs_features(args: argparse.Namespace) -> bool:
    return bool(args.reference or args.save_statistics)


UNREAD = (
    Unread(("lpips_weights",), lambda args: not args.paired, "without --paired"),
    Unread(
        ("inception_weights",),
        lambda args: not _needs_features(args) or args.features != "inception",
        "without --reference and --features inception",
    ),
    Unread(("features",), lambda args: not _needs_features(args), "without --reference or --save-statistics"),
    Unread(
        ("device",),
        lambda args: not _needs_features(args) and not args.lpips_weights,
        "without a network: MSE, PSNR and SSIM are computed on the host",
    ),
)


# ---- files -----------------------------------------------------------------------------------------


@dataclass
class Reference:
    """What samples are compared with: statistics by kind, or images to take them from, or both."""

    path: Path
    statistics: dict[str, tuple[np.ndarray, np.ndarray]]
    images: Images | None

    @classmethod
    def open(cls, path: Path) -> "Reference":
        """Raises OSError or ValueError where a file or folder is no reference, before its images are read."""
        if path.is_dir():
            return cls(path, {}, Images(path))
        file = ArrayFile(path)
        statistics, images = read_statistics(file), image_array(file)
        if not statistics and images is None:
            raise ValueError(f"{path} holds {file.contents}; neither images (arr_0) nor mu and sigma")
        return cls(path, statistics, None if images is None else Images(path))


def read_statistics(file: ArrayFile) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What a file holds of ("pool": (mu, sigma), "spatial": (mu_s, sigma_s)), in float64.

    Raises ValueError for one without the other and for what `check_statistics` refuses.
    """
    found = {}
    for kind, names in STATISTICS.items():
        there = [name for name in names if name in file.names]
        if len(there) == 1:
            raise ValueError(f"{file.label} holds {there[0]} without the other of {' and '.join(names)}")
        if there:
            pair = [file.read(name, "fiu") for name in names]
            try:
                found[kind] = check_statistics(*pair, names)
            except ValueError as error:
                raise ValueError(f"{file.label}: {error}; make it again") from None
    return found


# ---- features of a file ----------------------------------------------------------------------------


@dataclass
class Summary:
    """What is kept of a file's features: statistics; pool features and probabilities of every image."""

    statistics: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    pool: Tensor | None = None
    probabilities: Tensor | None = None


def features_of(images: Images, batch: Tensor, first: int, extractor: Extractor) -> Features:
    """A batch's features. Raises ValueError where they are not finite, naming the first such image."""
    features = extractor(batch)
    for name, values in features._asdict().items():
        if values is not None:
            require_finite(values, f"{images.path}: {name} features", first)
    return features


def summarize(images: Images, extractor: Extractor, batch_size: int) -> Summary:
    """One pass over the images. 50,000 under Inception keep 0.6 GB."""
    running = {kind: RunningStatistics() for kind in STATISTICS}
    pool = probabilities = None
    first = 0
    bar = tqdm(total=len(images), desc=f"features of {images.path.name}", unit="image", disable=None)
    for batch in images.batches(batch_size):
        features = features_of(images, batch, first, extractor)
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


def against_reference(samples: Summary, reference: Reference, extractor: Extractor, batch_size: int) -> dict:
    """FID, sFID, IS; precision and recall where the reference holds images."""
    statistics, images = reference.statistics, None
    if reference.images:
        images = summarize(reference.images, extractor, batch_size)
        images.probabilities = None  # not needed
        statistics = images.statistics | statistics
    result = {}
    for kind, name in (("pool", "fid"), ("spatial", "sfid")):
        if kind in statistics and kind in samples.statistics:
            result[name] = frechet_distance(*samples.statistics[kind], *statistics[kind])
    score, deviation = inception_score(samples.probabilities.numpy())
    alone = len(samples.probabilities) <= SPLIT_SIZE  # one part has no deviation
    result |= {"inception_score": score, "inception_score_std": None if alone else deviation}
    if images:
        result["precision"], result["recall"] = precision_recall(samples.pool, images.pool)
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


# ---- what can be wrong is found before the long pass over the images --------------------------------


def check_features(
    samples: Images, reference: Reference | None, extractor: Extractor, features_name: str
) -> list[str]:
    """Refuse what the features of --features cannot be compared on; returns notes on what is left out."""
    if len(samples) < 2:
        raise ValueError(f"{samples.path} holds one image, which has no covariance; give more")
    widths = {}
    for images in (samples, reference.images if reference else None):
        if images:
            features = features_of(images, next(iter(images.batches(2))), 0, extractor)
            widths = {
                kind: values.shape[1]
                for kind, values in (("pool", features.pool), ("spatial", features.spatial))
                if values is not None
            }
    if reference is None:
        return []
    for kind, (mean, _) in reference.statistics.items():
        if kind in widths and len(mean) != widths[kind]:
            raise ValueError(
                f"{reference.path}: {STATISTICS[kind][0]} has {len(mean)} values, the features of --features "
                f"{features_name} {widths[kind]}; use what made it"
            )
    notes, n = [], len(samples)
    if reference.images is None:
        notes.append(f"{reference.path} holds no images, precision and recall are left out")
        if not widths.keys() & reference.statistics.keys():
            raise ValueError(
                f"{reference.path} holds no mu and sigma, which --features {features_name} needs"
            )
        left_out = widths.keys() - reference.statistics.keys()
        notes += [
            f"{reference.path} holds no {' and '.join(STATISTICS[kind])}: no {name}"
            for kind, name in (("pool", "FID"), ("spatial", "sFID"))
            if kind in left_out
        ]
    elif min(n, len(reference.images)) <= K:
        few = min((samples, reference.images), key=len)
        raise ValueError(
            f"{few.path} holds too few images ({len(few)}): precision and recall need more than {K}; give "
            "more, or statistics as the reference"
        )
    if n > SPLIT_SIZE and n % SPLIT_SIZE:
        notes.append(f"IS: the last part holds {n % SPLIT_SIZE} images and counts like those of {SPLIT_SIZE}")
    return notes


def check_pairs(samples: Images, plain: Images) -> None:
    """Refuse pairs of other shapes or names, or of other noise where sample_ddp.py said of which."""
    if samples.shape != plain.shape:
        raise ValueError(f"{samples.path} is {samples.shape}, {plain.path} {plain.shape}; pairs are needed")
    for one, other in zip(samples.names or [], plain.names or [], strict=False):
        if one != other:
            raise ValueError(
                f"{samples.path} holds {one} where {plain.path} holds {other}; pairs need the same names"
            )
    one, other = (_drawn_from(images.path) for images in (samples, plain))
    for name in ("seed", "labels"):
        if one and other and one.get(name) != other.get(name):
            raise ValueError(
                f"{samples.path} was drawn with {name} {one.get(name)}, {plain.path} with {other.get(name)}; "
                "pairs need the same noise"
            )


def _drawn_from(samples: Path) -> dict:
    """What sample_ddp.py wrote beside its samples; empty where there is none."""
    path = Path(f"{samples}.settings.json")
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged; remove it if the samples are of the same noise") from None


def main(args: argparse.Namespace) -> None:
    cli.show_notes(args)
    device = devices.choose_device(args.device)
    for path, suffix in ((args.output, ".json"), (args.save_statistics, ".npz")):
        if path:
            check_writable(path, [suffix])
    samples = Images(args.samples)
    reference = Reference.open(args.reference) if args.reference else None
    plain = Images(args.paired) if args.paired else None
    lpips = extractor = None
    notes = samples.notes + [
        note for images in (reference and reference.images, plain) if images for note in images.notes
    ]
    if plain:
        check_pairs(samples, plain)
        lpips = load_lpips(args.lpips_weights, device) if args.lpips_weights else None
        if lpips and min(samples.shape[1:3]) < SMALLEST:
            raise ValueError(
                f"{args.samples} is {samples.shape}; LPIPS needs {SMALLEST} pixels a side, leave it out"
            )
    if reference or args.save_statistics:
        extractor = load_extractor(args.features, args.inception_weights, device)
        notes += check_features(samples, reference, extractor, args.features)
    for note in notes:
        print(f"note: {note}")

    result = {"samples": str(args.samples), "n": len(samples)}
    if extractor:
        summary = summarize(samples, extractor, args.batch_size)
        result["features"] = args.features
        if args.save_statistics:
            arrays = {}
            for kind, pair in summary.statistics.items():
                arrays |= dict(zip(STATISTICS[kind], pair, strict=True))
            with replacing(args.save_statistics) as temporary:
                np.savez(temporary, **arrays)
        if reference:
            result["reference"] = str(args.reference)
            result |= against_reference(summary, reference, extractor, args.batch_size)
    if plain:
        result |= {"paired": str(args.paired)} | against_uncached(samples, plain, lpips, args.batch_size)
    for name, value in result.items():
        print(f"{name:20} {value:.6g}" if isinstance(value, float) else f"{name:20} {value}")
    line = to_json(result)
    if args.output:
        write_json(args.output, result)
    print(line)


if __name__ == "__main__":
    cli.run(main, parse_args())
