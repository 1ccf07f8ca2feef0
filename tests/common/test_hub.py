"""Fetching from the Hub and sending there, with the network's part replaced."""

import shutil

import huggingface_hub
import pytest
import requests
import torch
from commands import error_line, run

from common import hub
from router import load_router


def test_names_of_repositories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").mkdir()
    assert hub.is_repository("user/router-T20-1.96x")
    for other in ("a/b", "router", "some/file.safetensors", "a/b/c", "../b", "digits-T20-1.96x", ""):
        assert not hub.is_repository(other), other


def test_fetching(tmp_path, monkeypatch):
    (tmp_path / "router.safetensors").write_bytes(b"x")
    calls = []

    def download(repository, name):
        calls.append((repository, name))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert hub.fetch("user/r", "router.safetensors") == tmp_path / "router.safetensors"
    assert calls == [("user/r", "router.safetensors")]


def test_without_network_it_is_one_line(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise requests.exceptions.ConnectionError("no route to host\nmore lines")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(huggingface_hub, "create_repo", fail)
    with pytest.raises(
        OSError, match=r"router\.safetensors of user/r cannot be had from the Hub \(no route to h"
    ):
        hub.fetch("user/r", "router.safetensors")
    with pytest.raises(
        OSError, match=r"is complete, but cannot be sent to user/r \(no route to host\); when"
    ) as caught:
        hub.upload(tmp_path, "user/r")
    assert "\n" not in str(caught.value)


def test_sending(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, **more: calls.append((name, more)))
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **more: calls.append(more))
    assert hub.upload(tmp_path, "user/r", private=True) == "https://huggingface.co/user/r"
    assert calls == [
        ("user/r", {"private": True, "exist_ok": True}),
        {"repo_id": "user/r", "folder_path": tmp_path},
    ]


def test_a_router_is_shared_and_used(tmp_path, monkeypatch):
    """Pushed to a folder that stands for the Hub, and read from there by its name."""
    monkeypatch.chdir(tmp_path)
    shared = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *_, **__: None)
    monkeypatch.setattr(
        huggingface_hub, "upload_folder", lambda **more: shutil.copytree(more["folder_path"], shared)
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda _repository, name: str(shared / name))
    output = run("router.py", "push", "digits-T20-1.96x", "user/my-router")
    assert "shared at https://huggingface.co/user/my-router" in output
    assert sorted(file.name for file in shared.iterdir()) == [
        "README.md",
        "router.safetensors",
        "schedule.png",
    ]
    card = (shared / "README.md").read_text()
    assert 'apply_schedule(pipe, "user/my-router")' in card
    assert "| speed-up by MACs | 1.96" in card
    router, original = load_router("user/my-router"), load_router("digits-T20-1.96x")
    assert torch.equal(router.logits, original.logits)
    assert torch.equal(router.weights, original.weights)
    assert "is no USER/REPO" in error_line("router.py", "push", "digits-T20-1.96x", "no repository")


def test_a_push_without_network_finishes_what_is_local(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise requests.exceptions.ConnectionError("no route to host")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "create_repo", fail)
    line = error_line("router.py", "push", "digits-T20-1.96x", "user/r")
    assert "results/hub/user--r is complete, but cannot be sent" in line
    assert len(list((tmp_path / "results" / "hub" / "user--r").iterdir())) == 3
