"""Identify files of the wrong kind by their content, with advice for the error message."""

import re
import zipfile
from pathlib import Path
from typing import Literal

HEAD_BYTES = 512  # that `identify` reads

_LFS = "a Git LFS pointer instead of the file; run git lfs pull"
_DOWNLOAD = "(failed download?); download the file itself"
_UNPACK = "unpack it first"
_TEXTS = (  # matched after a byte order mark and white space
    (rb"version https://git-lfs", _LFS),
    (rb"<svg|<\?xml[^>]*>\s*(?:<!--.*?-->\s*)?(?:<!DOCTYPE svg[^>]*>\s*)?<svg", "an SVG drawing"),
    (rb"<\?xml", f"an XML document {_DOWNLOAD}"),
    (rb"<", f"an HTML page {_DOWNLOAD}"),
    (rb'\{\s*"schema":\s*\d+,\s*"environment"', "a result file of this program"),
    (rb'\[?\s*\{\s*"(?:errors?|message|detail|code|status)"', f"a JSON document {_DOWNLOAD}"),
    (rb"\{\s*(?:[\"}]|$)|\[\s*[\[{\"\d\]]", "a JSON document"),
)
_MAGIC = (
    (rb"\x1f\x8b", f"a gzip archive; {_UNPACK} (gunzip, or tar -xzf)"),
    (rb"BZh[1-9]1AY", f"a bzip2 archive; {_UNPACK} (bunzip2, or tar -xjf)"),
    (rb"\xfd7zXZ\x00", f"an xz archive; {_UNPACK} (unxz, or tar -xJf)"),
    (rb"\x28\xb5\x2f\xfd", f"a Zstandard archive; {_UNPACK} (unzstd)"),
    (rb"7z\xbc\xaf\x27\x1c", f"a 7z archive; {_UNPACK}"),
    (rb"Rar!\x1a\x07", f"a RAR archive; {_UNPACK}"),
    (rb".{257}ustar", f"a tar archive; {_UNPACK} (tar -xf)"),
    (rb".{4}ftyp(?:hei[cfmsx]|hev[cmsx]|mif1|msf1)", "a HEIC image; convert it to JPEG"),
    (rb"%PDF-|%!PS", "a PDF or PostScript document"),
    (rb"\x00{64}", f"only zeros {_DOWNLOAD}"),
)
_ARRAYS = (  # the pattern, the kind of file, and how to convert it to a checkpoint
    (
        rb"\x89HDF\r\n\x1a\n",
        "an HDF5 file (Keras or TensorFlow)",
        "convert its weights to PyTorch and save a state dict",
    ),
    (rb"\x93NUMPY", "a numpy array", "convert it to a state dict and save it with torch.save"),
    (
        rb"\x08[\x01-\x20][\x12\x1a\x22\x2a\x32\x3a\x42]",
        "an ONNX or TensorFlow model (a protobuf file)",
        "save the state dict of the PyTorch model that it was exported from",
    ),
    (rb".{4}TFL3", "a TensorFlow Lite model", "save a PyTorch state dict"),
    (rb"GGUF", "a GGUF file", "save an unquantized PyTorch state dict"),
)
_IMAGES = (
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"\x89PNG", "PNG"),
    (rb"GIF8", "GIF"),
    (rb"RIFF.{4}WEBP", "WebP"),
    (rb"II\*\x00|MM\x00\*|II\+\x00|MM\x00\+", "TIFF"),
    (rb"BM", "BMP"),
)
_LEGACY_MAGIC = rb"\x80.{1,12}\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # of torch.save before torch 1.6
_WEIGHTS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".tar", ".pkl")


def identify(head: bytes, *, wanted: Literal["checkpoint", "image"]) -> str | None:
    """The kind of file that begins with `head`, with advice; None if it is not recognized."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for pattern, found in _TEXTS:
        if re.match(pattern, text, re.DOTALL | re.IGNORECASE):
            return found
    for pattern, found in _MAGIC:
        if re.match(pattern, head, re.DOTALL):
            return found
    for pattern, found, conversion in _ARRAYS:
        if re.match(pattern, head, re.DOTALL):
            advice = conversion if wanted == "checkpoint" else "convert it to JPEG or PNG"
            return f"{found}; {advice}"
    return None


def is_text(head: bytes) -> bool:
    """Whether `head` is text; false for an ASCII pickle of torch.save, by its magic number."""
    if head.startswith(b"L119547037146038801333356L") or b"\0" in head:
        return False
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return len(head) == HEAD_BYTES and error.start > len(head) - 4  # a split character
    return all(byte >= 0x20 or byte in b"\t\n\r\f" for byte in head)


def image(head: bytes) -> str | None:
    """The image format of a file that begins with `head`; None for any other file."""
    return next((kind for start, kind in _IMAGES if re.match(start, head, re.DOTALL)), None)


def is_safetensors(head: bytes) -> bool:
    """Whether `head` begins a safetensors file: the length of a JSON header, then the header."""
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and 2 <= length <= 100_000_000  # the limit of safetensors


def is_other_pickle(head: bytes) -> bool:
    """Whether a file is a pickle not written by torch.save."""
    return head[:1] == b"\x80" and not re.match(_LEGACY_MAGIC, head, re.DOTALL)


def identify_archive(path: Path) -> str | None:
    """The kind of a zip file that is not a checkpoint, with advice; None for a checkpoint.

    Also None for a corrupted archive, which torch.load reports.
    """
    try:
        with zipfile.ZipFile(path) as file:
            names = [name for name in file.namelist() if not name.startswith("__MACOSX/")]
    except Exception:  # zipfile raises various types for corrupted archives
        return None
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner:
        return (
            "a TorchScript archive; save only its weights,"
            " torch.save(torch.jit.load(PATH).state_dict(), OTHER)"
        )
    if "archive_format" in inner or "serialized_exported_program.json" in names:
        return (
            "a torch.export archive (.pt2); save only its weights,"
            " torch.save(torch.export.load(PATH).state_dict, OTHER)"
        )
    if "data.pkl" in inner:
        return None
    if names and all(name.endswith(".npy") for name in names):
        return "numpy arrays (.npz); convert them to a state dict and save it with torch.save"
    if any(name.endswith(".weights.h5") for name in names):
        return "a Keras model; convert its weights to PyTorch and save a state dict"
    content = [name for name in names if name.endswith(_WEIGHTS)] or names or ["no files"]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"a zip archive of {content[0]}{more}; {_UNPACK}"
