"""The rows of a study as tables: means over seeds, methods side by side, published numbers beside ours.

A row is a dict: the figures that `study.measure` prints for one method, and what `study.run` adds to them.
"""

from pathlib import Path

import numpy as np

from common.files import read_json

MAIN_SPEED = "1.96"
MAIN_SPEEDS = (MAIN_SPEED, "2")  # the second is the emoji's
TOLERANCE = 0.04  # rows that miss the speed asked by a larger share are marked
# DiT-XL/2 on ImageNet 256 px, guidance 1.5, 50,000 samples, H800, as the HarmoniCa paper reports it:
# T, method, CUR in %, latency in s at batch 8, FID. "fewer-steps" is DDIM with a number of steps of its own.
PUBLISHED = [
    (50, "uncached", 0, 1.767, 2.27), (50, "fewer-steps", 0, 1.379, 2.37),
    (50, "l2c", 23.39, 1.419, 2.62), (50, "harmonica", 23.68, 1.361, 2.36),
    (20, "uncached", 0, 0.658, 3.52), (20, "fewer-steps", 0, 0.466, 5.77),
    (20, "l2c", 35.60, 0.468, 5.34), (20, "harmonica", 37.50, 0.456, 4.88),
    (10, "uncached", 0, 0.332, 12.16), (10, "fewer-steps", 0, 0.299, 16.54),
    (10, "l2c", 19.11, 0.279, 14.59), (10, "harmonica", 22.86, 0.270, 13.35),
]  # fmt: skip
FULL_LENGTH = "full-length"  # the group of the published number of train steps
FIGURES = (
    "cur",
    "speedup_macs",
    "speedup_latency",
    "digits_fid",
    "fd_uncached",
    "accuracy",
    "fd_data",
    "retrieval",
    "style",
    "clip",
    "mse",
    "psnr",
    "ssim",
)
# Head of a column, the figure that it shows, and the function that formats it.
COLUMNS = [
    ("CUR", "cur", lambda v: f"{100 * v:.1f} %"),
    ("by MACs", "speedup_macs", lambda v: f"{v:.2f}x"),
    ("measured", "speedup_latency", lambda v: f"{v:.2f}x"),
    ("digits-FID", "digits_fid", lambda v: f"{v:.3f}"),
    (
        "/ uncached",
        "fid_ratio",
        lambda v: f"{v:.2f}",
    ),  # both from as many samples: FID falls with their number
    ("FD to uncached", "fd_uncached", lambda v: f"{v:.3f}"),
    ("recognised", "accuracy", lambda v: f"{100 * v:.2f} %"),
    ("FD to data", "fd_data", lambda v: f"{v:.2f}"),
    ("retrieval", "retrieval", lambda v: f"{100 * v:.1f} %"),
    ("style", "style", lambda v: f"{100 * v:.1f} %"),
    ("CLIP", "clip", lambda v: f"{v:.3f}"),
    ("PSNR", "psnr", lambda v: f"{v:.1f} dB"),
    ("MSE", "mse", lambda v: f"{v:.2e}"),
]


def is_main(row: dict) -> bool:
    """Whether a row belongs to the comparison rather than to an ablation."""
    is_own = row.get("example") is not None  # such a study puts other chains into groups
    return not row.get("group") and (is_own or (row["sampler"] == "ddim" and row["cfg_scale"] == 1))


def is_at_main_speed(row: dict) -> bool:
    """One row a method: at the main speed, of training seed 0 where it was trained; and the uncached."""
    return row.get("speed") in (None, *MAIN_SPEEDS) and row.get("train_seed") in (None, 0)


def has_own_router(row: dict) -> bool:
    """Whether a row's router was trained for its method; forecast and calibrated reuse take another's."""
    return bool(row["router"]) and not row["method"].startswith(("taylor", "calibrated"))


def shows_training(row: dict) -> bool:
    """Whether the report draws the training of a row's router."""
    in_report = is_main(row) or row.get("group") == FULL_LENGTH
    return in_report and is_at_main_speed(row) and has_own_router(row)


