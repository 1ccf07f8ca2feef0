import argparse
import pickle
from collections import OrderedDict

import pytest
import torch
from commands import error_line, run
from safetensors.torch import save_file

from router import Router, Schedule, find_router, load_router, save_router


def write_released(path, logits, **args):
    rows = OrderedDict((f"{i}.prob", row) for i, row in enumerate(logits))
    torch.save({"routers": rows, "opt": {"state": {}}, "args": argparse.Namespace(**args)}, path)


@pytest.mark.parametrize("threshold", ["0.1", "0.5", "0.9"])
def test_schedules_match_the_released_ones(expected, threshold):
    schedule = Router.from_logits(expected["cached.router_prob"]).schedule(float(threshold))
    assert torch.equal(schedule.compute, expected[f"cached.computed_thres{threshold}"])


def test_cur_counts_the_first_step(expected):
    schedule = Router.from_logits(expected["cached.router_prob"]).schedule(0.1)
    assert schedule.cur == pytest.approx(18 / 60)
    assert (schedule.num_steps, schedule.num_branches) == (10, 6)


def test_first_step_is_always_computed():
    schedule = Schedule(torch.zeros(4, 3, dtype=torch.bool))
    assert schedule.compute[3].all()
    assert schedule.cur == pytest.approx(9 / 12)


@pytest.mark.parametrize(
    "table", [torch.ones(3, 4), torch.ones(3, dtype=torch.bool), torch.ones(0, 4, dtype=torch.bool)]
)
def test_what_is_no_schedule_is_refused(table):
    with pytest.raises(ValueError, match="bool table"):
        Schedule(table)


def test_speedup_is_the_ratio_of_macs(tiny_model):
    table = torch.ones(10, 4, dtype=torch.bool)
    table[:5, 1] = False  # five MLPs reused
    schedule = Schedule(table)
    per_step = sum(tiny_model.branch_macs) + tiny_model.other_macs
    assert schedule.macs(tiny_model) == 10 * per_step - 5 * tiny_model.branch_macs[1]
    assert schedule.speedup_macs(tiny_model) == pytest.approx(10 * per_step / schedule.macs(tiny_model))


def test_only_rows_before_the_first_step_train():
    router = Router(6, 4)
    assert [tuple(p.shape) for p in router.parameters()] == [(4,)] * 5
    assert torch.equal(router.logits[5], torch.full((4,), 5.0))
    assert router.scores().shape == (6, 4)


def test_a_score_at_the_threshold_is_reused():
    """As in the released code, which computes where score > threshold."""
    schedule = Router.from_logits(torch.tensor([[0.0, 1e-6, -1e-6], [5.0, 5.0, 5.0]])).schedule(0.5)
    assert schedule.compute[0].tolist() == [False, True, False]


@pytest.mark.parametrize("threshold", [-0.1, 1.0, 2.0])
def test_threshold_outside_its_range_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold"):
        Router(3, 2).schedule(threshold)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_router_survives_its_file(tmp_path, suffix):
    router = Router(7, 4)
    facts = {"method": "harmonica", "model": "DiT-S/2", "image_size": 256, "cfg_scale": 1.5, "threshold": 0.1}
    facts |= {"cur": 0.25, "reg_weight": 7e-8, "train_steps": 20000}
    save_router(tmp_path / f"r{suffix}", router, **facts)
    loaded = load_router(tmp_path / f"r{suffix}", "DiT-S/2", 7, 4)
    assert torch.equal(loaded.logits, router.logits)
    assert facts.items() <= loaded.info.items()
    assert loaded.info["version"] == 1
    assert [file.name for file in tmp_path.iterdir()] == [f"r{suffix}"]


def test_released_layout_is_what_others_read(tmp_path):
    """They index `routers` by "i.prob" and load it without our code."""
    router = Router(5, 3)
    save_router(tmp_path / "r.pt", router)
    content = torch.load(tmp_path / "r.pt", weights_only=True)
    rows = torch.nn.ModuleList([torch.nn.Module() for _ in range(5)])
    for row in rows:
        row.prob = torch.nn.Parameter(torch.zeros(3))
    rows.load_state_dict(content["routers"])
    assert torch.equal(torch.stack([row.prob for row in rows]), router.logits)


