"""Checkpoints and folders of runs: what is written comes back, what is damaged or foreign is told apart."""

import json

import pytest
import torch
from checkpoint_damage import DAMAGES, damage
from safetensors.torch import load_file, save_file

from router import Router, load_router, save_router
from training.checkpoints import (
    Damaged,
    find_resumable,
    new_run_folder,
    newest_state,
    read_checkpoint,
    resumed_state,
    runs,
    write_checkpoint,
)

SETTINGS = {"method": "harmonica", "lr": 0.01, "trajectories": 4, "weights": "a" * 16 + "-" + "b" * 64}


def state(train_steps: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(train_steps)
    moments = torch.randn(4, 300, generator=generator)
    return {"train_steps": torch.tensor(train_steps), "exp_avg": moments, "part": torch.tensor(0.5).double()}


def written(folder, train_steps: int = 7, settings: dict = SETTINGS):
    router = Router(5, 300, torch.Generator().manual_seed(0))
    return write_checkpoint(folder, train_steps, router, state(train_steps), settings=settings, method="m")


def test_a_checkpoint_is_a_router_with_its_state(tmp_path):
    path = written(tmp_path)
    assert path.name == "0000007.safetensors"
    router = load_router(path)
    assert (router.info["method"], router.info["train_steps"]) == ("m", 7)
    assert router.info["settings"] == SETTINGS
    names = {"logits", "resume.train_steps", "resume.exp_avg", "resume.part", "resume.crc32"}
    assert load_file(path).keys() == names
    found = read_checkpoint(path, SETTINGS)
    assert found.keys() == state().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state().items())
    assert found["part"].dtype == torch.float64


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path, kind):
    folder = new_run_folder(tmp_path, "a")
    older, newer = written(folder / "checkpoints", 7), written(folder / "checkpoints", 10)
    damage(newer, kind)
    with pytest.raises(Damaged, match=str(newer)):
        read_checkpoint(newer, SETTINGS)
    notes = []
    path, found = newest_state(folder, SETTINGS, notes)
    assert path == older
    assert found["train_steps"] == 7
    assert len(notes) == 1
    assert notes[0].startswith(f"skipped {newer}")
    with pytest.raises(ValueError, match="give its run's folder for the newest that reads"):
        resumed_state(newer, SETTINGS, [])


def test_one_changed_bit_of_the_state_is_found(tmp_path):
    path = written(tmp_path)
    tensors = load_file(path)
    tensors["resume.exp_avg"].view(torch.int32)[3, 299] ^= 1
    save_file(tensors, path, metadata={"settings": json.dumps(SETTINGS)})
    with pytest.raises(Damaged, match="its numbers are not those that were written"):
        read_checkpoint(path, SETTINGS)
    del tensors["resume.crc32"]  # versions of old wrote none
    save_file(tensors, path, metadata={"settings": json.dumps(SETTINGS)})
    assert read_checkpoint(path, SETTINGS)["train_steps"] == 7


@pytest.mark.parametrize(("name", "value", "said"), [
    ("lr", 0.2, "trained with --lr 0.01, not 0.2"),
    ("weights", "c" * 81, "trained with --ckpt, whose weights were a+-b+, not c+"),
])  # fmt: skip
def test_other_settings_are_named(tmp_path, name, value, said):
    with pytest.raises(ValueError, match=said):
        read_checkpoint(written(tmp_path), SETTINGS | {name: value})


def test_the_newest_by_number_is_resumed(tmp_path):
    """Not by its name: seven figures are not enough for every run."""
    folder = new_run_folder(tmp_path, "a")
    for train_steps in (9999999, 10000000, 3):
        written(folder / "checkpoints", train_steps)
    path, _ = newest_state(folder, SETTINGS, [])
    assert path.name == "10000000.safetensors"


def test_auto_means_the_newest_run_with_these_settings(tmp_path):
    folders = [new_run_folder(tmp_path, name) for name in ("a", "a", "a", "b")]
    for folder, lr in zip(folders, (0.01, 0.01, 0.5, 0.01), strict=True):
        written(folder / "checkpoints", settings=SETTINGS | {"lr": lr})
    assert find_resumable(tmp_path, "auto", "a", SETTINGS, []) == folders[1]
    assert find_resumable(tmp_path, "auto", "c", SETTINGS, []) is None
    assert find_resumable(tmp_path, str(folders[0]), "c", SETTINGS, []) == folders[0]
    assert find_resumable(tmp_path, str(folders[0] / "checkpoints"), "c", SETTINGS, []) == folders[0]
    save_router(tmp_path / "router.safetensors", Router(5, 24))
    with pytest.raises(ValueError, match="not a checkpoint in its run's folder"):
        find_resumable(tmp_path, str(tmp_path / "router.safetensors"), "c", SETTINGS, [])


# ---- the numbers of runs ---------------------------------------------------------------------------

FOREIGN = [
    "20240601-backup",
    "2024-06-01",
    "0007-x",
    "07-x",
    "7-x",
    "-1-x",
    "1e3-x",
    "12345-x",
    "500",
    "5 00-x",
]


def test_folders_of_others_number_no_run(tmp_path):
    """Nor does a folder with a run's number that holds no checkpoints, or a file."""
    for name in FOREIGN:
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    (tmp_path / "800-notes").mkdir()
    (tmp_path / "900-notes.txt").touch()
    names = [new_run_folder(tmp_path, name).name for name in ("a", "b", "a")]
    assert names == ["000-a", "001-b", "002-a"]
    assert [path.name for path in runs(tmp_path)] == ["002-a", "001-b", "000-a"]
    assert [path.name for path in runs(tmp_path, "a")] == ["002-a", "000-a"]


def test_the_thousandth_run(tmp_path):
    (tmp_path / "999-a" / "checkpoints").mkdir(parents=True)
    assert [new_run_folder(tmp_path, "a").name for _ in range(2)] == ["1000-a", "1001-a"]
    assert [path.name for path in runs(tmp_path)] == ["1001-a", "1000-a", "999-a"]
