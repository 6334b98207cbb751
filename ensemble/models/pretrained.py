"""torchvision's published ImageNet weights: their address, their file name, their download."""

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
_HASH = re.compile(r"-([0-9a-f]{8,})\.")  # in file names, the beginning of the content's SHA-256


def published_url(arch: str) -> str:
    """The address of torchvision's ImageNet weights for `arch`; it ends in the file's name."""
    enum = torchvision.models.get_model_weights(arch)
    return str(getattr(enum, "IMAGENET1K_V1", enum.DEFAULT).url)


def published_name(arch: str) -> str:
    """The file name of torchvision's ImageNet weights for `arch`, `resnet18-f37072fd.pth` say."""
    return Path(urlparse(published_url(arch)).path).name


def download(arch: str) -> State:
    """torchvision's ImageNet weights for `arch`, from its cache or its server, the hash checked.

    Raises:
        URLError: the server cannot be reached within `DOWNLOAD_TIMEOUT_S`, or does not have it.
        InputError: what came, or what lies in the cache, is not the file that was expected.
    """
    url, name = published_url(arch), published_name(arch)
    cached = _cache(name)
    if cached is not None:
        if not cached.exists():
            _fetch(url, cached)
        return checkpoints.read(cached)
    try:
        folder = tempfile.TemporaryDirectory(prefix="resnet_vmap_")
    except OSError as error:
        raise URLError(f"no folder to download to: {reason(error)}") from error
    with folder as path:
        _fetch(url, Path(path) / name)
        return checkpoints.read(Path(path) / name)


def _cache(name: str) -> Path | None:
    """Where torch.hub keeps a file of this name; None where it cannot keep any: a home that is a
    file, is missing or cannot be written, or that nobody knows of."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if str(folder).startswith("~"):  # expanduser found no home
        return None
    try:
        if (folder / name).exists():
            return folder / name
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return None
    return folder / name


def _fetch(url: str, target: Path) -> None:
    digits = _HASH.search(target.name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _socket_timeout(DOWNLOAD_TIMEOUT_S):
            torch.hub.download_url_to_file(url, str(target), digits[1] if digits else None)
    except (URLError, TimeoutError, ConnectionError, HTTPException) as error:
        raise URLError(getattr(error, "reason", None) or str(error)) from error
    except OSError as error:
        raise InputError(
            f"{target}: cannot be written: {reason(error)}; set TORCH_HOME to a folder that can,"
            " or name a file by --model_path"
        ) from error
    except RuntimeError as error:  # another hash
        raise InputError(f"{url}: {first_line(error)}") from error


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """torch.hub opens its addresses without a timeout of its own, so set the process's default."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