def grouped(rows: list[dict]) -> list[dict]:
    """Rows that differ only in their training seed, as one: mean, least and greatest of every figure."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        key = ("method", "num_steps", "speed", "cfg_scale", "sampler", "group", "variant")
        groups.setdefault(tuple(row.get(name) for name in key), []).append(row)
    result = []
    for members in groups.values():
        values = {name: [m[name] for m in members if m.get(name) is not None] for name in FIGURES}
        values = {name: found for name, found in values.items() if found}
        quality = "digits_fid" if "digits_fid" in members[0] else "fd_data"
        values["fid_ratio"] = [m[quality] / m[f"{quality}_uncached"] for m in members]
        group = {
            k: members[0].get(k) for k in ("method", "num_steps", "speed", "cfg_scale", "group", "variant")
        }
        group |= {"sampler": members[0]["sampler"], "seeds": len(members), "rows": members}
        for name, function in (("mean", np.mean), ("least", min), ("greatest", max)):
            group[name] = {figure: float(function(found)) for figure, found in values.items()}
        result.append(group)
    return result


def deviation(group: dict) -> float:
    """The largest distance of a row's speed-up by MACs from the speed asked, as a share of the latter."""
    if not group["speed"]:
        return 0.0
    return max(abs(row["speedup_macs"] / float(group["speed"]) - 1) for row in group["rows"])


def cells(group: dict) -> list[str]:
    """The figures of a group as text. With several seeds the MSE has its range."""
    shown = []
    for _, figure, show in columns([group]):
        text = show(group["mean"][figure]) if figure in group["mean"] else "-"
        if figure == "speedup_macs" and deviation(group) > TOLERANCE:
            text += " *"
        if figure == "mse" and group["seeds"] > 1:
            text += f" ({show(group['least'][figure])} to {show(group['greatest'][figure])})"
        shown.append(text)
    return shown


JUDGED = {"digits": ("digits_fid", "accuracy"), "emoji": ("fd_data", "retrieval", "style", "clip")}


def columns(groups: list[dict]) -> list[tuple]:
    """The columns of a study's tables: the figures of its own judge, and those that all have."""
    example = groups[0]["rows"][0].get("example", "digits") if groups else "digits"
    others = {name for key, names in JUDGED.items() if key != example for name in names}
    return [column for column in COLUMNS if column[1] not in others]


def heads(groups: list[dict]) -> list[str]:
    return [head for head, _, _ in columns(groups)]


def comparison_table(rows: list[dict], num_steps: int, speed: str | None = None) -> list[list[str]]:
    groups = [g for g in grouped([row for row in rows if is_main(row)]) if g["num_steps"] == num_steps]
    groups = [g for g in groups if speed is None or g["speed"] in (None, speed)]
    groups.sort(key=lambda g: (float(g["speed"] or 0), g["mean"]["mse"]))
    table = [["method", "speed asked", "seeds", "samples", *heads(groups)]]
    for group in groups:
        asked = f"{group['speed']}x" if group["speed"] else "-"
        samples = f"{group['rows'][0]['samples']:,}"
        table.append([group["method"], asked, str(group["seeds"]), samples, *cells(group)])
    return table


FORECAST = "end-to-end+forecast"  # schedule and weights of reuse, trained on the error of the image
FORECAST_EVEN_BATCHES = f"{FORECAST}-uniform"  # without --pool and --moments-weight, settings of T = 20
FORECAST_NO_MOMENTS = f"{FORECAST}-no-moments"  # without --moments-weight
OWN_METHODS = ("end-to-end", "calibrated")  # how the names of this project's methods begin
SAMPLERS_GROUP = "samplers"  # the group of routers under other samplers than their own
RIVALS = "rivals"  # the group of untrained methods that came after HarmoniCa
# Groups of rows on other samples than the comparison's.
FRESH_SAMPLES, SECOND_SAMPLES = "fresh-seed", "second-seed"


def end_to_end_table(rows: list[dict], group: str | None = None, method: str = FORECAST) -> list[list[str]]:
    """A method of this project beside the best of all others, at each T and speed.

    group: of the samples, FRESH_SAMPLES or SECOND_SAMPLES; None: those of the comparison.
    """
    is_digits = not rows or rows[0].get("example") is None
    quality = "digits-FID" if is_digits else "FD to data"
    table = [["steps", "asked", "seeds", "by MACs", "MSE", "best of the others", "ratio", "/ HarmoniCa"]]
    table[0] += ["FD", "lowest of the others", f"{quality} / uncached"]
    chosen = [row for row in rows if (row.get("group") == group if group else is_main(row))]
    every = [g for g in grouped(chosen) if g["speed"]]
    for own in sorted(every, key=lambda g: (-g["num_steps"], float(g["speed"]))):
        if own["method"] != method:
            continue
        beside = [g for g in every if (g["num_steps"], g["speed"]) == (own["num_steps"], own["speed"])]
        others = {g["method"]: g["mean"] for g in beside if not g["method"].startswith(OWN_METHODS)}
        if not others:
            continue
        mean, best = own["mean"], min(others, key=lambda name: others[name]["mse"])
        closest = min(others, key=lambda name: others[name]["fd_uncached"])
        harmonica = others.get("harmonica")
        table.append([
            str(own["num_steps"]), f"{own['speed']}x", str(own["seeds"]), f"{mean['speedup_macs']:.3f}x",
            f"{mean['mse']:.2e} ({own['least']['mse']:.2e} to {own['greatest']['mse']:.2e})",
            f"{others[best]['mse']:.2e} ({best})", f"{mean['mse'] / others[best]['mse']:.2f}",
            f"{mean['mse'] / harmonica['mse']:.3f}" if harmonica else "-", f"{mean['fd_uncached']:.2e}",
            f"{others[closest]['fd_uncached']:.2e} ({closest})", f"{mean['fid_ratio']:.3f}",
        ])  # fmt: skip
    return table


