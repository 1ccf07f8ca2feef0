"""How good samples are: FID, sFID, IS, precision, recall as ADM has them, and closeness to uncached samples.

    python evaluate.py SAMPLES.npz --reference VIRTUAL_imagenet256_labeled.npz --inception-weights WEIGHTS.pth
    python evaluate.py CACHED.npz --paired UNCACHED.npz                  # MSE, PSNR, SSIM of the same noise
    python evaluate.py SAMPLES.npz --reference OTHER.npz --features NAME    # an example's own features
    python evaluate.py SAMPLES.npz --clip                    # CLIP score of samples of prompts; and --paired

Samples are `arr_0` (n, H, W, C) uint8, as sample_ddp.py and ADM write them, an .npy, or a folder of pictures
with all its folders, in the natural order of their names (2.png before 10.png). A reference is the same, or
statistics (`mu`, `sigma`, and `mu_s`, `sigma_s` for sFID), or both as in ADM's reference batches: the
statistics are taken where they are there, precision and recall need the images. IS is ADM's, the mean over
parts of 5,000 consecutive samples. The last line is JSON.
"""

import argparse
from pathlib import Path

import numpy as np

from common import cli, devices, registry
from common.cli import Unread
from common.files import check_writable, replacing, to_json, write_json
from common.images import Images
from metrics import clip_score
from metrics.clip_score import ClipScorer, clip_scores
from metrics.evaluation import (
    STATISTICS,
    Reference,
    against_reference,
    against_uncached,
    check_features,
    check_pairs,
    summarize,
)
from metrics.features import load_extractor
from metrics.lpips import SMALLEST, load_lpips


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate samples.")
    parser.add_argument(
        "samples", type=Path, help=".npz with arr_0, uint8 (n, H, W, C); or a folder of pictures"
    )
    parser.add_argument(
        "--reference", type=Path, help="images as above, or an .npz with statistics, or with both"
    )
    parser.add_argument("--paired", type=Path, help="uncached samples of the same noise, in the same order")
    parser.add_argument(
        "--features", default="inception", help=f"inception (default) or {' or '.join(registry.features())}"
    )
    parser.add_argument(
        "--inception-weights", help="local file; torch-fidelity's port of TensorFlow's Inception"
    )
    parser.add_argument("--lpips-weights", help="local file, torchvision's AlexNet: adds LPIPS to --paired")
    parser.add_argument(
        "--clip", nargs="?", const=clip_score.DEFAULT, metavar="FOLDER",
        help="add the CLIP score, by a CLIP model's folder or id on the Hub (default "
        f"{clip_score.DEFAULT})",
    )  # fmt: skip
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE",
        help="with --clip: the prompts, a line for each picture (default: SAMPLES.prompts.txt, which "
        "sample_ddp.py writes)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=cli.positive_int, default=64, help="images at once (default 64)")
    parser.add_argument(
        "--save-statistics", type=Path, metavar="FILE.npz", help="write mu, sigma, mu_s, sigma_s"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="also write the last line to a file")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    args = cli.parse(parser)
    if not (_needs_features(args) or args.paired or args.clip):
        parser.error("nothing to do; give --reference, --paired, --clip or --save-statistics")
    cli.note_unread(parser, args, UNREAD)
    return args


def _needs_features(args: argparse.Namespace) -> bool:
    return bool(args.reference or args.save_statistics)


UNREAD = (
    Unread(("lpips_weights",), lambda args: not args.paired, "without --paired"),
    Unread(("prompts",), lambda args: not args.clip, "without --clip"),
    Unread(
        ("inception_weights",),
        lambda args: not _needs_features(args) or args.features != "inception",
        "without --reference and --features inception",
    ),
    Unread(("features",), lambda args: not _needs_features(args), "without --reference or --save-statistics"),
    Unread(
        ("device",),
        lambda args: not (_needs_features(args) or args.lpips_weights or args.clip),
        "without a network: MSE, PSNR and SSIM are computed on the host",
    ),
)


def main(args: argparse.Namespace) -> None:
    cli.show_notes(args)
    device = devices.choose_device(args.device)
    for path, suffix in ((args.output, ".json"), (args.save_statistics, ".npz")):
        if path:
            check_writable(path, [suffix])
    samples = Images(args.samples)
    reference = Reference.open(args.reference) if args.reference else None
    plain = Images(args.paired) if args.paired else None
    lpips = extractor = scorer = None
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
    if args.clip:
        prompts = clip_score.prompts_of(samples, args.prompts)
        scorer = ClipScorer(args.clip, device)
        if cut := scorer.count_cut(prompts):
            notes.append(f"{cut} of {len(prompts)} prompts are cut after {scorer.num_tokens} tokens for CLIP")
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
    if scorer:
        scores = [clip_scores(one, prompts, scorer, args.batch_size) for one in (samples, plain) if one]
        result |= {"clip": args.clip} | clip_score.figures(*scores)
    for name, value in result.items():
        print(f"{name:20} {value:.6g}" if isinstance(value, float) else f"{name:20} {value}")
    line = to_json(result)
    if args.output:
        write_json(args.output, result)
    print(line)


if __name__ == "__main__":
    cli.run(main, parse_args())
