"""torchvision's published ImageNet weights: URL, file name, download."""

import contextlib
import re
import socket
import tempfile
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlparse

import torch

from ensemble.errors import InputError, first_line
from ensemble.files import reason
from ensemble.models import checkpoints
from ensemble.models.checkpoints import State
from ensemble.models.vision import torchvision

DOWNLOAD_TIMEOUT_S = 10.0
_HASH = re.compile(r"-([0-9a-f]{8,})\.")  # SHA-256 prefix in a file name


def published_url(arch: str) -> str:
    """The URL of torchvision's ImageNet weights for `arch`; it ends in the file name."""
    enum = torchvision.models.get_model_weights(arch)
    return str(getattr(enum, "IMAGENET1K_V1", enum.DEFAULT).url)


def published_name(arch: str) -> str:
    """The file name of torchvision's ImageNet weights for `arch`: `resnet18-f37072fd.pth`."""
    return _file_name(published_url(arch))


def download(url: str, *, timeout_s: float = DOWNLOAD_TIMEOUT_S) -> State:
    """The weights at a `published_url`, from the torch.hub cache or downloaded; downloads are
    verified by the hash in the file name.

    Raises:
        URLError: the server does not respond within `timeout_s`, or lacks the file.
        InputError: the download has another hash, or the cached file is not a valid checkpoint.
    """
    name = _file_name(url)
    cached = _cache(name)
    if cached is not None:
        if not cached.exists():
            _fetch(url, cached, timeout_s)
        return checkpoints.read(cached)
    try:
        directory = tempfile.TemporaryDirectory(prefix="resnet_vmap_")
    except OSError as error:
        raise URLError(f"no directory to download to: {reason(error)}") from error
    with directory as path:
        _fetch(url, Path(path) / name, timeout_s)
        return checkpoints.read(Path(path) / name)


def _file_name(url: str) -> str:
    return Path(urlparse(url).path).name


def _cache(name: str) -> Path | None:
    """The path of a file in the torch.hub cache; None if the cache is not writable: the home
    directory is unknown, missing, read-only, or a file."""
    directory = Path(torch.hub.get_dir()) / "checkpoints"
    if str(directory).startswith("~"):  # expanduser found no home
        return None
    try:
        if (directory / name).exists():
            return directory / name
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError:
        return None
    return directory / name


def _fetch(url: str, target: Path, timeout_s: float) -> None:
    digits = _HASH.search(target.name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _socket_timeout(timeout_s):
            torch.hub.download_url_to_file(url, str(target), digits[1] if digits else None)
    except (URLError, TimeoutError, ConnectionError, HTTPException) as error:
        raise URLError(getattr(error, "reason", None) or str(error)) from error
    except OSError as error:
        raise InputError(
            f"{target}: cannot be written: {reason(error)}; set TORCH_HOME to a writable directory,"
            " or pass a file with --model_path"
        ) from error
    except RuntimeError as error:  # hash mismatch
        raise InputError(f"{url}: {first_line(error)}") from error


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Set the default socket timeout of the process: torch.hub sets none."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
