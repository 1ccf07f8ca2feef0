"""One HTML file, and PNGs, of what a study left: opens from disk, needs no network.

python report.py                       # writes report.html, table.md and pictures/ into the study's folder
python report.py FOLDER --evaluations one.json other.json    # with what evaluate.py --output wrote
"""

import argparse
from pathlib import Path

from common import cli
from study.plan import RESULTS
from study.report import read_rows, write_study


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write a study's report.")
    parser.add_argument("study", type=Path, nargs="?", default=RESULTS, help="its folder")
    parser.add_argument("--evaluations", type=Path, nargs="+", default=[], help="evaluate.py's JSON files")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    rows = read_rows(args.study)
    if not rows:
        raise ValueError(f"{args.study}/study.json has no rows; run `python -m study.run` first")
    write_study(args.study, rows, args.evaluations)
    print(f"wrote {args.study}/report.html, table.md and pictures/")


if __name__ == "__main__":
    cli.run(main, parse_args())
