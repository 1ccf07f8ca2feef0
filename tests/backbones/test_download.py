import gzip
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from commands import error_line, run
from safetensors.torch import save_file

from backbones import downloads
from backbones.downloads import RemoteFile, fetch, fetch_file
from common.contents import content_fault

CONTENT = bytes(range(256)) * 40
HTML = b"<!DOCTYPE html>\n<html><body>Sign in to the library's network</body></html>"
BINARY = "application/octet-stream"
# What stands in for a file: the content type, the body, and the words by which it is known.
STAND_INS = {
    "page": ("text/html; charset=utf-8", HTML, "text/html"),
    "hidden-page": (BINARY, b"\n\xef\xbb\xbf<!-- captive -->" + HTML, "is an HTML page"),
    "s3-error": ("application/xml", b"<?xml version='1.0'?><Error/>", "application/xml"),
    "json-error": (BINARY, b'{"error": "Repository not found"}', "is text"),
    "lfs-pointer": (BINARY, b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer"),
    "compressed": (BINARY, gzip.compress(CONTENT), "is a gzip file"),
    "empty": (BINARY, b"", "is empty"),
    "zeros": (BINARY, bytes(9999), "begins with 4096 zero bytes"),
}


class Server(BaseHTTPRequestHandler):
    """Serves CONTENT under any path but /missing; honours ranges unless the path says otherwise."""

    def do_GET(self):
        self.server.requests.append(self.headers.get("Range"))
        if self.path == "/missing":
            return self.send_error(404)
        if self.path[1:] in STAND_INS:
            kind, body, _ = STAND_INS[self.path[1:]]
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", len(body))
            self.end_headers()
            return self.wfile.write(body)
        if self.path == "/redirected":
            self.send_response(302)
            self.send_header("Location", "/page")
            return self.end_headers()
        start = 0
        if "Range" in self.headers and self.path != "/no-ranges":
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if start >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            return self.end_headers()
        body = CONTENT[start:]
        self.send_response(206 if start else 200)
        if self.path == "/other-range":
            self.send_header("Content-Range", f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", len(body))
        self.end_headers()
        self.wfile.write(body[:100] if self.path == "/breaks-off" else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    httpd.requests = []
    httpd.url = f"http://127.0.0.1:{httpd.server_port}/"
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd
    httpd.shutdown()


def test_file_arrives_whole_and_checked(server, tmp_path):
    facts = {"size": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest()}
    fetch_file(RemoteFile(server.url + "x", "deep/x.pt", **facts), tmp_path)
    assert (tmp_path / "deep" / "x.pt").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.pt"]


@pytest.mark.parametrize("path", ["x", "no-ranges"])
@pytest.mark.parametrize("have", [1000, len(CONTENT)])
def test_interrupted_download_goes_on(server, tmp_path, path, have):
    (tmp_path / "x.pt.part").write_bytes(CONTENT[:have])
    fetch_file(RemoteFile(server.url + path, "x.pt"), tmp_path)
    assert (tmp_path / "x.pt").read_bytes() == CONTENT
    assert server.requests == [f"bytes={have}-"]


def test_broken_transfer_is_kept_for_the_next_run(server, tmp_path):
    with pytest.raises(OSError, match="run again to go on|run the same command again"):
        fetch_file(RemoteFile(server.url + "breaks-off", "x.pt"), tmp_path)
    assert not (tmp_path / "x.pt").exists()
    assert (tmp_path / "x.pt.part").read_bytes() == CONTENT[:100]
    fetch_file(RemoteFile(server.url + "x", "x.pt"), tmp_path)
    assert (tmp_path / "x.pt").read_bytes() == CONTENT


def test_damaged_file_is_refused_and_removed(server, tmp_path):
    with pytest.raises(ValueError, match="arrived damaged"):
        fetch_file(RemoteFile(server.url + "x", "x.pt", sha256="0" * 64), tmp_path)
    assert not list(tmp_path.iterdir())


def test_file_longer_than_it_should_be_is_removed(server, tmp_path):
    (tmp_path / "x.pt.part").write_bytes(CONTENT + b"more")
    with pytest.raises(OSError, match="it was removed, run again"):
        fetch_file(RemoteFile(server.url + "x", "x.pt"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["missing", "http://127.0.0.1:9/x"])
def test_what_cannot_be_had_says_where_to_put_it_by_hand(server, tmp_path, url):
    url = url if url.startswith("http") else server.url + url
    with pytest.raises(OSError, match=r"put the file by hand at .*x\.pt"):
        fetch_file(RemoteFile(url, "x.pt"), tmp_path)


@pytest.mark.parametrize("path", [*STAND_INS, "redirected"])
def test_what_is_sent_in_place_of_a_file_is_not_kept(server, tmp_path, path):
    words = STAND_INS.get(path, STAND_INS["page"])[2]
    with pytest.raises(OSError, match=words) as error:
        fetch_file(RemoteFile(server.url + path, "x.pt"), tmp_path)
    assert str(tmp_path / "x.pt") in str(error.value)
    assert "\n" not in str(error.value)
    assert not [file for file in tmp_path.iterdir() if file.stat().st_size]


@pytest.mark.parametrize("path", ["page", "redirected", "other-range"])
def test_a_page_does_not_overwrite_what_was_fetched_so_far(server, tmp_path, path):
    (tmp_path / "x.pt.part").write_bytes(CONTENT[:1000])
    with pytest.raises(OSError, match=r"run again to go on, or put the file by hand at .*x\.pt"):
        fetch_file(RemoteFile(server.url + path, "x.pt"), tmp_path)
    assert (tmp_path / "x.pt.part").read_bytes() == CONTENT[:1000]


def test_a_page_is_not_gone_on_from(server, tmp_path):
    (tmp_path / "x.pt.part").write_bytes(HTML)
    fetch_file(RemoteFile(server.url + "x", "x.pt"), tmp_path)
    assert (tmp_path / "x.pt").read_bytes() == CONTENT
    assert server.requests == [None]


def test_content_is_told_by_head_and_tail(tmp_path):
    state = {"a": torch.arange(300.0)}
    torch.save(state, tmp_path / "a.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "a.safetensors", {"description": "<html"})
    save_file({}, tmp_path / "none.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    for path in tmp_path.iterdir():
        assert content_fault(path) is None
    faults = {
        "cut.pt": ((tmp_path / "a.pt").read_bytes()[:-40], "is cut short"),
        "cut.safetensors": ((tmp_path / "a.safetensors").read_bytes()[:-40], "its header says"),
        "more.safetensors": ((tmp_path / "a.safetensors").read_bytes() + b"x", "its header says"),
        "torch.safetensors": ((tmp_path / "a.pt").read_bytes(), "no safetensors file"),
        "wide.pt": (HTML.decode().encode("utf-16"), "an HTML page"),
        "latin.pt": (b"<html>\xe9</html>", "an HTML page"),
        "list.json": (b"[1]", "no JSON object"),
        "page.json": (HTML, "an HTML page"),
        "error.json": (b'{"error": "Invalid credentials"}', "error message ('Invalid credentials')"),
        "binary.json": (gzip.compress(b"{}"), "binary"),
    }
    for name, (content, words) in faults.items():
        (tmp_path / name).write_bytes(content)
        assert words in content_fault(tmp_path / name), name


def test_a_page_that_is_there_already(server, tmp_path, monkeypatch):
    """Refused where it is read, shown as damaged, fetched again by the command."""
    files = [RemoteFile(server.url + "x", "x.pt"), RemoteFile(server.url + "y", "y.pt", size=len(CONTENT))]
    monkeypatch.setitem(downloads.DOWNLOADS, "tiny", files)
    (tmp_path / "x.pt").write_bytes(HTML)
    (tmp_path / "y.pt").write_bytes(CONTENT[:500])
    with pytest.raises(ValueError, match=r"x\.pt is an HTML page; `python download.py tiny` fetches it"):
        fetch("tiny", tmp_path)
    assert (tmp_path / "x.pt").read_bytes() == HTML
    text = run("download.py", "--list", "--folder", tmp_path)
    assert f"damaged  {tmp_path / 'x.pt'} is an HTML page" in text
    assert f"damaged  {tmp_path / 'y.pt'} has 500 of {len(CONTENT)} bytes" in text
    assert "present" not in text
    text = run("download.py", "tiny", "--folder", tmp_path)
    assert "x.pt is an HTML page; fetching it again" in text
    assert (tmp_path / "x.pt").read_bytes() == (tmp_path / "y.pt").read_bytes() == CONTENT
    assert run("download.py", "--list", "--folder", tmp_path).count("present") == 2


def test_a_place_where_no_file_can_be_written(server, tmp_path, monkeypatch):
    monkeypatch.setitem(downloads.DOWNLOADS, "tiny", [RemoteFile(server.url + "x", "x.pt")])
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "x.pt").mkdir()
    for name, words in (("file", "is no folder"), ("dangling", "is no folder"), (".", "x.pt is a folder")):
        assert words in error_line("download.py", "tiny", "--folder", tmp_path / name)
    assert not server.requests


def test_command(server, tmp_path, monkeypatch):
    files = {"tiny": [RemoteFile(server.url + "a", "tiny/a"), RemoteFile(server.url + "b", "tiny/b")]}
    monkeypatch.setitem(downloads.DOWNLOADS, "tiny", files["tiny"])
    assert "absent" in run("download.py", "--list", "--folder", tmp_path)
    assert str(tmp_path / "tiny") in run("download.py", "tiny", "--folder", tmp_path)
    assert "present" in run("download.py", "--list", "--folder", tmp_path)
    run("download.py", "tiny", "--folder", tmp_path)
    assert len(server.requests) == 2  # what is there is not fetched again
    assert "'huge' is unknown" in error_line("download.py", "huge")
