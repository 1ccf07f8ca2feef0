"""The report of a study: one HTML page with charts and tables that opens from disk and needs no network.

    python report.py                        # the committed study: report.html, table.md and pictures/
    python report.py FOLDER                 # another study, in its own folder
    python report.py --evaluations A.json   # with what evaluate.py --output wrote

A study is what `python -m study.run` leaves.
"""

import argparse
from pathlib import Path

from common import cli
from study.plan import EVIDENCE
from study.report import page_folder, read_rows, write_page, write_table
from study.store import Study


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write the report of a study: an HTML page and tables.")
    parser.add_argument(
        "study",
        type=Path,
        nargs="?",
        default=EVIDENCE,
        help="folder of the study; default: the committed one, in study/results",
    )
    parser.add_argument(
        "--evaluations",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE.json",
        help="files that evaluate.py --output wrote; they become one more table",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where to write; default: the study's folder, for the committed study one in results",
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    study, folder = Study(args.study), args.output or page_folder(args.study)
    rows = read_rows(study)
    write_page(study, folder, rows, args.evaluations)
    write_table(folder, rows)
    print(f"wrote {folder}/report.html, table.md and pictures/")


if __name__ == "__main__":
    cli.run(main, parse_args())
