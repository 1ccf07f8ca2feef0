"""The figures of `evaluate.py`: samples in files against a reference, and against uncached samples."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.arrays import ArrayFile
from common.images import Images, image_array
from metrics.checks import require_finite
from metrics.clip_score import prompts_beside
from metrics.features import Extractor, Features
from metrics.frechet import RunningStatistics, check_statistics, frechet_distance
from metrics.inception_score import SPLIT_SIZE, inception_score
from metrics.paired import ssim
from metrics.precision_recall import K, precision_recall

STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


# ---- files -----------------------------------------------------------------------------------------


@dataclass
class Reference:
    """The reference of samples: statistics by kind, or images to compute them from, or both."""

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
    """The statistics in a file, in float64: {"pool": (mu, sigma), "spatial": (mu_s, sigma_s)}, or a part.

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
    """The features of a file: statistics by kind; pool features and probabilities of every image."""

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
    """Refuse files whose features cannot be compared; returns notes on figures that are left out."""
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
    """Refuse pairs of other shapes or names, or, as sample_ddp.py records them, other noise or prompts."""
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
    texts = [prompts_beside(images.path) for images in (samples, plain)]
    if all(path.is_file() for path in texts) and texts[0].read_bytes() != texts[1].read_bytes():
        raise ValueError(f"{texts[0]} and {texts[1]} hold other prompts; pairs need the same")


def _drawn_from(samples: Path) -> dict:
    """The settings that sample_ddp.py wrote beside its samples; empty where there are none."""
    path = Path(f"{samples}.settings.json")
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged; remove it if the samples are of the same noise") from None