def test_released_harmonica_file_is_read(tmp_path):
    logits = torch.randn(6, 4)
    logits[-1] = 5.0
    args = {
        "model": "DiT-XL/2",
        "image_size": 256,
        "lambda_c": 500,
        "l1": 7e-8,
        "cfg_scale": 1.5,
        "ste_threshold": 0.1,
    }
    write_released(tmp_path / "0020000.pt", logits, **args)
    router = load_router(tmp_path / "0020000.pt", num_steps=6)
    assert torch.equal(router.logits, logits)
    wanted = {
        "method": "harmonica",
        "model": "DiT-XL/2",
        "threshold": 0.1,
        "reg_weight": 7e-8,
        "num_branches": 4,
    }
    assert wanted.items() <= router.info.items()


def test_l2c_file_computes_odd_steps_whatever_they_hold(tmp_path):
    logits = torch.full((6, 4), -5.0)
    write_released(tmp_path / "l2c.pt", logits, model="DiT-XL/2", l1=5e-6, ste_threshold=None)
    router = load_router(tmp_path / "l2c.pt")
    assert router.info["method"] == "l2c"
    schedule = router.schedule(0.999)
    assert schedule.compute[1::2].all()
    assert not schedule.compute[0::2].any()


L2C_ARGUMENTS = {
    "data_path": "imagenet/train", "results_dir": "ddp_results", "model": "DiT-XL/2", "image_size": 256,
    "num_classes": 1000, "epochs": 1, "global_batch_size": 64, "global_seed": 0, "vae": "ema",
    "num_workers": 4, "log_every": 100, "ckpt_every": 1000, "wandb": True, "ckpt": None, "l1": 5e-06,
    "lr": 0.001, "max_steps": 50000, "ste_threshold": None,
}  # fmt: skip


