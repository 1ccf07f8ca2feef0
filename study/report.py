"""One HTML file, and PNGs, of what a study left: opens from disk, needs no network.

Reads of the folder: study.json (rows, see study/run.py), rows/ (sample pictures), routers/ (schedules) and
curves/ (the trainings' metrics.jsonl). What is absent is left out of the report.
"""

import base64
import html
import json
from pathlib import Path

import numpy as np

from common.columns import markdown
from common.files import read_json, replacing
from router import load_router
from study import charts
from study.tables import (
    MAIN_SPEED,
    comparison_table,
    evaluation_table,
    further_tables,
    grouped,
    is_main,
)

# ---- pictures --------------------------------------------------------------------------------------


def of_main_speed(rows: list[dict]) -> list[dict]:
    """One row a method: at the main speed, of seed 0 where it was trained; and the uncached."""
    return [
        row for row in rows
        if row.get("speed") in (None, MAIN_SPEED) and row.get("train_seed") in (None, 0)
    ]  # fmt: skip


def of_routers(study: Path, rows: list[dict]) -> list[dict]:
    """Those of `of_main_speed` with a router of their own (forecast and calibrated ones have another's)."""
    return [
        row for row in of_main_speed(rows)
        if row["router"] and (study / row["router"]).exists()
        and not row["method"].startswith(("taylor", "calibrated"))
    ]  # fmt: skip


def comparisons(rows: list[dict]) -> list[tuple[int, list[dict]]]:
    """The rows that are no ablations, by T, the largest first."""
    chosen = [row for row in rows if is_main(row)]
    steps = sorted({row["num_steps"] for row in chosen}, reverse=True)
    return [(n, [row for row in chosen if row["num_steps"] == n]) for n in steps]


def trade_offs(folder: Path, rows: list[dict]) -> list[tuple[str, dict]]:
    axes = [
        ("speedup_macs", "mse", ("speed-up by MACs", "MSE of x_0 to uncached")),
        ("speedup_macs", "fd_uncached", ("speed-up by MACs", "Frechet distance to uncached")),
        ("speedup_latency", "mse", ("measured speed-up", "MSE of x_0 to uncached")),
    ]
    found = []
    for num_steps, chosen in comparisons(rows):
        every = [g for g in grouped(chosen) if g["method"] != "uncached"]
        for x, y, labels in axes:
            groups = [g for g in every if x in g["mean"] and y in g["mean"]]
            if not groups:
                continue
            caption = f"T = {num_steps}: {labels[1]} against {labels[0]}"
            draw = charts.trade_off(groups, x, y, labels)
            found.append((caption, charts.save(folder, f"{y}-{x}-T{num_steps}", draw, (6.6, 4.6))))
    return found


