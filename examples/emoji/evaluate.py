"""How good the uncached emoji model is: named by the judge, beside the real pictures; how much is memorised.

    python -m examples.emoji.evaluate                      # the study's 500 prompts: some minutes
    python -m examples.emoji.evaluate --cfg-scales 3 4.5 6 --sheet results/emoji/sheet.png

The prompts are those of `prompts/study.txt`, by their split. `nearest` is the median over pictures of the
root mean square difference, in grey levels of 0 .. 255, to the closest training picture, both at 32 x 32; the
same of real held-out pictures stands beside it. A model that repeats its training pictures lies far below
that. `copies` is the share of pictures closer than COPY levels.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.prompts import read_prompts
from backbones.settings import ModelSettings
from common import cli
from common.files import replacing
from common.pictures import sheet
from examples.emoji import FOLDER, MODEL, data
from examples.emoji.judge import NUM_STYLES, SPLITS, Judge, real_figures
from sampling.decoding import decode
from sampling.loop import generate_seeded
from sampling.settings import SamplingSettings

STUDY, SHEET = (FOLDER / "prompts" / f"{name}.txt" for name in ("study", "sheet"))
COPY = 12.0


def small(images: Tensor) -> Tensor:
    """uint8 pictures (n, 64, 64, 3) as grey levels (n, 32 * 32 * 3)."""
    return F.avg_pool2d(images.permute(0, 3, 1, 2).float(), 2).flatten(1)


def nearest_levels(images: Tensor, others: Tensor) -> Tensor:
    """Root mean square difference (n,) from each picture to the closest of `others`, in grey levels."""
    one, other = small(images), small(others)
    return torch.cdist(one, other).min(dim=1).values / one.shape[1] ** 0.5


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate the uncached emoji model.")
    parser.add_argument("--data", type=Path, default=data.FOLDER / "emoji.npz")
    parser.add_argument("--samples", type=cli.positive_int, default=500, help="default: 500")
    parser.add_argument("--steps", type=cli.positive_int, default=20, help="of DPM-Solver++; default: 20")
    parser.add_argument("--cfg-scales", type=cli.finite, nargs="+", default=[4.5], help="default: 4.5")
    parser.add_argument("--seed", type=cli.seed, default=0, help="default: 0")
    parser.add_argument("--batch-size", type=cli.positive_int, default=50, help="default: 50")
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE.png", help="also draw the 60 prompts of the sheet"
    )
    return parser.parse_args()


def draw(prompts: Path, samples: int | None, cfg_scale: float, args: argparse.Namespace) -> Tensor:
    """uint8 pictures of the prompts in a file, in turn; None: one each."""
    model, vae = ModelSettings(MODEL, prompts=prompts).load()
    sampling = SamplingSettings(str(args.steps), sampler="dpm-solver++", cfg_scale=cfg_scale)
    labels = torch.arange(samples or model.num_classes) % model.num_classes
    trajectory = sampling.trajectory(model, sampling.chain(model))
    x_0 = generate_seeded(trajectory, labels, args.seed, args.batch_size, progress=True)
    return decode(x_0, vae.load())


def table_line(name: str, figures: dict[str, float], nearest: Tensor) -> str:
    return (
        f"{name:34} {100 * figures['retrieval']:9.1f} {100 * figures['style']:7.1f} {figures['clip']:7.3f} "
        f"{figures['fd_data']:8.2f} {nearest.median():8.1f} {100 * (nearest < COPY).float().mean():7.1f}"
    )


def main(args: argparse.Namespace) -> None:
    judge, emoji = Judge(), data.load(args.data)
    images, split = torch.from_numpy(emoji.images), torch.from_numpy(emoji.split)
    train, prompts = images[split == data.TRAIN], read_prompts(STUDY)
    captions = judge.numbers(prompts)
    of_split = dict(zip(emoji.captions, emoji.split.tolist(), strict=True))
    splits = torch.tensor([of_split[text] for text in prompts])
    print(f"{'':34} retrieval   style    clip  FD data  nearest  copies")
    for name, figures in real_figures(judge, emoji).items():
        chosen = images[split == SPLITS[name]]
        if SPLITS[name] != data.TRAIN:
            print(table_line(f"real, {name}", figures, nearest_levels(chosen, train)), flush=True)
    for cfg_scale in args.cfg_scales:
        drawn = draw(STUDY, args.samples, cfg_scale, args)
        numbers = torch.arange(args.samples) % len(prompts)
        features, nearest = judge.features(drawn), nearest_levels(drawn, train)
        for name, value in SPLITS.items():
            chosen = splits[numbers] == value
            if chosen.sum() > 1:
                figures = judge.figures(features[chosen], captions[numbers][chosen])
                line = table_line(f"guidance {cfg_scale:g}, {name}", figures, nearest[chosen])
                print(line, flush=True)
    if args.sheet:
        with replacing(args.sheet) as partial:
            sheet(draw(SHEET, None, args.cfg_scales[0], args)).save(partial)
        print(f"wrote {args.sheet}: the prompts of {SHEET}, row by row")
    print(f"({len(judge.concepts)} concepts in {NUM_STYLES} styles; FD of few pictures is larger)")


if __name__ == "__main__":
    cli.run(main, parse_args())