@pytest.mark.parametrize(("steps", "reused"), [(20, 248), (50, 664)])
def test_files_as_learning_to_cache_released_them(tmp_path, steps, reused):
    """In their layout, of DiT-XL/2, with as many reused cells; the odd rows keep their random start."""
    generator = torch.Generator().manual_seed(steps)
    logits = torch.randn(steps, 56, generator=generator)
    cells = torch.randperm(steps // 2 * 56, generator=generator)
    trained = torch.full((steps // 2 * 56,), 5.0)
    trained[cells[:reused]] = -5.0
    logits[::2] = trained.view(steps // 2, 56)
    rows = [torch.nn.Parameter(row) for row in logits]
    optimizer = torch.optim.AdamW(rows, lr=0.001)
    sum(row.sum() for row in rows[::2]).backward()
    optimizer.step()
    content = {"routers": OrderedDict((f"{i}.prob", row.data) for i, row in enumerate(rows))}
    content |= {"opt": optimizer.state_dict()}
    content |= {"args": argparse.Namespace(**L2C_ARGUMENTS, num_sampling_steps=steps)}
    torch.save(content, tmp_path / f"l2c_dit_xl2_256_ddim{steps}.pt")
    router = load_router(tmp_path / f"l2c_dit_xl2_256_ddim{steps}.pt", "DiT-XL/2", steps, 56)
    assert (router.info["method"], router.info["reg_weight"]) == ("l2c", 5e-6)
    assert "threshold" not in router.info
    schedule = router.schedule(0.1)
    assert schedule.compute[1::2].all()
    assert int((~schedule.compute).sum()) == reused
    assert schedule.cur == pytest.approx(reused / (56 * steps))


@pytest.mark.parametrize(
    "content",
    [
        {"routers": {"0.prob": [1.0], "1.prob": [2.0]}},
        {"routers": {"0.prob": torch.ones(2), "1.prob": torch.ones(3)}},
        [torch.ones(2)],
        torch.ones(2),
    ],
)
def test_malformed_released_files_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "r.pt")
    with pytest.raises(ValueError, match=r"r\.pt"):
        load_router(tmp_path / "r.pt")


def test_released_file_with_odd_args_is_read(tmp_path):
    rows = {f"{i}.prob": torch.full((3,), 5.0) for i in range(4)}
    torch.save({"routers": rows, "opt": {}, "args": "x"}, tmp_path / "r.pt")
    assert load_router(tmp_path / "r.pt").info["method"] == "harmonica"


def test_command_shows_and_exports(tmp_path):
    save_router(tmp_path / "r.safetensors", Router(5, 3), method="harmonica", model="DiT-S/2", threshold=0.1)
    output = run("router.py", tmp_path / "r.safetensors", "--export", tmp_path / "x.pt")
    assert "DiT-S/2" in output
    assert "/ 15 branches computed" in output
    logits = load_router(tmp_path / "r.safetensors").logits
    assert torch.equal(load_router(tmp_path / "x.pt", "DiT-S/2").logits, logits)
    assert "does not end in .pt" in error_line("router.py", tmp_path, "--export", "x.bin")


class Harmful:
    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


@pytest.mark.parametrize("content", [Harmful(), {"routers": {"0.prob": Harmful()}}])
def test_pickle_that_would_run_code_is_refused(tmp_path, content):
    path = tmp_path / "evil.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match="was refused.*exec"):
        load_router(path)
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="was refused|cannot be read"):
        load_router(path)


@pytest.mark.parametrize(
    ("expectation", "words"),
    [
        ({"model": "DiT-XL/2"}, "model DiT-S/2, not DiT-XL/2"),
        ({"num_steps": 20}, "num_steps 5, not 20"),
        ({"num_branches": 56}, "num_branches 3, not 56"),
    ],
)
def test_router_for_something_else_is_refused_naming_both(tmp_path, expectation, words):
    save_router(tmp_path / "r.safetensors", Router(5, 3), model="DiT-S/2")
    with pytest.raises(ValueError, match=words):
        load_router(tmp_path / "r.safetensors", **expectation)


def test_files_that_are_no_routers_are_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"nonsense")
    (tmp_path / "b.pt").write_bytes(b"nonsense")
    torch.save({"weights": torch.ones(2)}, tmp_path / "c.pt")
    torch.save({"routers": {"0.prob": torch.ones(2), "2.prob": torch.ones(2)}}, tmp_path / "d.pt")
    for name in ("a.safetensors", "b.pt", "c.pt", "d.pt"):
        with pytest.raises(ValueError, match=name):
            load_router(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"absent\.pt does not exist"):
        load_router(tmp_path / "absent.pt")


def test_folder_means_its_newest_router(tmp_path):
    checkpoints = tmp_path / "000-run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no router"):
        find_router(tmp_path / "000-run")
    for name in ("0000500", "0020000", "0001000", "0030000.part"):
        save_router(checkpoints / f"{name}.safetensors", Router(2, 1))
    assert find_router(tmp_path / "000-run").name == "0020000.safetensors"
    assert find_router(checkpoints).name == "0020000.safetensors"


