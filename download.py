"""Fetch the official DiT checkpoints and the VAE.

    python download.py --list
    python download.py                      # DiT-XL/2 256 px and its VAE
    python download.py dit-512 vae-mse

Files land in the repository's pretrained_models/ under a temporary name first; run the same command again to
go on after an interruption. What a server or a proxy sends instead of a file, such as a page to sign in, is
refused; where such a page is there already in a file's place, this command fetches the file again.
"""

import argparse
from pathlib import Path

from backbones.downloads import DOWNLOADS, FOLDER, fault_of, fetch
from common import cli, registry


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fetch the official DiT checkpoints and the VAE.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(DOWNLOADS)}; default: dit-256 vae-ema"
    )
    parser.add_argument("--list", action="store_true", help="show what there is, and what is present")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in DOWNLOADS and name not in shipped()]
    if unknown:
        parser.error(f"{unknown[0]!r} is unknown; choose of {', '.join([*DOWNLOADS, *shipped()])}")
    return args


def shipped() -> dict[str, tuple[Path, bool, str]]:
    """The examples' models: where their weights lie, whether they are there, and what to do if not."""
    found = {name: (one.weights, one.weights.is_file(), "") for name, one in registry.presets().items()}
    texts = registry.text_models().items()
    return found | {name: (one.folder, one.is_there, one.remedy) for name, one in texts}


def main(args: argparse.Namespace) -> None:
    if args.list:
        for name, files in DOWNLOADS.items():
            for file in files:
                path = args.folder / file.path
                fault = fault_of(file, path) if path.exists() else None
                here = "damaged" if fault else "present" if path.exists() else "absent"
                print(f"{name:8} {here:8} {path}{f' {fault}' if fault else ''}  <-  {file.url}")
        for name, (path, is_there, _) in shipped().items():
            print(f"{name:8} {'present' if is_there else 'absent':8} {path}  <-  this repository")
        return
    for name in args.names or ["dit-256", "vae-ema"]:
        if name in shipped():
            path, is_there, remedy = shipped()[name]
            if not is_there:
                raise FileNotFoundError(
                    f"{path} does not exist; {remedy or 'check the repository out again'}"
                )
            print(f"{name}: nothing to download, it comes with the repository: {path}")
            continue
        print(f"{name}: {fetch(name, args.folder, replace=True)}")


if __name__ == "__main__":
    cli.run(main, parse_args())
