"""The report, of a few committed rows."""

import json
import re
from unittest import mock

import pytest
from commands import error_line, run
from matplotlib.figure import Figure

from study import charts
from study.plan import EVIDENCE, RESULTS, ROUTERS
from study.report import page_folder, read_rows, router_name
from study.store import Records, Study

SHOWN = ("uncached", "fora", "harmonica", "harmonica-paper", "harmonica-20k", "end-to-end+forecast")


def drawn_only(draw, size: tuple[float, float], theme: str) -> bytes:
    """A chart that is drawn but not turned into a picture, which takes most of the time."""
    draw(Figure(size), charts.THEMES[theme])
    return b"a PNG"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The report of the committed rows at T = 10 and 1.96x, of six methods."""
    folder = tmp_path_factory.mktemp("study")
    rows = json.loads((EVIDENCE / "study.json").read_text())["rows"]
    rows = [
        row for row in rows
        if row["method"] in SHOWN and row["num_steps"] == 10 and row.get("speed") in (None, "1.96")
        and row["cfg_scale"] == 1 and row["sampler"] == "ddim"
    ]  # fmt: skip
    (folder / "study.json").write_text(json.dumps({"rows": rows}))
    for name in ("rows.jsonl", "curves.jsonl", ROUTERS):
        (folder / name).symlink_to(EVIDENCE / name)
    evaluation = folder / "evaluation.json"
    evaluation.write_text(json.dumps({"samples": "x/cached.npz", "n": 50, "fid": 3.25, "psnr": None}))
    with mock.patch("study.charts.render", drawn_only):
        run("report.py", folder, "--evaluations", evaluation)
    return folder


def test_report_is_one_file_that_fetches_nothing(study):
    page = (study / "report.html").read_text()
    assert not re.search(r'(?:src|href|srcset)="(?!data:)', page)
    pictures = list((study / "pictures").glob("*.png"))
    assert page.count("data:image/png;base64,") == 2 * len(pictures)  # each chart on both grounds
    assert {path.stem for path in pictures} == {
        "mse-speedup_macs-T10", "fd_uncached-speedup_macs-T10", "mse-speedup_latency-T10", "images-T10",
        "schedules-T10", "lambda-T10", "cur-T10", "data_loss-T10", "reg_weight-T10",
        "lambda-full-length", "cur-full-length", "data_loss-full-length", "reg_weight-full-length",
    }  # fmt: skip
    for text in ("Quality against speed", "Learned schedules", "Published numbers beside ours"):
        assert text in page
    assert "<td>cached.npz</td><td>50</td><td>3.25</td>" in page
    assert page.count("<code>python -m study.measure") == len(read_rows(Study(study)))


def test_tables_are_in_markdown_too(study):
    text = (study / "table.md").read_text()
    assert "| harmonica | 1.96x | 3 | 5,000 |" in text
    assert "## Published numbers beside ours" in text


def test_report_of_the_committed_study_goes_to_results():
    assert page_folder(EVIDENCE) == RESULTS
    assert page_folder(EVIDENCE.relative_to(EVIDENCE.parents[2]).resolve()) == RESULTS
    assert page_folder(RESULTS) == RESULTS


def test_samples_come_with_the_rows(study):
    rows = read_rows(Study(study))
    assert all(row["images"] for row in rows)
    assert {router_name(row) for row in rows if row["router"]} <= Study(study).routers.keys()
    assert Records(study / "rows.jsonl").read().keys() >= {row["id"] for row in rows}


def test_report_of_other_files_is_one_line(tmp_path, study):
    assert "study.json does not exist; run" in error_line("report.py", tmp_path)
    for content, message in (("{}", "is no study"), ("[", "is no study"), ('{"rows": []}', "has no rows")):
        (tmp_path / "study.json").write_text(content)
        assert message in error_line("report.py", tmp_path)
    (tmp_path / "two.json").write_text("[]")
    line = error_line(
        "report.py", study, "--output", tmp_path / "new", "--evaluations", tmp_path / "two.json"
    )
    assert "two.json is not what evaluate.py --output writes" in line
    assert not (tmp_path / "new" / "report.html").exists()