def schedule_pictures(study: Path, folder: Path, rows: list[dict]) -> list[tuple[str, dict]]:
    found = []
    for num_steps, chosen in comparisons(rows):
        tables = []
        for row in of_routers(study, chosen):
            router = load_router(study / row["router"])
            table = router.schedule(router.info["threshold"]).compute.numpy()
            tables.append((f"{row['method']}, CUR {100 * row['cur']:.1f} %", table))
        if tables:
            size = (3 * min(3, len(tables)) + 0.6, (1.2 + 0.07 * num_steps) * -(-len(tables) // 3) + 0.8)
            pictures = charts.save(folder, f"schedules-T{num_steps}", charts.schedules(tables), size)
            found.append(
                (f"T = {num_steps}, {MAIN_SPEED}x asked, seed 0: filled cells are computed", pictures)
            )
    return found


def curve_pictures(study: Path, folder: Path, rows: list[dict]) -> list[tuple[str, dict]]:
    found = []
    for num_steps, chosen in comparisons(rows):
        found += training_pictures(study, folder, chosen, f"T{num_steps}", f"T = {num_steps}")
    longest = [row for row in rows if row.get("group") == "full-length"]
    return found + training_pictures(study, folder, longest, "full-length", "The published length")


def training_pictures(
    study: Path, folder: Path, rows: list[dict], name: str, caption: str
) -> list[tuple[str, dict]]:
    """Lambda over steps, and CUR, loss and beta over training."""
    curves, found = {}, []
    for row in of_routers(study, rows):
        path = study / "curves" / f"{Path(row['router']).stem}.jsonl"
        if path.exists():
            curves[row["method"]] = [json.loads(line) for line in path.read_text().splitlines()]
    weights = {
        method: np.array(lines[-1]["proxy_weights"][:-1])
        for method, lines in curves.items() if method.startswith("harmonica")
    }  # fmt: skip
    if weights:
        series = [(method, np.arange(len(values)), values) for method, values in weights.items()]
        draw = charts.lines(series, ("step (executed from right to left)", "lambda"), log=True)
        pictures = charts.save(folder, f"lambda-{name}", draw, (6.6, 3.6))
        found.append((f"{caption}: lambda at the last refresh", pictures))
    for key, label, log in (
        ("cur", "CUR", False),
        ("data_loss", "data loss (end-to-end: MSE of x_0)", True),
        ("reg_weight", "beta", True),
    ):
        series = []
        for method, lines in curves.items():
            points = [(line["train_steps"], line[key]) for line in lines if key in line]
            series += [(method, *np.array(points).T)] if points else []
        if series:
            draw = charts.lines(series, ("train step", label), log)
            pictures = charts.save(folder, f"{key}-{name}", draw, (6.6, 3.6))
            found.append((f"{caption}: {label} over training", pictures))
    return found


def image_pictures(folder: Path, rows: list[dict]) -> list[tuple[str, dict]]:
    found = []
    for num_steps, chosen in comparisons(rows):
        strips = []
        for row in of_main_speed(chosen):
            if row.get("images"):
                images = np.frombuffer(base64.b64decode(row["images"]), dtype=np.uint8).reshape(-1, 8, 8)
                strips.append((row["method"], images))
        strips.sort(key=lambda strip: strip[0] != "uncached")
        if len(strips) > 1:
            draw = charts.image_rows(strips)
            pictures = charts.save(folder, f"images-T{num_steps}", draw, (9.0, 0.42 * len(strips) + 0.5))
            found.append((f"T = {num_steps}, {MAIN_SPEED}x asked, seed 0", pictures))
    return found


# ---- the page --------------------------------------------------------------------------------------

TITLE = "Caching methods on the digits DiT"
STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --text: #1f2328; --line: #d8dee4; --soft: #59636e; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #0d1117; --text: #e6edf3; --line: #30363d; --soft: #9198a1; } }
body { margin: 0 auto; max-width: 86rem; padding: 1rem; background: var(--ground); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
p, figcaption { color: var(--soft); max-width: 48rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
.wide { display: grid; gap: 1rem; }
figure { margin: 0; } img { max-width: 100%; height: auto; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.8rem; white-space: nowrap; }
th, td { padding: 0.25rem 0.45rem; border-bottom: 1px solid var(--line); text-align: right; }
th { text-align: right; } th:first-child, td:first-child { text-align: left; }
td { font-variant-numeric: tabular-nums; }
details { margin: 1rem 0; } code { font-size: 0.8rem; overflow-wrap: anywhere; }
"""


def figure_html(caption: str, pictures: dict[str, str]) -> str:
    text = html.escape(caption)
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{pictures["dark"]}">'
        f'<img alt="{text}" src="{pictures["light"]}"></picture><figcaption>{text}</figcaption></figure>'
    )


def table_html(table: list[list[str]]) -> str:
    def line(tag: str, texts: list[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"

    head, *body = table
    rows = "".join(line("td", texts) for texts in body)
    return f'<div class="table"><table><thead>{line("th", head)}</thead><tbody>{rows}</tbody></table></div>'


def section(title: str, intro: str, *parts: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2><p>{html.escape(intro)}</p>{''.join(parts)}</section>"


def charts_html(found: list[tuple[str, dict]], kind: str = "charts") -> str:
    return f'<div class="{kind}">{"".join(figure_html(*one) for one in found)}</div>'


def setting(rows: list[dict]) -> str:
    first, machines = rows[0], " and ".join(sorted({row["hardware"] for row in rows}))
    return (
        "The digits DiT, DDIM without guidance where nothing else is said, "
        f"{first['dtype']} on {machines} with batches of {first['batch_size']}, samples of seed "
        f"{first['seed']}; all methods from the same noise and labels. Speed asked: what methods are matched "
        "at, within 4 % by MACs; a star marks what is further away. Where a method was trained from several "
        "seeds the figure is their mean, and bars and brackets give the least and the greatest; the measured "
        "speed-up is that of the first one."
    )


def page(study: Path, rows: list[dict], evaluations: list[Path]) -> str:
    folder = study / "pictures"
    parts = [
        f"<h1>{TITLE}</h1><p>{html.escape(setting(rows))}</p>",
        section(
            "Quality against speed", "Down and to the right is better.", charts_html(trade_offs(folder, rows))
        ),
    ]
    tables = [f"<h3>T = {n}</h3>{table_html(comparison_table(chosen, n))}" for n, chosen in comparisons(rows)]
    parts.append(section("All figures", "Sorted by MSE within a speed.", *tables))
    images = image_pictures(folder, rows)
    if images:
        parts.append(section("Images", "Every method from the same noise.", charts_html(images, "wide")))
    schedules = schedule_pictures(study, folder, rows)
    if schedules:
        intro = "Steps run downwards, branches (attn, mlp of each block) across."
        parts.append(section("Learned schedules", intro, charts_html(schedules, "wide")))
    curves = curve_pictures(study, folder, rows)
    if curves:
        parts.append(section("Trainings", "Seed 0 at the main speed.", charts_html(curves)))
    for title, intro, table in further_tables(rows):
        parts.append(section(title, intro, table_html(table)))
    if evaluations:
        table = table_html(evaluation_table(evaluations))
        parts.append(section("Evaluations", "What evaluate.py found of files of samples.", table))
    commands = "".join(f"<li><code>{html.escape(row['command'])}</code></li>" for row in rows)
    parts.append(f"<details><summary>The command of every row</summary><ol>{commands}</ol></details>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{TITLE}</title><style>{STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def write_study(study: Path, rows: list[dict], evaluations: list[Path] | None = None) -> None:
    """table.md, report.html and pictures/ of rows as study/run.py collects them. Nothing for no rows."""
    if not rows:
        return
    parts = [f"# {TITLE}\n\n{setting(rows)}\n"]
    for num_steps, chosen in comparisons(rows):
        parts.append(f"## T = {num_steps}\n\n{markdown(comparison_table(chosen, num_steps))}")
    parts += [f"## {title}\n\n{intro}\n\n{markdown(table)}" for title, intro, table in further_tables(rows)]
    text = page(study, rows, evaluations or [])  # before anything is written: it may find a file wrong
    with replacing(study / "table.md") as temporary:
        temporary.write_text("\n".join(parts))
    with replacing(study / "report.html") as temporary:
        temporary.write_text(text)


def read_rows(study: Path) -> list[dict]:
    """The rows of study.json, with the pictures of rows/. Raises FileNotFoundError or ValueError."""
    path = study / "study.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run `python -m study.run` or give its folder")
    try:
        rows = read_json(path)["rows"]
    except (ValueError, KeyError):
        raise ValueError(f"{path} is no study: no JSON with rows; run `python -m study.run` again") from None
    for row in rows:
        detail = study / "rows" / f"{row['id']}.json"
        if detail.is_file():
            row["images"] = read_json(detail).get("images")
    return rows
