"""What a file is by its content, where it is not of the kind that was asked for, and what to do."""

import re
import zipfile
from pathlib import Path
from typing import Literal

HEAD_BYTES = 512  # as many as `foreign` looks at

_LFS = "a Git LFS pointer in place of the file: run git lfs pull"
_AGAIN = "(a download that failed?): download the file itself"
_UNPACK = "unpack it first"
_TEXTS = (  # after white space and a byte order mark
    (rb"version https://git-lfs", _LFS),
    (rb"<svg|<\?xml[^>]*>\s*(?:<!--.*?-->\s*)?(?:<!DOCTYPE svg[^>]*>\s*)?<svg", "an SVG drawing"),
    (rb"<\?xml", f"an XML page {_AGAIN}"),
    (rb"<", f"an HTML page {_AGAIN}"),
    (rb"\{\s*(?:[\"}]|$)|\[\s*[\[{\"\d\]]", f"a JSON text {_AGAIN}"),
)
_MAGIC = (
    (rb"\x1f\x8b", f"a gzip archive: {_UNPACK} (gunzip, or tar -xzf)"),
    (rb"BZh[1-9]1AY", f"a bzip2 archive: {_UNPACK} (bunzip2, or tar -xjf)"),
    (rb"\xfd7zXZ\x00", f"an xz archive: {_UNPACK} (unxz, or tar -xJf)"),
    (rb"\x28\xb5\x2f\xfd", f"a Zstandard archive: {_UNPACK} (unzstd)"),
    (rb"7z\xbc\xaf\x27\x1c", f"a 7z archive: {_UNPACK}"),
    (rb"Rar!\x1a\x07", f"a RAR archive: {_UNPACK}"),
    (rb".{257}ustar", f"a tar archive: {_UNPACK} (tar -xf)"),
    (rb".{4}ftyp(?:hei[cfmsx]|hev[cmsx]|mif1|msf1)", "a HEIC photograph: convert it to JPEG"),
    (rb"%PDF-|%!PS", "a PDF or PostScript document"),
    (rb"\x00{64}", f"nothing but zeros {_AGAIN}"),
)
_NUMBERS = (  # the pattern, what it is, and how it becomes a checkpoint
    (
        rb"\x89HDF\r\n\x1a\n",
        "an HDF5 file (Keras or TensorFlow)",
        "convert its weights to PyTorch and save a state dict",
    ),
    (rb"\x93NUMPY", "a numpy array", "make a state dict of tensors and save it by torch.save"),
    (
        rb"\x08[\x01-\x20][\x12\x1a\x22\x2a\x32\x3a\x42]",
        "an ONNX or TensorFlow model (a protobuf file)",
        "save the state dict of the PyTorch model that it was exported from",
    ),
    (rb".{4}TFL3", "a TensorFlow Lite model", "save a state dict of PyTorch"),
    (rb"GGUF", "a GGUF file", "save a state dict of PyTorch, not quantised"),
)
_IMAGES = (
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"\x89PNG", "PNG"),
    (rb"GIF8", "GIF"),
    (rb"RIFF.{4}WEBP", "WebP"),
    (rb"II\*\x00|MM\x00\*|II\+\x00|MM\x00\+", "TIFF"),
    (rb"BM", "BMP"),
)
_TORCH_SAVES = rb"\x80.{1,12}\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # its magic number, before torch 1.6
_WEIGHTS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".tar", ".pkl")


def foreign(head: bytes, *, wanted: Literal["checkpoint", "image"]) -> str | None:
    """What the beginning of a file shows it to be and what to do; None where it says nothing."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for pattern, found in _TEXTS:
        if re.match(pattern, text, re.DOTALL | re.IGNORECASE):
            return found
    for pattern, found in _MAGIC:
        if re.match(pattern, head, re.DOTALL):
            return found
    for pattern, found, conversion in _NUMBERS:
        if re.match(pattern, head, re.DOTALL):
            todo = conversion if wanted == "checkpoint" else "convert it to JPEG or PNG"
            return f"{found}: {todo}"
    return None


def is_text(head: bytes) -> bool:
    """Whether a file begins as a text; a pickle of torch.save in ASCII begins with its number."""
    if head.startswith(b"L119547037146038801333356L") or b"\0" in head:
        return False
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return len(head) == HEAD_BYTES and error.start > len(head) - 4  # a character cut in two
    return all(byte >= 0x20 or byte in b"\t\n\r\f" for byte in head)


def image(head: bytes) -> str | None:
    """The kind of image that a file begins as, None for any other file."""
    return next((kind for start, kind in _IMAGES if re.match(start, head, re.DOTALL)), None)


def is_safetensors(head: bytes) -> bool:
    """Whether a file begins as safetensors do: the length of a JSON header, then the header."""
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and 2 <= length <= 100_000_000  # safetensors takes no longer header


def is_other_pickle(head: bytes) -> bool:
    """Whether a file is a pickle that torch.save did not write."""
    return head[:1] == b"\x80" and not re.match(_TORCH_SAVES, head, re.DOTALL)


def archive(path: Path) -> str | None:
    """What a zip file holds that is no checkpoint of torch.save; None for a checkpoint.

    Also None for an archive that cannot be read: torch says what is wrong with it.
    """
    try:
        with zipfile.ZipFile(path) as file:
            names = [name for name in file.namelist() if not name.startswith("__MACOSX/")]
    except Exception:  # of a damaged archive zipfile raises many kinds
        return None
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner:
        return (
            "a TorchScript archive: save the weights alone,"
            " torch.save(torch.jit.load(PATH).state_dict(), OTHER)"
        )
    if "archive_format" in inner or "serialized_exported_program.json" in names:
        return (
            "a torch.export archive (.pt2): save the weights alone,"
            " torch.save(torch.export.load(PATH).state_dict, OTHER)"
        )
    if "data.pkl" in inner:
        return None
    if names and all(name.endswith(".npy") for name in names):
        return "numpy arrays (.npz): make a state dict of tensors and save it by torch.save"
    if any(name.endswith(".weights.h5") for name in names):
        return "a Keras model: convert its weights to PyTorch and save a state dict"
    held = [name for name in names if name.endswith(_WEIGHTS)] or names or ["no files"]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"a zip archive of {held[0]}{more}: {_UNPACK}"
