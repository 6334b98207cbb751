"""torchvision's published ImageNet weights: their address, their file name, their download."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from urllib.error import URLError
from urllib.parse import urlparse

import torch
import torchvision

from ensemble.errors import InputError
from ensemble.weights import State, first_line, read_checkpoint

DOWNLOAD_TIMEOUT_S = 10.0


def published_url(arch: str) -> str:
    """The address of torchvision's ImageNet weights for `arch`; it ends in the file's name."""
    enum = torchvision.models.get_model_weights(arch)
    return getattr(enum, "IMAGENET1K_V1", enum.DEFAULT).url


def published_name(arch: str) -> str:
    """The file name of torchvision's ImageNet weights for `arch`, `resnet18-f37072fd.pth` say."""
    return Path(urlparse(published_url(arch)).path).name


def download(arch: str) -> State:
    """torchvision's ImageNet weights for `arch`, from its cache or its server, the hash checked.

    Raises:
        URLError: the server cannot be reached within `DOWNLOAD_TIMEOUT_S`, or does not have it.
        InputError: what came, or what lies in the cache, is not the file that was expected.
    """
    url = published_url(arch)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / published_name(arch)
    try:
        with _socket_timeout(DOWNLOAD_TIMEOUT_S):
            torch.hub.load_state_dict_from_url(
                url, map_location="cpu", progress=True, check_hash=True, weights_only=True
            )
    except (URLError, TimeoutError, ConnectionError) as error:
        raise URLError(getattr(error, "reason", None) or str(error)) from error
    except OSError as error:
        raise InputError(f"{cached}: cannot be written: {error.strerror or error}") from error
    except (RuntimeError, UnpicklingError, EOFError) as error:
        if not cached.exists():
            raise InputError(f"{url}: {first_line(error)}") from error
    return read_checkpoint(cached)


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """torch.hub opens its addresses without a timeout of its own, so set the process's default."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
