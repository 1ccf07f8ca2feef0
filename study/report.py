"""The report of a study: one HTML file that opens from disk and needs no network, its charts as PNGs, tables.

It reads from the study's folder: the rows of study.json, the sample pictures of rows.jsonl, the schedules of
the routers and the curves of the trainings. What is absent is left out of the report.
"""

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.columns import markdown
from common.files import read_json, replacing
from study import charts
from study.measure import strip
from study.store import Study
from study.subjects import DIGITS, SUBJECTS, Subject
from study.tables import (
    FULL_LENGTH,
    MAIN_SPEEDS,
    comparison_table,
    evaluation_table,
    further_tables,
    grouped,
    has_own_router,
    is_at_main_speed,
    is_main,
    shows_training,
)

Pictures = list[tuple[str, dict[str, str]]]  # captions, and data URIs by theme

# ---- pictures --------------------------------------------------------------------------------------


def comparisons(rows: list[dict]) -> list[tuple[int, list[dict]]]:
    """The rows of the comparison, by number of steps, the largest first."""
    chosen = [row for row in rows if is_main(row)]
    steps = sorted({row["num_steps"] for row in chosen}, reverse=True)
    return [(n, [row for row in chosen if row["num_steps"] == n]) for n in steps]


def trade_offs(folder: Path, rows: list[dict]) -> Pictures:
    """Error and distance against speed, for every number of steps."""
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