@pytest.mark.parametrize("name", ["r.pth", "r.bin", "r.ckpt", "r", "r.safetensors", "0020000.pth"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_a_router_file_is_its_content_says(tmp_path, suffix, name):
    """In both layouts, as a file and as what a folder holds."""
    router = Router(5, 3)
    save_router(tmp_path / f"written{suffix}", router, model="DiT-S/2", threshold=0.25)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    path = (tmp_path / f"written{suffix}").rename(tmp_path / "run" / "checkpoints" / name)
    (path.parent / "LICENSE").write_text("no router, whatever it says of 99999999")
    (path.parent / "0099999.png").write_bytes(b"\x89PNG")
    for given in (path, tmp_path / "run"):
        loaded = load_router(given, "DiT-S/2", 5, 3)
        assert torch.equal(loaded.logits, router.logits)
        assert loaded.info["threshold"] == 0.25


def test_rows_alone_and_of_a_wrapped_module_are_read(tmp_path):
    logits = torch.randn(4, 3)
    rows = {f"module.{step}.prob": row for step, row in enumerate(logits)}
    for content in (rows, {"routers": rows}, {name[7:]: row for name, row in rows.items()}):
        torch.save(content, tmp_path / "r.pth")
        assert torch.equal(load_router(tmp_path / "r.pth").logits[::2], logits[::2])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_tables_that_are_no_floats_are_refused(tmp_path, dtype):
    """As scores, ones and zeros of integers would all be above the threshold: everything computed."""
    save_file({"logits": torch.ones(4, 3).to(dtype)}, tmp_path / "a.safetensors")
    rows = {f"{step}.prob": torch.ones(3).to(dtype) for step in range(4)}
    torch.save({"routers": rows, "opt": {}, "args": {"l1": 1e-6}}, tmp_path / "b.pt")
    save_file(
        {"logits": torch.ones(4, 3), "weights": torch.ones(4, 3, 2).to(dtype)}, tmp_path / "c.safetensors"
    )
    for name, table in (("a.safetensors", "logits"), ("b.pt", "logits"), ("c.safetensors", "weights")):
        with pytest.raises(ValueError, match=rf"{name}: {table} are {str(dtype)[6:]}, not floating point"):
            load_router(tmp_path / name)


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    logits = torch.ones(4, 3)
    logits[1] = torch.inf  # as of a step that Learning-to-Cache computes in full
    save_file({"logits": logits}, tmp_path / "r.safetensors")
    assert load_router(tmp_path / "r.safetensors").schedule(0.5).compute.all()
    for tables in (
        {"logits": logits.index_fill(1, torch.tensor([2]), torch.nan)},
        {"logits": logits, "weights": torch.full((4, 3, 1), torch.inf)},
        {"logits": logits, "weights": torch.full((4, 3, 1), 1e300, dtype=torch.float64)},
        {"logits": logits, "weights": torch.ones(4, 3, 0)},
    ):
        save_file(tables, tmp_path / "r.safetensors")
        with pytest.raises(ValueError, match=r"r\.safetensors: "):
            load_router(tmp_path / "r.safetensors")


@pytest.mark.parametrize("threshold", [float("nan"), float("inf"), 1.0, -0.5, "abc", True, None, [0.1]])
def test_threshold_of_a_file_is_a_number_or_refused(tmp_path, threshold):
    save_router(tmp_path / "r.safetensors", Router(4, 3), threshold=threshold)
    with pytest.raises(ValueError, match=r"r\.safetensors says threshold"):
        load_router(tmp_path / "r.safetensors")
    write_released(tmp_path / "r.pt", torch.ones(4, 3), lambda_c=500, ste_threshold=threshold)
    if threshold is None:  # Learning-to-Cache's own files hold this
        assert "threshold" not in load_router(tmp_path / "r.pt").info
        return
    with pytest.raises(ValueError, match=r"r\.pt says threshold"):
        load_router(tmp_path / "r.pt")


def test_metadata_that_contradicts_the_logits_is_refused(tmp_path):
    metadata = {"num_steps": "10", "version": "1"}
    save_file({"logits": torch.ones(4, 3)}, tmp_path / "r.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="says num_steps 10, its logits are of 4"):
        load_router(tmp_path / "r.safetensors")


def test_the_router_of_most_steps_is_found_by_what_it_says(tmp_path):
    for name, steps in (("router-2024-01-99", 300), ("best", 500), ("0000400", None), ("v9", None)):
        facts = {} if steps is None else {"train_steps": steps}
        save_router(tmp_path / f"{name}.safetensors", Router(5, 24), **facts)
    assert find_router(tmp_path).stem == "best"
    (tmp_path / "best.safetensors").unlink()
    assert find_router(tmp_path).stem == "0000400"
