"""Tables of rows with figures that can be checked by hand."""

import json

import pytest

from study.tables import (
    FORECAST,
    FRESH_SAMPLES,
    ablation_table,
    comparison_table,
    end_to_end_table,
    evaluation_table,
    further_tables,
    grouped,
    is_main,
    objective_table,
    published_table,
    rival_table,
    sampler_table,
    shows_training,
    target_table,
)


def row(method: str, mse: float = 1e-3, **facts) -> dict:
    figures = {
        "cur": 0.5, "speedup_macs": 1.96, "speedup_latency": None, "digits_fid": 0.3, "fd_uncached": 0.1,
        "digits_fid_uncached": 0.2, "accuracy": 0.99, "psnr": 30.0, "ssim": 0.9,
    }  # fmt: skip
    setting = {"num_steps": 10, "speed": "1.96", "cfg_scale": 1.0, "sampler": "ddim", "samples": 2000}
    router = None if method in ("fora", "uncached") else f"routers.safetensors:{method}"
    return {"method": method, "mse": mse, "router": router} | figures | setting | facts


def cells(table: list[list[str]]) -> list[dict]:
    head, *body = table
    return [dict(zip(head, line, strict=True)) for line in body]


def test_seeds_are_taken_together():
    rows = [
        row("harmonica", mse, train_seed=seed, accuracy=0.9 + seed / 100)
        for seed, mse in enumerate((1, 2, 6))
    ]
    [group] = grouped(rows)
    assert group["seeds"] == 3
    assert (group["mean"]["mse"], group["least"]["mse"], group["greatest"]["mse"]) == (3, 1, 6)
    assert group["mean"]["accuracy"] == pytest.approx(0.91)
    assert group["mean"]["fid_ratio"] == pytest.approx(1.5)
    assert "speedup_latency" not in group["mean"]  # not measured
    assert len(grouped([*rows, row("harmonica", num_steps=20)])) == 2


def test_comparison_is_sorted_by_speed_and_error_and_marks_what_misses_its_speed():
    rows = [
        row("uncached", 0, speed=None, psnr=None),
        row("fora", 5e-3, speedup_macs=1.87),  # 4.6 % away
        row("harmonica", 1e-3, train_seed=0), row("harmonica", 3e-3, train_seed=1),
        row("fora", 9e-3, speed="3.1", speedup_macs=3.1),
        row("fora", 1e-9, group="transfer"), row("fora", 1e-9, cfg_scale=1.5),
        row("fora", 1e-9, num_steps=20),
    ]  # fmt: skip
    found = cells(comparison_table(rows, 10))
    assert [(line["method"], line["speed asked"]) for line in found] == [
        ("uncached", "-"), ("harmonica", "1.96x"), ("fora", "1.96x"), ("fora", "3.1x"),
    ]  # fmt: skip
    assert found[0]["PSNR"] == "-"
    assert found[1]["MSE"] == "2.00e-03 (1.00e-03 to 3.00e-03)"
    assert [line["by MACs"] for line in found] == ["1.96x", "1.96x", "1.87x *", "3.10x"]
    assert len(comparison_table(rows, 10, "3.1")) == 3  # head, uncached, FORA


def test_end_to_end_is_put_beside_the_best_of_the_others():
    rows = [
        row(FORECAST, 1e-4, train_seed=0, fd_uncached=0.01),
        row(FORECAST, 3e-4, train_seed=1, fd_uncached=0.03),
        row("end-to-end", 1e-6), row("calibrated-fora", 1e-6),  # of this project too
        row("harmonica", 2e-3, fd_uncached=0.05), row("fora", 8e-4, fd_uncached=0.5),
    ]  # fmt: skip
    [line] = cells(end_to_end_table(rows))
    assert (line["best of the others"], line["ratio"]) == ("8.00e-04 (fora)", "0.25")
    assert line["/ HarmoniCa"] == "0.100"
    assert (line["FD"], line["lowest of the others"]) == ("2.00e-02", "5.00e-02 (harmonica)")
    assert line["MSE"] == "2.00e-04 (1.00e-04 to 3.00e-04)"
    assert len(end_to_end_table(rows, FRESH_SAMPLES)) == 1
    fresh = [row(name, mse, group=FRESH_SAMPLES) for name, mse in ((FORECAST, 1), ("fora", 2))]
    [line] = cells(end_to_end_table(rows + fresh, FRESH_SAMPLES))
    assert (line["ratio"], line["/ HarmoniCa"]) == ("0.50", "-")


def test_objective_leaves_out_the_step_that_is_executed_last():
    rows = [
        row("fora", group="objective", step_error=3.0, step_errors=[8.0, 1.0, 0.0]),
        row("harmonica", group="objective", step_error=2.0, step_errors=[0.0, 3.0, 3.0], train_seed=0),
    ]
    found = cells(objective_table(rows))
    assert [(line["method"], line["but the last"]) for line in found] == [
        ("harmonica", "3.00e+00"), ("fora", "5.00e-01"),
    ]  # fmt: skip