def schedule_pictures(study: Study, folder: Path, rows: list[dict]) -> Pictures:
    """The schedules of the routers at the main speed."""
    found = []
    for num_steps, chosen in comparisons(rows):
        tables = []
        for row in chosen:
            router = study.routers.get(router_name(row)) if has_own_router(row) else None
            if router and is_at_main_speed(row):
                table = router.schedule(router.info["threshold"]).compute.numpy()
                tables.append((f"{row['method']}, CUR {100 * row['cur']:.1f} %", table))
        if tables:
            size = (3 * min(3, len(tables)) + 0.6, (1.2 + 0.07 * num_steps) * -(-len(tables) // 3) + 0.8)
            pictures = charts.save(folder, f"schedules-T{num_steps}", charts.schedules(tables), size)
            caption = f"T = {num_steps}, {main_speed(chosen)}x asked, seed 0: filled cells are computed"
            found.append((caption, pictures))
    return found


def router_name(row: dict) -> str:
    """The router of a row by its name in the study's file of routers."""
    return row["router"].rpartition(":")[2]


def curve_pictures(study: Study, folder: Path, rows: list[dict]) -> Pictures:
    """The trainings at the main speed, for every number of steps, and that of the published length."""
    curves, found = study.curves.read(), []
    for num_steps, chosen in comparisons(rows):
        found += training_pictures(curves, folder, chosen, f"T{num_steps}", f"T = {num_steps}")
    longest = [row for row in rows if row.get("group") == FULL_LENGTH]
    return found + training_pictures(curves, folder, longest, FULL_LENGTH, "The published length")


def training_pictures(
    curves: dict[str, dict], folder: Path, rows: list[dict], name: str, caption: str
) -> Pictures:
    """Lambda over steps, and CUR, loss and beta over training."""
    shown = [row for row in rows if shows_training(row) and router_name(row) in curves]
    logs, found = {row["method"]: curves[router_name(row)]["lines"] for row in shown}, []
    weights = {
        method: np.array(lines[-1]["proxy_weights"][:-1])
        for method, lines in logs.items() if method.startswith("harmonica")
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
        for method, lines in logs.items():
            points = [(line["train_steps"], line[key]) for line in lines if key in line]
            series += [(method, *np.array(points).T)] if points else []
        if series:
            draw = charts.lines(series, ("train step", label), log)
            pictures = charts.save(folder, f"{key}-{name}", draw, (6.6, 3.6))
            found.append((f"{caption}: {label} over training", pictures))
    return found


def image_pictures(folder: Path, rows: list[dict]) -> Pictures:
    """The first samples of every method at the main speed."""
    found = []
    for num_steps, chosen in comparisons(rows):
        strips = []
        for row in chosen:
            if is_at_main_speed(row) and row.get("images"):
                strips.append((row["method"], strip(subject_of(rows), row["images"])))
        strips.sort(key=lambda strip: strip[0] != "uncached")
        if len(strips) > 1:
            draw = charts.image_rows(strips)
            height = 0.42 if strips[0][1].shape[1] < 32 else 0.6
            pictures = charts.save(folder, f"images-T{num_steps}", draw, (9.0, height * len(strips) + 0.5))
            found.append((f"T = {num_steps}, {main_speed(chosen)}x asked, seed 0", pictures))
    return found


# ---- the page --------------------------------------------------------------------------------------

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


def main_speed(rows: list[dict]) -> str:
    """The speed at which a study shows all methods beside each other."""
    return next((row["speed"] for row in rows if row.get("speed") in MAIN_SPEEDS), MAIN_SPEEDS[0])


def subject_of(rows: list[dict]) -> Subject:
    """What a study's rows are about."""
    return SUBJECTS[rows[0].get("example", DIGITS.name)]


def setting(rows: list[dict]) -> str:
    first, machines = rows[0], " and ".join(sorted({row["hardware"] for row in rows}))
    return (
        f"{subject_of(rows).about}, "
        f"{first['dtype']} on {machines}, batches of {first['batch_size']}, samples of seed {first['seed']}. "
        'All methods start from the same noise and labels. "Speed asked" is the speed-up by MACs at which '
        "methods are compared: they match it within 4 %, and a star marks the rows that do not. The figure "
        "of a method with several training seeds is their mean; bars and brackets show the least and the "
        "greatest. The measured speed-up is that of the first seed."
    )


def page(study: Study, folder: Path, rows: list[dict], evaluations: Sequence[Path]) -> str:
    """The whole report as HTML; its charts are written into `folder` too."""
    judged = evaluation_table(evaluations) if evaluations else None  # first: it may refuse a file
    title = subject_of(rows).title
    parts = [
        f"<h1>{title}</h1><p>{html.escape(setting(rows))}</p>",
        section(
            "Quality against speed",
            "Lower and further to the right is better.",
            charts_html(trade_offs(folder, rows)),
        ),
    ]
    tables = [f"<h3>T = {n}</h3>{table_html(comparison_table(chosen, n))}" for n, chosen in comparisons(rows)]
    parts.append(section("All figures", "Within a speed, rows are sorted by MSE.", *tables))
    images = image_pictures(folder, rows)
    if images:
        parts.append(section("Images", "All methods start from the same noise.", charts_html(images, "wide")))
    schedules = schedule_pictures(study, folder, rows)
    if schedules:
        intro = "Steps run downwards; branches (attention and MLP of each block) run across."
        parts.append(section("Learned schedules", intro, charts_html(schedules, "wide")))
    curves = curve_pictures(study, folder, rows)
    if curves:
        parts.append(section("Trainings", "Training seed 0 at the main speed.", charts_html(curves)))
    for title, intro, table in further_tables(rows):
        parts.append(section(title, intro, table_html(table)))
    if judged:
        parts.append(section("Evaluations", "Sample files, as evaluate.py judged them.", table_html(judged)))
    commands = "".join(f"<li><code>{html.escape(row['command'])}</code></li>" for row in rows)
    parts.append(f"<details><summary>The command of every row</summary><ol>{commands}</ol></details>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{title}</title><style>{STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def write_table(folder: Path, rows: list[dict]) -> None:
    """FOLDER/table.md."""
    parts = [f"# {subject_of(rows).title}\n\n{setting(rows)}\n"]
    for num_steps, chosen in comparisons(rows):
        parts.append(f"## T = {num_steps}\n\n{markdown(comparison_table(chosen, num_steps))}")
    parts += [f"## {title}\n\n{intro}\n\n{markdown(table)}" for title, intro, table in further_tables(rows)]
    with replacing(folder / "table.md") as temporary:
        temporary.write_text("\n".join(parts))


def write_page(study: Study, folder: Path, rows: list[dict], evaluations: Sequence[Path] = ()) -> None:
    """FOLDER/report.html and FOLDER/pictures/. evaluations: what `evaluate.py --output` wrote."""
    text = page(study, folder / "pictures", rows, evaluations)
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(text)


def page_folder(study: Path) -> Path:
    """Where a study's report goes: into its own folder, but for a committed study into results/."""
    committed = {subject.evidence: subject.results() for subject in SUBJECTS.values()}
    return committed.get(study.resolve(), study)


def read_rows(study: Study) -> list[dict]:
    """The rows of study.json with their sample pictures. Raises FileNotFoundError or ValueError."""
    path = study.folder / "study.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run `python -m study.run` or give its folder")
    try:
        rows = read_json(path)["rows"]
    except (ValueError, KeyError):
        raise ValueError(f"{path} is no study: no JSON with rows; run `python -m study.run` again") from None
    if not rows:
        raise ValueError(f"{path} has no rows; run `python -m study.run` first")
    records = study.rows.read()
    return [row | {"images": records.get(row["id"], {}).get("images")} for row in rows]
