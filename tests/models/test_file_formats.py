"""Files of other formats in place of a checkpoint: each is identified, with advice."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import re
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ensemble.errors import InputError
from ensemble.models import checkpoints

STATE = {"a": torch.arange(3.0)}


def checkpoint() -> bytes:
    buffer = io.BytesIO()
    torch.save(STATE, buffer)
    return buffer.getvalue()


def zipped(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer, content = io.BytesIO(), checkpoint()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        member = tarfile.TarInfo("best.pth")
        member.size = len(content)
        file.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def arrays() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(3))
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"3a" * 32 + b"\nsize 46827520\n"
OTHER_FORMATS = {
    "lfs": (LFS, "a Git LFS pointer instead of the file; run git lfs pull"),
    "html": (b"\n <!DOCTYPE html><html>404</html>", "an HTML page .*; download the file itself"),
    "html-bom": (b"\xef\xbb\xbf<html>", "an HTML page"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML document"),
    "json": (b'{"error": "Repository not found"}', "a JSON document .*; download the file itself"),
    "json-bom": (b'\xef\xbb\xbf{"message": "404"}', "a JSON document .*; download the file itself"),
    "json-config": (b'{\n  "architectures": ["ResNet"]\n}', "a JSON document$"),
    "result": (
        b'{\n "schema": 3,\n "environment": {\n  "date": "2026"}}',
        "a result file of this program$",
    ),
    "json-list": (b'[{"error": 404}]', "a JSON document"),
    "gzip": (gzip.compress(checkpoint()), r"a gzip archive; unpack it first \(gunzip"),
    "bzip2": (bz2.compress(checkpoint()), "a bzip2 archive; unpack it first"),
    "xz": (lzma.compress(checkpoint()), "an xz archive; unpack it first"),
    "tar": (tarred(), "a tar archive; unpack it first"),
    "zip": (zipped(**{"best.pth": checkpoint()}), r"a zip archive of best.pth; unpack it first"),
    "zip-of-more": (
        zipped(**{"a.txt": b"", "best.pth": checkpoint(), "__MACOSX/best.pth": b""}),
        "a zip archive of best.pth and 1 more",
    ),
    "zip-of-none": (zipped(), "a zip archive of no files"),
    "npz": (arrays(), r"numpy arrays \(.npz\); convert them to a state dict"),
    "npy": (b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}", "a numpy array; convert it to a state dict"),
    "keras": (zipped(**{"model.weights.h5": b"", "config.json": b""}), "a Keras model; convert"),
    "h5": (b"\x89HDF\r\n\x1a\n" + bytes(99), r"an HDF5 file \(Keras or TensorFlow\); convert"),
    "onnx": (b"\x08\x08\x12\x07pytorch\x1a\x052.5.0:\xa2\x04", "an ONNX or TensorFlow model"),
    "tflite": (b"\x1c\0\0\0TFL3" + bytes(99), "a TensorFlow Lite model"),
    "gguf": (b"GGUF\3\0\0\0" + bytes(99), "a GGUF file"),
    "image": (b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(99), "a JPEG image"),
    "zeros": (bytes(4096), r"only zeros \(failed download\?\)"),
    "pickle": (pickle.dumps(STATE), "a pickle not written by torch.save"),
    "pickle-2": (pickle.dumps(STATE, protocol=2), "a pickle not written by torch.save"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin", ""])
@pytest.mark.parametrize("what", OTHER_FORMATS)
def test_other_formats_are_identified_under_any_name(
    tmp_path: Path, what: str, suffix: str
) -> None:
    content, found = OTHER_FORMATS[what]
    path = tmp_path / f"checkpoint{suffix}"
    path.write_bytes(content)
    assert_found(path, found)


def assert_found(path: Path, found: str) -> None:
    message = re.escape(f"{path}: expected a checkpoint file, got ") + found
    with pytest.raises(InputError, match="^" + message) as caught:
        checkpoints.read(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_archive_is_identified(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated
        torch.jit.save(torch.jit.trace(nn.Linear(1, 1), torch.ones(1)), path)
    assert_found(path, r"a TorchScript archive; .*torch\.jit\.load")


def test_a_torch_export_archive_is_identified(tmp_path: Path) -> None:
    content = zipped(**{"model/archive_format": b"pt2", "model/models/model.json": b"{}"})
    (tmp_path / "model.pt2").write_bytes(content)
    assert_found(tmp_path / "model.pt2", r"a torch.export archive \(\.pt2\); .*torch\.export\.load")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_torch_export_archive_of_the_installed_torch_is_identified(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(nn.Linear(1, 1), (torch.ones(1),)), path)
    assert_found(path, "a torch.export archive")


def test_an_onnx_file_is_identified(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "g", [], [])
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph), path)
    assert_found(path, "an ONNX or TensorFlow model")


def test_an_empty_file_is_reported_with_a_likely_cause(tmp_path: Path) -> None:
    (tmp_path / "empty.pth").touch()
    assert_found(tmp_path / "empty.pth", r"an empty file \(failed download or copy\?\)")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_truncated_torch_save_file_is_reported_with_advice_to_download_again(
    tmp_path: Path, kept: float
) -> None:
    path, content = tmp_path / "cut.pth", checkpoint()
    path.write_bytes(content[: int(kept * len(content))])
    message = r"expected a checkpoint, got a truncated or corrupted file .*; download or copy it"
    with pytest.raises(InputError, match=re.escape(f"{path}: ") + message):
        checkpoints.read(path)


@pytest.mark.parametrize("content", [json.dumps({"a": 1}), "{}", "[1, 2]", "{\n"])
def test_json_is_identified_by_its_first_bytes(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.pth").write_text(content)
    assert_found(tmp_path / "model.pth", "a JSON document")
