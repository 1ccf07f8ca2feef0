"""The figures that README and docs print are those of the committed files, to the last digit that they show.

A table under the comment `<!-- released rows -->` leaves out the rules of the released FORA and TaylorSeer.
"""

import json
import re
from functools import cache
from pathlib import Path
from statistics import mean

import pytest
import torch

from models import DiT_models
from study.tables import PUBLISHED, rival_table

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "study" / "results" / "digits" / "study.json"
BENCHMARKS = ROOT / "benchmarks" / "results"
WITHOUT_RELEASED = "<!-- released rows -->"
OURS = "end-to-end+forecast"


# ---- tables of a page ------------------------------------------------------------------------------


def tables(page: str) -> list[tuple[list[list[str]], bool]]:
    """The tables of a page, head first, and whether each leaves out the released rules."""
    found, rows, without, marked = [], [], False, False
    for line in [*(ROOT / page).read_text().splitlines(), ""]:
        if line.startswith("|"):
            if not rows:
                without, marked = marked, False
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not set(line) <= set("|-: "):
                rows.append(cells)
        else:
            if rows:
                found.append((rows, without))
            rows = []
            marked = line == WITHOUT_RELEASED or (marked and not line)
    return found


def table(page: str, *head: str, number: int = 0) -> tuple[list[list[str]], bool]:
    """The rows of a page's table whose head begins so, and whether it leaves out the released rules."""
    matching = [(rows, without) for rows, without in tables(page) if rows[0][: len(head)] == list(head)]
    rows, without = matching[number]
    return rows[1:], without


# ---- rows of the study -----------------------------------------------------------------------------


@cache
def study() -> list[dict]:
    return json.loads(STUDY.read_text())["rows"]


def is_main(row: dict) -> bool:
    return not row.get("group") and row["sampler"] == "ddim" and row["cfg_scale"] == 1


