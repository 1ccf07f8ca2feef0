"""Put trained emoji models in their place, in fp16: then `--model PixArt-emoji` works.

    python -m examples.emoji.install                 # what the trainings wrote to results/emoji
    python -m examples.emoji.install --snapshot      # the EMA weights of a training that still runs

The result is a pipeline's folder of diffusers, `weights/pixart`, and the judge. Prompts come from
`python -m examples.emoji.captions`.
"""

import argparse
from pathlib import Path

import torch

from common import cli
from common.files import load_pickle_safely, replacing
from examples.emoji import WEIGHTS, data, pipeline
from examples.emoji.state import write_folder
from examples.emoji.train_pixart import build_pixart


def from_snapshot(state_file: Path):
    """The transformer with the EMA weights of a training's state, and how many samples it saw."""
    if not state_file.is_file():
        raise FileNotFoundError(
            f"{state_file} does not exist; `python -m examples.emoji.train_pixart` makes it"
        )
    state = load_pickle_safely(state_file)
    settings = state["settings"]
    model = build_pixart(*(settings[name] for name in ("width", "depth", "heads")))
    missing, unknown = model.load_state_dict(state["ema"], strict=False)
    if unknown or set(missing) & {name for name, _ in model.named_parameters()}:
        raise ValueError(f"{state_file} does not hold this version's transformer; train it again")
    return model, state["iteration"] * settings["batch_size"]


def in_half(model, name: str):
    """The model in fp16. Raises ValueError where a weight does not fit."""
    model = model.half()
    for key, tensor in model.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{key} of the {name} is beyond fp16 or not finite; train it again")
    return model


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Install trained emoji models into examples/emoji/weights.")
    parser.add_argument("--folder", type=Path, default=data.FOLDER, help="folder of the trainings")
    parser.add_argument(
        "--snapshot", action="store_true", help="take the EMA weights out of pixart.training.pt"
    )
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="default: examples/emoji/weights")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from diffusers import PixArtTransformer2DModel  # slow to import

    where = args.folder / "pixart"
    if args.snapshot:
        transformer, samples = from_snapshot(args.folder / "pixart.training.pt")
        print(f"the snapshot is from {samples} samples")
    elif (where / "transformer" / "config.json").is_file():
        transformer = PixArtTransformer2DModel.from_pretrained(where, subfolder="transformer")
    else:
        raise FileNotFoundError(f"{where} does not exist; `python -m examples.emoji.train_pixart` makes it")
    vae = args.folder / "vae"
    if not (vae / "config.json").is_file():
        raise FileNotFoundError(f"{vae} does not exist; `python -m examples.emoji.train_vae` makes it")
    pipe = pipeline.assemble(in_half(transformer, "transformer"), vae)
    in_half(pipe.vae, "VAE")
    write_folder(pipe, args.output / "pixart")
    judge = args.folder / "judge.safetensors"
    if judge.is_file():
        with replacing(args.output / "judge.safetensors") as partial:
            partial.write_bytes(judge.read_bytes())
    files = sorted(file for file in args.output.rglob("*") if file.is_file())
    size = sum(file.stat().st_size for file in files) / 2**20
    print(
        f"wrote {args.output}: {len(files)} files, {size:.1f} MB"
        + ("" if judge.is_file() else ", without a judge")
    )


if __name__ == "__main__":
    with torch.no_grad():
        cli.run(main, parse_args())