def test_published_numbers_stand_beside_the_nearest_speed():
    rows = [
        row("harmonica", speedup_macs=speed, digits_fid=fid, cur=cur, speed=str(speed))
        for speed, fid, cur in ((1.25, 0.4, 0.2), (1.96, 0.8, 0.5))
    ]
    [line] = [
        line
        for line in cells(published_table(rows))
        if (line["steps"], line["method"]) == ("10", "harmonica")
    ]
    assert (line["paper: CUR"], line["by latency"], line["FID / uncached"]) == ("22.86 %", "1.23x", "1.098")
    assert (line["ours: CUR"], line["by MACs"], line["digits-FID / uncached"]) == ("20.0 %", "1.25x", "2.000")


def test_targets_and_ablations_are_apart():
    rows = [
        row("harmonica", group="target-cur", variant=0.4, cur=0.401, train_seed=0),
        row("harmonica-eps", group="data-loss"), row("fora", cfg_scale=1.5), row("fora"),
    ]  # fmt: skip
    [line] = cells(target_table(rows))
    assert (line["asked CUR"], line["reached CUR"]) == ("40 %", "40.10 %")
    assert [(line[0], line[1]) for line in ablation_table(rows)[1:]] == [
        ("data-loss", "harmonica-eps"), ("guidance", "fora"),
    ]  # fmt: skip
    titles = [title for title, _, _ in further_tables(rows)]
    assert titles == ["Asking for a speed", "Ablations", "Published numbers beside ours"]


@pytest.mark.parametrize(
    ("one", "main", "training"),
    [
        (row("harmonica", train_seed=0), True, True),
        (row("harmonica", train_seed=1), True, False),
        (row("harmonica", train_seed=0, speed="3.1"), True, False),
        (row("taylor-harmonica", train_seed=0), True, False),
        (row("calibrated-harmonica", train_seed=0), True, False),
        (row("fora"), True, False),
        (row("harmonica-20k", train_seed=0, group="full-length"), False, True),
        (row("harmonica-eps", train_seed=0, group="data-loss"), False, False),
        (row("harmonica", train_seed=0, cfg_scale=1.5), False, False),
        (row("harmonica", train_seed=0, sampler="ddpm"), False, False),
    ],
)
def test_rows_of_the_comparison_and_trainings_that_are_drawn(one, main, training):
    assert (is_main(one), shows_training(one)) == (main, training)


def test_evaluations_are_read_and_others_refused(tmp_path):
    file = tmp_path / "one.json"
    file.write_text(json.dumps({"samples": "x/cached.npz", "n": 50, "fid": 3.25456, "psnr": None}))
    [line] = cells(evaluation_table([file]))
    assert (line["samples"], line["n"], line["fid"], line["psnr"], line["recall"]) == (
        "cached.npz", "50", "3.255", "-", "-",
    )  # fmt: skip
    for content in ("[]", "{}", '{"samples": 3}', "no JSON"):
        file.write_text(content)
        with pytest.raises(ValueError, match="one.json is not what evaluate.py --output writes"):
            evaluation_table([file])


def test_samplers_stand_side_by_side():
    facts = {"num_steps": 20, "group": "samplers"}
    own = facts | {"variant": "trained-with-ddim"}
    rows = [
        row("harmonica", 1e-3, fd_uncached=0.25, **own), row("harmonica", 2e-3, sampler="ddpm", **own),
        row("calibrated-harmonica", 3e-3, sampler="ddpm", **own),
        row("fora", 4e-3, **facts), row("harmonica", 5e-3, num_steps=20), row("fora", 6e-3, sampler="ddpm"),
    ]  # fmt: skip
    assert sampler_table(rows) == [
        ["schedule", "trained with", "reuse", "ddim", "ddpm"],
        ["harmonica", "ddim", "as it is", "1.00e-03 / 2.50e-01", "2.00e-03 / 1.00e-01"],
        ["harmonica", "ddim", "calibrated", "-", "3.00e-03 / 1.00e-01"],
        ["fora", "-", "as it is", "4.00e-03 / 1.00e-01", "-"],
    ]
    assert "Samplers" in [title for title, _, _ in further_tables(rows)]
    assert len(ablation_table(rows)) == 2  # FORA under DDPM, of no group


def test_rivals_stand_beside_ours_by_speed():
    facts = {"num_steps": 20, "group": "rivals"}
    rows = [
        row("dpcache", 1e-3, speed="1.96", **facts), row("dpcache", 3e-3, speed="2.77", **facts),
        row("dpcache", 9e-3, speed="1.96", num_steps=10, group="rivals"), row("fora", 6e-3, num_steps=20),
        row(FORECAST, 1e-5, speed="1.96", num_steps=20, train_seed=0),
        row(FORECAST, 3e-5, speed="1.96", num_steps=20, train_seed=1),
    ]  # fmt: skip
    assert rival_table(rows, 20) == [
        ["T = 20", "1.96x", "2.77x"],
        ["dpcache", "1.00e-03 / 1.00e-01", "3.00e-03 / 1.00e-01"],
        [FORECAST, "2.00e-05 / 1.00e-01", "-"],
    ]
    assert len(ablation_table(rows)) == 1
