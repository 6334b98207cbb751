"""Published weights: URL, download and hash, from a local server."""

import hashlib
import io
import re
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import Tensor

from ensemble.errors import InputError
from ensemble.models import architectures, pretrained

Serve = Callable[..., str]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path) -> Iterator[Path]:
    """An empty torch.hub cache: the directory of downloads."""
    before = torch.hub._hub_dir
    torch.hub.set_dir(tmp_path / "hub")
    yield tmp_path / "hub" / "checkpoints"
    torch.hub._hub_dir = before


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serve a body at a local URL."""
    servers: list[HTTPServer] = []

    def start(body: bytes, *, digits: str | None = None, status: int = 200) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        digits = digits or hashlib.sha256(body).hexdigest()[:8]
        return f"http://127.0.0.1:{server.server_port}/models/net-{digits}.pth"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A bare listening socket; the test defines its response."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def url_of(server: socket.socket) -> str:
    return f"http://127.0.0.1:{server.getsockname()[1]}/net-01234567.pth"


def checkpoint() -> tuple[dict[str, Tensor], bytes]:
    state = {"fc.weight": torch.arange(6.0).reshape(2, 3), "fc.bias": torch.tensor([7.0, 8.0])}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return state, buffer.getvalue()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_published_file_of_resnet18_has_its_known_name_and_url() -> None:
    assert pretrained.published_name("resnet18") == "resnet18-f37072fd.pth"
    expected = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
    assert pretrained.published_url("resnet18") == expected


def test_every_architecture_has_a_published_file_with_a_hash_in_its_name() -> None:
    names = {arch: pretrained.published_name(arch) for arch in architectures.torchvision_names()}
    pattern = r".+-[0-9a-f]{8,}\.pth"
    assert [arch for arch, name in names.items() if not re.fullmatch(pattern, name)] == []


def test_a_download_returns_the_state_dict_and_is_cached(serve: Serve, cache: Path) -> None:
    state, body = checkpoint()
    url = serve(body)
    assert_same(pretrained.download(url), state)
    assert (cache / url.rpartition("/")[2]).read_bytes() == body


def test_a_file_in_the_cache_is_not_downloaded_again(serve: Serve, cache: Path) -> None:
    state, body = checkpoint()
    digits = hashlib.sha256(body).hexdigest()[:8]
    url = serve(body)
    pretrained.download(url)
    url = serve(b"gone", digits=digits, status=404)
    assert_same(pretrained.download(url), state)


def test_a_hash_mismatch_is_rejected_and_leaves_no_file(serve: Serve, cache: Path) -> None:
    url = serve(checkpoint()[1], digits="00000000")
    message = re.escape(f'{url}: invalid hash value (expected "00000000", got')
    with pytest.raises(InputError, match=message):
        pretrained.download(url)
    assert list(cache.iterdir()) == []


def test_an_html_page_instead_of_the_file_is_rejected_and_leaves_no_file(
    serve: Serve, cache: Path
) -> None:
    url = serve(b"<html>Log in to this network</html>", digits="f37072fd")
    with pytest.raises(InputError, match=re.escape(f"{url}: invalid hash value")):
        pretrained.download(url)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>Log in to this network</html>", "got an HTML page"),
        (checkpoint()[1][:500], "got a truncated or corrupted file"),
        (b"", "got an empty file"),
    ],
)
def test_a_corrupted_file_in_the_cache_is_named(
    serve: Serve, cache: Path, content: bytes, message: str
) -> None:
    url = serve(checkpoint()[1])
    cached = cache / url.rpartition("/")[2]
    cache.mkdir(parents=True)
    cached.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(f"{cached}: ") + f".*{message}"):
        pretrained.download(url)


def test_a_missing_file_on_the_server_is_a_url_error(serve: Serve, cache: Path) -> None:
    url = serve(b"not here", status=404)
    with pytest.raises(URLError, match="Not Found"):
        pretrained.download(url)
    assert list(cache.iterdir()) == []


def test_a_refused_connection_is_a_url_error(listener: socket.socket) -> None:
    url = url_of(listener)
    listener.close()
    with pytest.raises(URLError, match="Connection refused"):
        pretrained.download(url)


def test_a_server_that_never_answers_times_out(listener: socket.socket) -> None:
    with pytest.raises(URLError, match="timed out"):
        pretrained.download(url_of(listener), timeout_s=0.1)


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH_9.6\r\n"])
def test_a_server_that_does_not_speak_http_is_a_url_error(
    listener: socket.socket, answer: bytes
) -> None:
    def respond() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(answer)

    thread = threading.Thread(target=respond)
    thread.start()
    with pytest.raises(URLError, match=r"closed connection without response|SSH-2\.0"):
        pretrained.download(url_of(listener))
    thread.join()


@pytest.mark.parametrize("home", ["a file", "missing", "unknown", "too long"])
def test_without_a_writable_cache_the_download_is_temporary(
    home: str, serve: Serve, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, body = checkpoint()
    url = serve(body)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    folders = {"a file": str(tmp_path / "file"), "missing": "/proc/1/none", "unknown": "~/.cache"}
    monkeypatch.setattr("torch.hub.get_dir", lambda: folders.get(home, "x" * 300))
    assert_same(pretrained.download(url), state)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "scratch"]
    url = serve(b"gone", digits=url.rpartition("-")[2].partition(".")[0], status=404)
    with pytest.raises(URLError, match="Not Found"):  # a run then uses random weights
        pretrained.download(url)


def test_a_full_disk_is_reported_with_advice(
    serve: Serve, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    url = serve(checkpoint()[1])
    monkeypatch.setattr("torch.hub.download_url_to_file", full)
    with pytest.raises(InputError, match=r"No space left on device; set TORCH_HOME .*--model_path"):
        pretrained.download(url)


def test_the_default_socket_timeout_is_restored_after_a_download(serve: Serve) -> None:
    before = socket.getdefaulttimeout()
    url = serve(checkpoint()[1])
    pretrained.download(url)
    assert socket.getdefaulttimeout() == before
    url = serve(b"", status=500)
    with pytest.raises(URLError):
        pretrained.download(url)
    assert socket.getdefaulttimeout() == before
