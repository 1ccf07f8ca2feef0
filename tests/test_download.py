import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from commands import error_line, run

import download
from download import RemoteFile, fetch_file

CONTENT = bytes(range(256)) * 40


class Server(BaseHTTPRequestHandler):
    """Serves CONTENT under any path but /missing; honours ranges unless the path says otherwise."""

    def do_GET(self):
        self.server.requests.append(self.headers.get("Range"))
        if self.path == "/missing":
            return self.send_error(404)
        start = 0
        if "Range" in self.headers and self.path != "/no-ranges":
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if start >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            return self.end_headers()
        body = CONTENT[start:]
        self.send_response(206 if start else 200)
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


def test_command(server, tmp_path, monkeypatch):
    files = {"tiny": [RemoteFile(server.url + "a", "tiny/a"), RemoteFile(server.url + "b", "tiny/b")]}
    monkeypatch.setattr(download, "DOWNLOADS", files)
    assert "absent" in run("download.py", "--list", "--folder", tmp_path)
    assert str(tmp_path / "tiny") in run("download.py", "tiny", "--folder", tmp_path)
    assert "present" in run("download.py", "--list", "--folder", tmp_path)
    run("download.py", "tiny", "--folder", tmp_path)
    assert len(server.requests) == 2  # what is there is not fetched again
    assert "'huge' is unknown" in error_line("download.py", "huge")
