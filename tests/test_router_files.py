"""Many routers in one file, read by name."""

import pytest
import torch
from commands import error_line, run

from router import Router, load_router, load_routers, save_router, save_routers


@pytest.fixture
def routers():
    """One of plain reuse, one with weights of reuse, of different shapes."""
    plain = Router.from_logits(torch.tensor([[1.0, -1.0], [-2.0, 2.0], [5.0, 5.0]]))
    plain.info = {
        "method": "harmonica",
        "threshold": 0.2,
        "settings": {"lr": 0.1},
        "train_arguments": ["--lr"],
    }
    weighted = Router.from_logits(torch.tensor([[-3.0], [5.0]]))
    weighted.weights = torch.tensor([[[1.5, -0.5]], [[0.0, 0.0]]])
    return {"plain-T3": plain, "weighted-T2": weighted}


@pytest.mark.parametrize("name", ["plain-T3", "weighted-T2"])
def test_a_router_by_name_is_the_one_in_a_file_of_its_own(tmp_path, routers, name):
    save_routers(tmp_path / "all.safetensors", routers)
    save_router(tmp_path / "one.safetensors", routers[name])
    one, named = load_router(tmp_path / "one.safetensors"), load_router(f"{tmp_path}/all.safetensors:{name}")
    assert torch.equal(one.logits, named.logits)
    assert (one.weights is None) == (named.weights is None)
    assert one.weights is None or torch.equal(one.weights, named.weights)
    assert one.info | {"path": ""} == named.info | {"path": ""}
    assert named.info["path"] == f"{tmp_path}/all.safetensors:{name}"


def test_all_are_read_at_once_and_written_again(tmp_path, routers):
    save_routers(tmp_path / "all.safetensors", routers)
    found = load_routers(tmp_path / "all.safetensors")
    assert found.keys() == routers.keys()
    save_routers(tmp_path / "again.safetensors", found)
    again = load_routers(tmp_path / "again.safetensors")
    assert all(torch.equal(again[name].logits, routers[name].logits) for name in routers)
    assert again["plain-T3"].info["settings"] == {"lr": 0.1}
    written = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("all", "again")]
    assert written[0] == written[1]  # so that version control sees no change where there is none


def test_wrong_names_and_files_are_one_line(tmp_path, routers):
    file = tmp_path / "all.safetensors"
    save_routers(file, routers)
    assert "holds no router 'plain-T4'; it holds, among others: plain-T3" in error_line(
        "router.py", f"{file}:plain-T4"
    )
    assert f"{file} holds 2 routers; name one: {file}:plain-T3" in error_line("router.py", file)
    assert "nowhere.safetensors does not exist" in error_line(
        "router.py", f"{tmp_path}/nowhere.safetensors:a"
    )
    save_router(tmp_path / "one.safetensors", routers["plain-T3"])
    line = error_line("router.py", f"{tmp_path}/one.safetensors:plain-T3")
    assert "one.safetensors is no file of named routers" in line
    file.write_bytes(file.read_bytes()[:100])
    assert "is no file of named routers" in error_line("router.py", f"{file}:plain-T3")
    with pytest.raises(ValueError, match="is no file of named routers"):
        load_routers(file)


def test_model_and_steps_are_checked_of_a_named_router_too(tmp_path, routers):
    save_routers(tmp_path / "all.safetensors", routers)
    with pytest.raises(ValueError, match="is a router for num_steps 3, not 10"):
        load_router(f"{tmp_path}/all.safetensors:plain-T3", num_steps=10)
    assert "1 / 2 branches computed" in run("router.py", f"{tmp_path}/all.safetensors:weighted-T2")