def ablation_table(rows: list[dict]) -> list[list[str]]:
    apart = ("target-cur", "objective", SAMPLERS_GROUP, RIVALS)
    groups = grouped([row for row in rows if not is_main(row) and row.get("group") not in apart])
    table = [["ablation", "method", "variant", "steps", "guidance", "sampler", "seeds", *heads(groups)]]
    for group in groups:
        kind = group["group"] or ("guidance" if group["cfg_scale"] != 1 else "sampler")
        variant = "-" if group["variant"] is None else str(group["variant"])
        name = [kind, group["method"], variant, str(group["num_steps"]), f"{group['cfg_scale']:g}"]
        table.append([*name, group["sampler"].upper(), str(group["seeds"]), *cells(group)])
    return table


def target_table(rows: list[dict]) -> list[list[str]]:
    table = [["asked CUR", "train seed", "reached CUR", "by MACs", "MSE"]]
    for row in (row for row in rows if row.get("group") == "target-cur"):
        reached = [f"{100 * row['cur']:.2f} %", f"{row['speedup_macs']:.2f}x", f"{row['mse']:.2e}"]
        table.append([f"{100 * row['variant']:.0f} %", str(row["train_seed"]), *reached])
    return table


def sampler_table(rows: list[dict]) -> list[list[str]]:
    """Schedules under samplers other than their own: MSE and distance to uncached, by sampler of use."""
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in (row for row in rows if row.get("group") == SAMPLERS_GROUP):
        base = row["method"].removeprefix("calibrated-")
        own = (row.get("variant") or "-").removeprefix("trained-with-")
        reuse = "as it is" if row["method"] == base else "calibrated"
        cell = f"{row['mse']:.2e} / {row['fd_uncached']:.2e}"
        lines.setdefault((base, own, reuse), {})[row["sampler"]] = cell
    used = list(dict.fromkeys(sampler for cells in lines.values() for sampler in cells))
    table = [["schedule", "trained with", "reuse", *used]]
    return table + [[*names, *(cells.get(one, "-") for one in used)] for names, cells in lines.items()]


def rival_table(rows: list[dict], num_steps: int) -> list[list[str]]:
    """The rivals at one number of steps, by speed: MSE / FD to uncached, beside our method's mean."""
    beside = [
        row for row in rows if row.get("group") == RIVALS or (is_main(row) and row["method"] == FORECAST)
    ]
    groups = [group for group in grouped(beside) if group["num_steps"] == num_steps]
    speeds = sorted({group["speed"] for group in groups if group["group"] == RIVALS}, key=float)
    lines: dict[str, dict[str, str]] = {}
    for group in groups:
        mean = group["mean"]
        cell = f"{mean['mse']:.2e} / {mean['fd_uncached']:.2e}"
        lines.setdefault(group["method"], {})[group["speed"]] = cell
    table = [[f"T = {num_steps}", *(f"{speed}x" for speed in speeds)]]
    names = sorted(lines, key=lambda name: name == FORECAST)  # ours last
    return table + [[name, *(lines[name].get(speed, "-") for speed in speeds)] for name in names]


def objective_table(rows: list[dict]) -> list[list[str]]:
    """The mean error of a step, which SDT minimises, beside the error of the image."""
    table = [["method", "train seed", "by MACs", "step error", "but the last", "MSE of x_0"]]
    rows = [row for row in rows if row.get("group") == "objective"]
    for row in sorted(rows, key=lambda row: row["step_error"]):
        seed = "-" if row.get("train_seed") is None else str(row["train_seed"])
        found = [f"{row['speedup_macs']:.2f}x", f"{row['step_error']:.2e}"]
        found += [f"{np.mean(row['step_errors'][1:]):.2e}", f"{row['mse']:.2e}"]  # step 0 is executed last
        table.append([row["method"], seed, *found])
    return table


