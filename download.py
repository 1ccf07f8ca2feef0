"""Fetch the official DiT checkpoints, their VAE, and the PixArt models.

    python download.py --list
    python download.py                      # DiT-XL/2 256 px and its VAE
    python download.py dit-512 vae-mse
    python download.py PixArt-Sigma-512     # transformer, VAE, T5 and tokenizer

Files land in the repository's pretrained_models/ under a temporary name first; those of a PixArt in the Hub's
cache, where every command looks for them. With --folder FOLDER a PixArt becomes a pipeline's folder,
FOLDER/NAME, which --model takes. Run the same command again to go on after an interruption. What a server or
a proxy sends instead of a file, such as a page to sign in, is refused; where such a page is there already in
a file's place, this command fetches the file again.
"""

import argparse
from pathlib import Path

from backbones.downloads import (
    DOWNLOADS,
    FOLDER,
    HubPart,
    fault_of,
    fetch,
    fetch_part,
    find_part,
    hub_parts,
)
from backbones.pixart_models import PIXART
from common import cli, registry


def parse_args() -> argparse.Namespace:
    known = (*DOWNLOADS, *PIXART, *shipped())
    parser = argparse.ArgumentParser(description="Fetch the official checkpoints.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; default: dit-256 vae-ema"
    )
    parser.add_argument("--list", action="store_true", help="show what there is, and what is present")
    parser.add_argument(
        "--folder", type=Path, help=f"default {FOLDER.name}/, and the Hub's cache for a PixArt"
    )
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in known]
    if unknown:
        parser.error(f"{unknown[0]!r} is unknown; choose of {', '.join(known)}")
    return args


def shipped() -> dict[str, tuple[Path, bool, str]]:
    """The examples' models: where their weights lie, whether they are there, and what to do if not."""
    found = {name: (one.weights, one.weights.is_file(), "") for name, one in registry.presets().items()}
    texts = registry.text_models().items()
    return found | {name: (one.folder, one.is_there, one.remedy) for name, one in texts}


def show_shipped(name: str) -> None:
    """Say where an example's weights lie. Raises FileNotFoundError where they do not."""
    path, is_there, remedy = shipped()[name]
    if not is_there:
        raise FileNotFoundError(f"{path} does not exist; {remedy or 'check the repository out again'}")
    print(f"{name}: nothing to download, it comes with the repository: {path}")


def main(args: argparse.Namespace) -> None:
    if args.list:
        show_all(args.folder)
        return
    for name in args.names or ["dit-256", "vae-ema"]:
        if name in PIXART:
            fetch_pixart(name, args.folder)
        elif name in shipped():
            show_shipped(name)
        else:
            print(f"{name}: {fetch(name, args.folder or FOLDER, replace=True)}")


def show_all(folder: Path | None) -> None:
    """Print what there is, and what is present."""
    for name, files in DOWNLOADS.items():
        for file in files:
            path = (folder or FOLDER) / file.path
            fault = fault_of(file, path) if path.exists() else None
            here = "damaged" if fault else "present" if path.exists() else "absent"
            print(f"{name:8} {here:8} {path}{f' {fault}' if fault else ''}  <-  {file.url}")
    for name in PIXART:
        for part in hub_parts(name):
            found = find_part(part, folder and folder / name)
            here = f"{'present' if found else 'absent':8} {part.name:12}"
            print(f"{name:17} {here} {found or ''}  <-  {part.repository}{size_of(part)}")
    for name, (path, is_there, _) in shipped().items():
        print(f"{name:17} {'shipped' if is_there else 'absent':8} {path}  <-  this repository")
    print("Sizes of PixArt's parts are computed: parameters of the known config times 4 bytes (float32).")


def size_of(part: HubPart) -> str:
    if not part.parameters:
        return ""
    return f", {part.parameters / 1e6:,.0f} M parameters, about {part.gigabytes:.1f} GB in float32"


def fetch_pixart(name: str, folder: Path | None) -> None:
    """Fetch the parts of a PixArt one by one; what is there already is left alone."""
    parts, own = hub_parts(name), folder and folder / name
    total = sum(part.gigabytes for part in parts if find_part(part, own) is None)
    print(f"{name}: about {total:.1f} GB to fetch if its parts are stored in float32 (computed)", flush=True)
    for part in parts:
        print(f"{name} {part.name}: {fetch_part(part, own)}", flush=True)
    if own:
        print(f"use it as --model {own}")


if __name__ == "__main__":
    cli.run(main, parse_args())