def seeds_together(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Rows by (method, T, speed): those that differ in their training seed alone are one."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["num_steps"], row.get("speed")), []).append(row)
    return groups


def chosen(without_released: bool, condition) -> dict[tuple, list[dict]]:
    rows = [row for row in study() if condition(row)]
    return seeds_together([row for row in rows if not (without_released and "-released" in row["method"])])


def average(rows: list[dict], name: str) -> float:
    return mean(row[name] for row in rows if row.get(name) is not None)


def spread(rows: list[dict]) -> str:
    values = [row["mse"] for row in rows]
    return f"{mean(values):.2e} ({min(values):.2e} to {max(values):.2e})"


def fid_ratio(rows: list[dict]) -> float:
    return mean(row["digits_fid"] / row["digits_fid_uncached"] for row in rows)


def seed_zero(rows: list[dict]) -> dict:
    return next(row for row in rows if not row.get("train_seed"))


def speed_measured(rows: list[dict]) -> str:
    values = [row["speedup_latency"] for row in rows if row.get("speedup_latency")]
    return f"{mean(values):.2f}x" if values else "-"


README_NAMES = {
    "end to end, reuse learned (ours)": OURS,
    "TaylorSeer, order 2": "taylor2-fora",
    "TaylorSeer, order 1": "taylor-fora",
    "FORA": "fora",
    "Learning-to-Cache": "l2c",
    "HarmoniCa, lambda as in the paper": "harmonica-paper",
    "HarmoniCa, lambda as released": "harmonica",
    "fewer steps": "fewer-steps",
    "TaylorSeer, order 1, released rule": "taylor-fora-released",
    "FORA, released rule": "fora-released",
    "random": "random",
}


def at_main_speed(without: bool) -> dict[str, list[dict]]:
    groups = chosen(without, lambda row: is_main(row) and row["num_steps"] == 10)
    return {key[0]: rows for key, rows in groups.items() if key[2] in (None, "1.96")}


def test_readme_says_what_wins_and_loses():
    printed, without = table("README.md", "method", "by MACs", "measured", "MSE", "Frechet distance")
    groups = at_main_speed(without)
    expected = [
        [
            name,
            f"{average(groups[method], 'speedup_macs'):.2f}x",
            speed_measured(groups[method]),
            f"{average(groups[method], 'mse'):.2e}",
            f"{average(groups[method], 'fd_uncached'):.3f}",
        ]
        for name, method in README_NAMES.items()
    ]
    assert printed == expected
    errors = [float(row[3]) for row in printed]
    assert errors == sorted(errors)


def test_comparison_at_the_main_speed():
    printed, without = table("docs/results.md", "method", "seeds", "CUR", "by MACs", "measured")
    groups = at_main_speed(without)
    expected = []
    for method, rows in sorted(groups.items(), key=lambda item: average(item[1], "mse")):
        mse = spread(rows) if len(rows) > 1 else f"{rows[0]['mse']:.2e}"
        expected.append([
            method, str(len(rows)), f"{100 * average(rows, 'cur'):.1f} %",
            f"{average(rows, 'speedup_macs'):.2f}x", speed_measured(rows),
            f"{average(rows, 'digits_fid'):.3f}", f"{average(rows, 'fd_uncached'):.3f}",
            f"{100 * average(rows, 'accuracy'):.2f} %", mse,
        ])  # fmt: skip
    assert [[cell.replace("-0.000", "0.000") for cell in row] for row in expected] == printed
    assert {rows[0]["samples"] for rows in groups.values()} == {5000}


def beside_the_best(without: bool, group: str | None) -> list[list[str]]:
    """Ours beside the best of the others in MSE and in distance, at each T and speed."""
    groups = chosen(without, lambda row: row.get("group") == group if group else is_main(row))
    keys = [key for key in groups if key[0] == OURS]
    expected = []
    for _, steps, speed in sorted(keys, key=lambda key: (-key[1], float(key[2]))):
        own = groups[OURS, steps, speed]
        others = {
            key[0]: rows
            for key, rows in groups.items()
            if key[1:] == (steps, speed) and not key[0].startswith(("end-to-end", "calibrated"))
        }
        best = min(others, key=lambda name: average(others[name], "mse"))
        closest = min(others, key=lambda name: average(others[name], "fd_uncached"))
        mse, of_best = average(own, "mse"), average(others[best], "mse")
        line = [str(steps), f"{speed}x", str(len(own)), spread(own), f"{of_best:.2e} ({best})"]
        line.append(f"{mse / of_best:.2f}")
        line.append(f"{mse / average(others['harmonica'], 'mse'):.3f}" if "harmonica" in others else "-")
        line.append(f"{average(own, 'fd_uncached'):.2e}")
        line.append(f"{average(others[closest], 'fd_uncached'):.2e} ({closest})")
        expected.append([*line, f"{fid_ratio(own):.3f}"])
    return expected


@pytest.mark.parametrize(("number", "group"), enumerate([None, "fresh-seed"]))
def test_end_to_end_beside_the_best(number, group):
    printed, without = table("docs/results.md", "steps", "asked", "seeds", number=number)
    expected = beside_the_best(without, group)
    assert len(printed) == 15
    assert printed == [row[: len(printed[0])] for row in expected]


def test_end_to_end_beside_the_best_on_a_second_seed():
    printed, without = table("docs/results.md", "asked", "seeds", "MSE")
    rows = beside_the_best(without, "second-seed")
    assert {row[0] for row in rows} == {"20"}
    assert printed == [[*row[1:6], *row[7:9]] for row in rows]


def test_one_flag_left_out():
    printed, without = table("docs/results.md", "asked", "flags")
    methods = {
        "`--pool 1024 --moments-weight 1`": OURS,
        "`--pool 1024`": f"{OURS}-no-moments",
        "neither": f"{OURS}-uniform",
        "taylor2-fora": "taylor2-fora",
    }
    for speed, flags, *figures in printed:
        expected = []
        for group in ("fresh-seed", "second-seed"):
            groups = chosen(without, lambda row, group=group: row.get("group") == group)
            rows = groups.get((methods[flags], 20, speed.rstrip("x")))
            row = rows and seed_zero(rows)
            expected += [f"{row['mse']:.2e}", f"{row['fd_uncached']:.2e}"] if row else ["-", "-"]
        assert figures == expected, (speed, flags)


def test_what_each_part_is_worth():
    printed, _ = table("docs/results.md", "variant", "by MACs")
    rows = {row["variant"]: row for row in study() if row.get("group") == "end-to-end"}
    assert rows.keys() <= {name for name, *_ in printed}
    for name, *figures in printed:
        if row := rows.get(name):
            expected = [f"{row['speedup_macs']:.3f}x", f"{row['mse']:.2e}", f"{row['fd_uncached']:.4f}"]
            assert figures == [*expected, f"{fid_ratio([row]):.3f}"], name


def test_elsewhere_than_trained():
    printed, _ = table("docs/results.md", "router", "sampled with")
    shown = []
    for method, setting, reuse, *figures in printed:
        guidance, sampler = re.fullmatch(r"guidance ([\d.]+), (\w+)", setting).groups()
        variant = {"-": None, "trained at 1.5": None}.get(reuse, reuse.replace(" ", "-"))
        [row] = [
            row
            for row in study()
            if (row["method"], row["cfg_scale"], row["sampler"]) == (method, float(guidance), sampler.lower())
            and row.get("variant") == variant
            and row["num_steps"] == 10
            and row.get("speed") == "1.96"
            and row.get("group") in (None, "transfer")
        ]
        shown.append(row["mse"])
        exact = 2 if row["mse"] else 0
        assert figures[0] == f"{row['mse']:.{exact}e}", (method, setting)
        assert figures[1:] == [f"{row['fd_uncached']:.3f}", f"{fid_ratio([row]):.2f}"], (method, setting)
    ddpm, ddim = shown[: len(shown) - 9], shown[-9:]
    assert ddpm == sorted(ddpm)
    assert ddim == sorted(ddim)


SAMPLERS = ("ddim", "dpm-solver++", "sa-solver", "ddpm")


def test_routers_under_four_samplers():
    printed, _ = table("docs/results.md", "schedule", "trained with", "reuse", *SAMPLERS)
    rows = {
        (row["method"], row.get("variant"), row["sampler"]): row
        for row in study()
        if row.get("group") == "samplers"
    }
    expected = []
    for own in (*SAMPLERS, None):
        base, variant = ("harmonica", f"trained-with-{own}") if own else ("fora", None)
        for reuse, prefix in (("as it is", ""), ("calibrated", "calibrated-")):
            found = [rows.pop((prefix + base, variant, used)) for used in SAMPLERS]
            cells = [f"{row['mse']:.2e} / {row['fd_uncached']:.2e}" for row in found]
            expected.append([base, own or "-", reuse, *cells])
            assert all(abs(row["speedup_macs"] / 1.96 - 1) < 0.04 for row in found)
            assert {(row["num_steps"], row["samples"], row["seed"]) for row in found} == {(20, 2000, 1234)}
    assert printed == expected
    assert not rows


def test_untrained_rivals():
    for num_steps in {row["num_steps"] for row in study() if row.get("group") == "rivals"}:
        printed = [rows for rows, _ in tables("docs/results.md") if rows[0][0] == f"T = {num_steps}"]
        assert printed == [rival_table(study(), num_steps)]


def test_objective_of_step_wise_training():
    printed, _ = table("examples/digits/README.md", "method", "mean error of a step")
    rows = {row["method"]: row for row in study() if row.get("group") == "objective"}
    assert rows.keys() == {method for method, *_ in printed}
    for method, *figures in printed:
        row = rows[method]
        but_the_last = mean(row["step_errors"][1:])  # step 0 is executed last
        assert figures == [f"{row['step_error']:.2e}", f"{but_the_last:.2e}", f"{row['mse']:.2e}"], method


# ---- the demo and the paper ------------------------------------------------------------------------


def test_demo():
    printed, _ = table("docs/results.md", "method", "steps", "CUR", "MACs per image", "latency, batch 64")
    rows = json.loads((ROOT / "docs" / "demo" / "demo.json").read_text())["rows"]
    for figures, row in zip(printed, rows, strict=True):
        mse = re.sub("e-0", "e-", f"{row['mse']:.2e}") if row["mse"] else "0"
        assert figures[1:] == [
            str(row["num_steps"]), f"{100 * row['cur']:.1f} %" if row["cur"] else "0 %",
            f"{row['macs_per_image'] / 1e6:.0f} M", f"{row['latency_ms']:.0f} ms", f"{row['digits_fid']:.3f}",
            f"{row['fd_uncached']:.3f}" if row["mse"] else "0", f"{100 * row['accuracy']:.2f} %", mse,
        ]  # fmt: skip
    uncached, cached, _ = rows
    by_macs = uncached["macs_per_image"] / cached["macs_per_image"]
    measured = uncached["latency_ms"] / cached["latency_ms"]
    assert f"{by_macs:.2f}x by MACs, {measured:.2f}x measured" in (ROOT / "docs/results.md").read_text()


def test_published_rows():
    """The paper's, as the study has them; and the MACs of both halves of the batch, from our model."""
    printed, _ = table("docs/results.md", "model", "method", "steps", "CUR", "MACs", "latency")
    names = {"DDIM": "uncached", "Learning-to-Cache": "l2c", "HarmoniCa": "harmonica"}
    pixels, found, with_macs = 0, set(), 0
    for model, method, steps, cur, macs, latency, fid in printed:
        if model:
            pixels = int(model.rpartition(" ")[2])
        if macs != "-":
            with torch.device("meta"):
                dit = DiT_models["DiT-XL/2"](input_size=pixels // 8)
            total = 2 * int(steps) * (sum(dit.branch_macs) + dit.other_macs) / 1e12
            decimals = len(macs.split()[0].partition(".")[2])
            assert macs == f"{total:.{decimals}f} T", (pixels, steps)
            with_macs += 1
        if pixels == 256:
            share = float(cur.split()[0]) if cur != "-" else 0
            found.add((names[method], share, float(latency.split()[0]), float(fid)))
    assert with_macs == 8
    assert {(method.replace("fewer-steps", "uncached"), *rest) for _, method, *rest in PUBLISHED} == found


# ---- benchmarks ------------------------------------------------------------------------------------


def benchmark(name: str) -> dict:
    return json.loads((BENCHMARKS / f"{name}.json").read_text())


def in_ms(row: dict, form: str = ",.0f") -> str:
    return f"{row['ms']:{form}} ({row['ms_least']:{form}} to {row['ms_most']:{form}})"


def test_sampling_on_an_h200():
    printed, _ = table("docs/execution.md", "px", "batch", "method")
    expected = []
    for pixels in (256, 512):
        found = benchmark(f"nvidia-h200-xl-{pixels}-compiled")
        for row in found["rows"]:
            macs = found["cards"][str(row["batch_size"])]["gmacs_per_step"] * row["num_steps"]
            teraflops = 2 * macs / row["speedup_macs"] / row["ms"]
            expected.append([
                str(pixels), str(row["batch_size"]), row["method"], in_ms(row, ".1f"),
                f"{row['speedup_latency']:.3f}x", f"{row['speedup_macs']:.3f}x", f"{row['ratio']:.3f}",
                f"{teraflops:.0f}", f"{row['cache_mb']:,.0f}", f"{row['peak_mb']:,.0f}",
            ])  # fmt: skip
    assert printed == expected


def test_sampling_on_two_cores():
    printed, _ = table("docs/execution.md", "model", "batch", "method", "ms")
    expected = []
    for name in ("b2-256-fourth", "digits-third"):
        found = benchmark(f"epyc-2-threads-{name}")
        for row in found["rows"]:
            expected.append([
                f"{found['model']}, guidance {found['cfg_scale']:g}", str(row["batch_size"]), row["method"],
                in_ms(row), f"{row['speedup_latency']:.3f}x", f"{row['speedup_macs']:.3f}x",
                f"{row['ratio']:.3f}", f"{100 * row['of_ceiling']:.0f} %", f"{row['floor_ms']:,.0f}",
                f"{row['cache_mb']:.1f}",
            ])  # fmt: skip
    assert printed == expected


def test_runs_on_two_cores():
    printed, _ = table("docs/execution.md", "model", "method", "first run")
    files = {
        "DiT-B/2": ["b2-256", "b2-256-second", "b2-256-third", "b2-256-fourth"],
        "DiT-digits/2": ["digits", "digits-second", "digits-third"],
    }
    for model, what, *runs in printed:
        method, expected = re.match(r"[\w-]+(:[\d.]+)?", what)[0], []
        for name in files[model]:
            [row] = [row for row in benchmark(f"epyc-2-threads-{name}")["rows"] if row["method"] == method]
            least, most = (100 * (row[key] / row["ms"] - 1) for key in ("ms_least", "ms_most"))
            expected.append(f"{least:+.0f} to {most:+.0f} %" if ": " in what else f"{row['ratio']:.3f}")
        assert runs == expected + ["-"] * (4 - len(expected)), (model, what)


def test_scaling_on_two_cores():
    printed, _ = table("docs/execution.md", "batch", "T = 10", "T = 20")
    rows = benchmark("epyc-2-threads-digits-scaling-second")["rows"]
    for batch, *figures in printed:
        expected = []
        for method in ("none", "fora:2"):
            for steps in (10, 20, 40):
                key = (method, steps, int(batch))
                [ms] = [r["ms"] for r in rows if (r["method"], r["num_steps"], r["batch_size"]) == key]
                expected.append(f"{ms:,.0f} ({ms / int(batch) / steps:.2f})")
        assert figures == expected, batch


@pytest.mark.parametrize(("number", "name"), enumerate(["", "-compiled"]))
def test_caching_times_precision(number, name):
    printed, _ = table("docs/execution.md", "weights", "method", "ms", "speed-up", "PSNR", number=number)
    expected = []
    for row in benchmark(f"epyc-2-threads-digits-precisions{name}")["rows"]:
        same = row["psnr"] is None
        expected.append([
            row["weights"], row["method"], f"{row['ms']:,.0f}", f"{row['speedup_latency']:.3f}x",
            "-" if same else f"{row['psnr']:.1f}", "0" if same else f"{row['mse']:.2e}",
            "0" if same else f"{row['fd_uncached']:.2e}", f"{row['digits_fid']:.3f}",
        ])  # fmt: skip
    assert printed == expected


@pytest.mark.parametrize(("number", "name"), enumerate(["train", "train-compiled"]))
def test_router_training_on_two_cores(number, name):
    printed, _ = table("docs/execution.md", "case", "seconds", "forward passes", number=number)
    expected = []
    for row in benchmark(f"epyc-2-threads-b2-256-{name}")["rows"]:
        shares = [f"{row['forwards']:.2f}", "-"] if "forwards" in row else ["-", f"{row['of_naive']:.3f}"]
        peak = f"{row['peak_mb_on_top']:,.0f}"
        expected.append([row["case"], f"{row['trajectory_seconds']:.2f}", *shares, peak])
    assert printed == expected


def test_hooks_beside_their_peers():
    """Every file that `benchmarks.peers` wrote has its table, in the order of the files' names."""
    head = ["method", "share", "ms"]
    printed = [rows[1:] for rows, _ in tables("docs/diffusers.md") if rows[0][:3] == head]
    expected = []
    for file in sorted(BENCHMARKS.glob("*peers*.json")):
        found = json.loads(file.read_text())
        expected.append([
            [
                row["method"], f"{row['share']:.3f}", in_ms(row), f"{row['speedup_latency']:.3f}x",
                f"{row['speedup_macs']:.3f}x", f"{row['ratio']:.3f}",
                "-" if row["difference"] is None else f"{row['difference']:.1e}",
            ]
            for row in found["rows"]
        ])  # fmt: skip
    assert printed == expected


def test_measured_store():
    """Every file of `benchmarks.cache_memory --measure`: the formula holds, and the page has its figures."""
    page = " ".join((ROOT / "docs/diffusers.md").read_text().split())
    for file in sorted(BENCHMARKS.glob("*cache-memory*.json")):
        found = json.loads(file.read_text())
        assert found["stored_bytes"] == found["stored_bytes_by_formula"]
        stored, peak = (found[name] / 2**30 for name in ("stored_bytes", "peak_bytes"))
        assert f"{stored:.2f} GiB stored, {peak:.1f} GiB at the peak" in page, file.name


def test_router_training_on_an_h200():
    printed, _ = table("docs/execution.md", "T", "batch", "case", "seconds")
    expected = []
    for name in ("train", "train-20-steps"):
        for row in benchmark(f"nvidia-h200-xl-256-{name}")["rows"]:
            seconds, peak = f"{row['trajectory_seconds']:.2f}", f"{row['peak_mb_on_top']:,.0f}"
            setting = [str(row["num_steps"]), str(row["batch_size"]), row["case"]]
            expected.append([*setting, seconds, f"{row['forwards']:.2f}", peak])
    assert printed == expected


def test_readme_hardware_and_time():
    printed, _ = table("README.md", "what", "two CPU cores", "one GPU", "four GPUs")
    demo = json.loads((ROOT / "docs" / "demo" / "demo.json").read_text())["rows"]
    cpu = {row["method"]: row["ms"] for row in benchmark("epyc-2-threads-b2-256-fourth")["rows"]}
    gpu = {
        row["method"]: row["ms"]
        for row in benchmark("nvidia-h200-xl-256-compiled")["rows"]
        if row["batch_size"] == 8
    }
    [update] = [r for r in benchmark("nvidia-h200-xl-256-train")["rows"] if r["case"] == "update, compiled"]
    assert [row[1:] for row in printed] == [
        [f"{demo[0]['latency_ms']:.0f}, {demo[1]['latency_ms']:.0f} ms", "", ""],
        [f"{cpu['none'] / 1e3:.1f}, {cpu['random:0.375'] / 1e3:.1f} s", "", ""],
        ["", f"{gpu['none']:.0f}, {gpu['random:0.375']:.0f} ms", ""],
        ["", f"{update['trajectory_seconds']:.1f} s", ""],
        ["", "", "1.63 h (paper)"],
    ]
