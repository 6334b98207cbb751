"""A file of JSON and tensors, which are mapped into memory when it is read.

    magic (8 bytes), format version, length and CRC-32 of the header (4 bytes each, little endian)
    header: UTF-8 JSON, {"content": ..., "tensors": [{dtype, shape, stride, offset, bytes, crc32}]}
    zeros up to a multiple of 4096, then the tensors, each at a multiple of 64

Nothing in it is code. safetensors, which is alike, aligns tensors to 8 bytes, keeps no strides, and
has no checksums.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ensemble import files
from ensemble.artifacts.formats import SAVED_MAGIC
from ensemble.errors import InputError, first_line

MAGIC, VERSION = SAVED_MAGIC, 1
_PREFIX = struct.Struct("<8sIII")
_PAGE, _ALIGNMENT = 4096, 64
_KIND = "a file that ensemble.save wrote"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool),
        *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8),
    )
}


def write(path: Path, content: Any, tensors: Sequence[Tensor]) -> int:
    """Write JSON and dense tensors; an existing file is replaced when all is written.

    Returns the size in bytes.

    Raises:
        OSError: it cannot be written.
        ValueError: a dtype that the format does not have.
    """
    entries, blobs, offset = list[dict[str, Any]](), list[memoryview](), 0
    for tensor in tensors:
        blob = _bytes_of(tensor)
        entries.append(
            {
                "dtype": _dtype_name(tensor.dtype),
                "shape": list(tensor.shape),
                "stride": list(_dense_strides(tensor)),
                "offset": offset,
                "bytes": blob.nbytes,
                "crc32": zlib.crc32(blob),
            }
        )
        blobs.append(blob)
        offset += -(-blob.nbytes // _ALIGNMENT) * _ALIGNMENT
    header = json.dumps({"content": content, "tensors": entries}).encode()
    begin = -(-(_PREFIX.size + len(header)) // _PAGE) * _PAGE
    with files.replacing(path) as file:
        file.write(_PREFIX.pack(MAGIC, VERSION, len(header), zlib.crc32(header)))
        file.write(header)
        for entry, blob in zip(entries, blobs, strict=True):
            file.seek(begin + entry["offset"])
            file.write(blob)
        file.truncate(begin + offset)
    return begin + offset


@dataclass(frozen=True)
class Content:
    """What a file holds. The tensors are private copy-on-write maps of it: writing to one changes
    memory of this process only."""

    content: Any
    tensors: list[Tensor]


def read(path: str | os.PathLike[str]) -> Content:
    """Read a file that `write` wrote, and check it against its checksums.

    Raises:
        InputError: it is another file, damaged, or of another version of the format.
    """
    path = Path(path)
    prefix = files.first_bytes(path, kind=_KIND, count=_PREFIX.size)
    if not prefix.startswith(MAGIC) or len(prefix) < _PREFIX.size:
        raise InputError(f"{path}: expected {_KIND}, got another kind of file")
    _, version, length, checksum = _PREFIX.unpack(prefix)
    if version != VERSION:
        message = f"expected version {VERSION} of the format, got {version}; save it again"
        raise InputError(f"{path}: {message}")
    try:
        with path.open("rb") as file:
            file.seek(_PREFIX.size)
            header = file.read(length)
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be mapped into memory: {first_line(error)}") from error
    if zlib.crc32(header) != checksum:
        raise _damaged(path, "its header")
    try:
        return _parsed(path, json.loads(header), memory, length)
    except InputError:
        raise
    except Exception as error:  # made by another program
        raise _damaged(path, f"{type(error).__name__} in its header") from error


def _parsed(path: Path, parsed: Any, memory: mmap.mmap, length: int) -> Content:
    begin = -(-(_PREFIX.size + length) // _PAGE) * _PAGE
    entries = parsed["tensors"]
    end = begin + max((entry["offset"] + entry["bytes"] for entry in entries), default=0)
    if end > len(memory):
        raise _damaged(path, f"{len(memory)} bytes of {end}")
    view = memoryview(memory)

    def is_intact(entry: dict[str, Any]) -> bool:
        first = begin + entry["offset"]
        checksum: int = entry["crc32"]
        return zlib.crc32(view[first : first + entry["bytes"]]) == checksum

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # crc32 releases the GIL
        for index, intact in enumerate(pool.map(is_intact, entries)):
            if not intact:
                raise _damaged(path, f"tensor {index}")
    return Content(parsed["content"], [_mapped(memory, begin, entry) for entry in entries])


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path}: expected an intact file, but it is damaged: {what}; save it again")


def _mapped(memory: mmap.mmap, begin: int, entry: dict[str, Any]) -> Tensor:
    dtype, shape, strides = _DTYPES[entry["dtype"]], entry["shape"], entry["stride"]
    count = entry["bytes"] // dtype.itemsize
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if (
        min((0, entry["offset"], *shape, *strides)) < 0
        or prod(shape) != count
        or last >= max(count, 1)
    ):
        raise ValueError("a tensor that is larger than its bytes")
    if not count:
        return torch.empty(shape, dtype=dtype, device="cpu")
    flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=begin + entry["offset"])
    return flat.as_strided(shape, strides)


def _dtype_name(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"tensors of {dtype} cannot be saved")
    return name


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Its own strides if it is dense in some order of its dimensions, such as channels-last; else
    those of a contiguous tensor."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return tensor.new_empty(tensor.shape, device="meta").stride()
        expected *= size
    return tensor.stride()


def _bytes_of(tensor: Tensor) -> memoryview:
    """Its values in the order of `_dense_strides`."""
    tensor = tensor.detach().cpu()
    strides = _dense_strides(tensor)
    if strides != tensor.stride():
        tensor = tensor.contiguous()
    flat = tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    if not len(flat):
        return memoryview(b"")
    values: Any = flat.view(torch.uint8).numpy()
    return memoryview(values)
