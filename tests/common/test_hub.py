"""Fetching from the Hub and sending there, with the network's part replaced."""

import huggingface_hub
import pytest
import requests

from common import hub


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