def published_table(rows: list[dict]) -> list[list[str]]:
    """The paper's DiT-XL/2 beside our digits, both as ratios to the uncached model."""
    table = [
        [
            "steps",
            "method",
            "paper: CUR",
            "by latency",
            "FID / uncached",
            "ours: CUR",
            "by MACs",
            "digits-FID / uncached",
        ]
    ]
    groups = grouped([row for row in rows if is_main(row)])
    for num_steps, method, cur, latency, fid in PUBLISHED:
        base = next(row for row in PUBLISHED if row[0] == num_steps)
        ours = [g for g in groups if g["num_steps"] == num_steps]
        candidates = [g for g in ours if g["method"] == method]
        line = [str(num_steps), method, f"{cur:.2f} %" if cur else "-"]
        line += [f"{base[3] / latency:.2f}x", f"{fid / base[4]:.3f}"]
        if candidates:
            near = min(candidates, key=lambda g: abs(g["mean"]["speedup_macs"] - base[3] / latency))
            mean = near["mean"]
            line += [f"{100 * mean['cur']:.1f} %", f"{mean['speedup_macs']:.2f}x", f"{mean['fid_ratio']:.3f}"]
        else:
            line += ["-"] * 3
        table.append(line)
    return table


def evaluation_table(files: list[Path]) -> list[list[str]]:
    """The results of evaluate.py, a row for each file of samples. Raises ValueError for any other file."""
    heads = [
        "samples",
        "n",
        "fid",
        "sfid",
        "inception_score",
        "precision",
        "recall",
        "mse",
        "psnr",
        "ssim",
        "lpips",
    ]
    table = [heads]
    for file in files:
        try:
            found = read_json(file)
            table.append([Path(found["samples"]).name])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file} is not what evaluate.py --output writes") from None
        for head in heads[1:]:
            value = found.get(head)
            table[-1].append(
                "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
            )
    return table


def further_tables(rows: list[dict]) -> list[tuple[str, str, list[list[str]]]]:
    """All tables beside the comparison that have rows: title, a line about it, the table."""
    found = [
        (
            "Beyond the paper",
            "Schedule and reuse are trained on the error of the image (`--method end-to-end`). The mean over "
            "training seeds stands beside the best of all other methods at the same speed.",
            end_to_end_table(rows),
        ),
        (
            "Beyond the paper, fresh samples",
            "The same routers beside HarmoniCa and the best of the others (training seed 0) on samples of "
            "another seed, kept for this purpose: 2,000 samples, 6,000 at T = 20.",
            end_to_end_table(rows, FRESH_SAMPLES),
        ),
        (
            "Beyond the paper, a second seed",
            "The same on 6,000 samples of a seed on which an earlier setting was measured.",
            end_to_end_table(rows, SECOND_SAMPLES),
        ),
        (
            "Batches drawn evenly, fresh samples",
            "The same training without `--pool` and `--moments-weight`.",
            end_to_end_table(rows, FRESH_SAMPLES, FORECAST_EVEN_BATCHES),
        ),
        (
            "Batches drawn evenly, a second seed",
            "The same training without `--pool` and `--moments-weight`.",
            end_to_end_table(rows, SECOND_SAMPLES, FORECAST_EVEN_BATCHES),
        ),
        (
            "Without moments, fresh samples",
            "The same training without `--moments-weight`.",
            end_to_end_table(rows, FRESH_SAMPLES, FORECAST_NO_MOMENTS),
        ),
        (
            "Samplers",
            "T = 20 and 1.96x. Each router was trained with one sampler and is used with another, as trained "
            "and with weights of reuse solved for the sampler of use. MSE / Frechet distance to uncached "
            "samples of the same sampler and noise.",
            sampler_table(rows),
        ),
        *(
            (
                f"Untrained rivals, T = {num_steps}",
                "By speed-up asked for. MSE / Frechet distance to uncached samples of the same noise.",
                rival_table(rows, num_steps),
            )
            for num_steps in (50, 20, 10)
        ),
        ("Asking for a speed", "train_router.py --target-cur, HarmoniCa at T = 10.", target_table(rows)),
        (
            "The objective and the image",
            "T = 10. Training step by step minimises the mean error of a step. It is measured here while "
            "sampling, over all steps and over all but the last one, beside the error of the image.",
            objective_table(rows),
        ),
        ("Ablations", "Each row changes one thing.", ablation_table(rows)),
        (
            "Published numbers beside ours",
            "DiT-XL/2 on ImageNet 256 px as the paper reports it (guidance 1.5, 50,000 samples, H800) beside "
            "the digits at the nearest speed. Models and data differ, so only ratios to the uncached model "
            "are comparable.",
            published_table(rows),
        ),
    ]
    if rows and rows[0].get("example"):
        found.pop()  # the published numbers are beside the digits
    return [one for one in found if len(one[2]) > 1]
