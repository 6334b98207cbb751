"""A checkpoint file -> the plain state dict in it, by what the file holds, not by its name."""

import json
import os
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ensemble import files, formatting
from ensemble.errors import InputError, first_line
from ensemble.models import file_formats, pickles

State = dict[str, Tensor]

# Where training scripts keep the weights, the likeliest first; other keys where only one has them.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "model_state", "module", "net")
_MOST_WRAPPERS = 8
_OLD_NAMES = (  # torchvision's published files keep the names of their day
    (re.compile(r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)"), r"\1\2"),  # DenseNet
    (re.compile(r"\.mlp\.linear_1\."), ".mlp.0."),  # VisionTransformer
    (re.compile(r"\.mlp\.linear_2\."), ".mlp.3."),
)
_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})(\.\w+)")  # as Hugging Face numbers them


def read(path: str | os.PathLike[str]) -> State:
    """The plain state dict in a checkpoint file, unwrapped, on the CPU.

    A file of torch.save, safetensors under any name, or the index of files that hold a part each.
    Nothing that a pickle asks for is executed (`weights_only=True`).

    Raises:
        InputError: not there, not readable, not a checkpoint.
    """
    path = Path(path)
    if shard := _SHARD.fullmatch(path.name):
        index = path.with_name(f"{shard[1]}{shard[3]}.index.json")
        if os.path.exists(index):  # Path.exists raises for a name that is too long
            raise InputError(
                f"{path}: expected a whole checkpoint, found one of its {int(shard[2])} parts:"
                f" give their index, {index}"
            )
    parts = _parts(path)
    content = _read_file(path) if parts is None else _joined(path, parts)
    return _checked(_unwrap(content, path), path)


def _read_file(path: Path) -> object:
    head = files.first_bytes(path, kind="a checkpoint file", count=file_formats.HEAD_BYTES)
    if file_formats.is_safetensors(head):
        return _read_safetensors(path)
    found = file_formats.foreign(head, wanted="checkpoint")
    if found is None and (kind := file_formats.image(head)):
        found = f"a {kind} image"
    if found is None and head.startswith(b"PK"):
        found = file_formats.archive(path)
    if found is None and file_formats.is_other_pickle(head):
        found = (
            "a pickle that torch.save did not write: load it, and save its tensors by torch.save"
        )
    if found is None and file_formats.is_text(head):
        found = "a text file"
    if found is not None:
        raise InputError(f"{path}: expected a checkpoint file, found {found}")
    if path.suffix == ".safetensors" and not head.startswith((b"PK", b"\x80")):
        raise InputError(
            f"{path}: expected a safetensors file, found a truncated or damaged file,"
            " or another format: download or copy it again"
        )
    return pickles.read(path)


def _read_safetensors(path: Path) -> object:
    try:
        return load_file(path)
    except Exception as error:  # its own, and what torch raises of a dtype or shape
        raise InputError(
            f"{path}: expected a safetensors file, found a truncated or damaged file"
            f" ({first_line(error)}): download or copy it again"
        ) from error


def _parts(path: Path) -> dict[str, str] | None:
    """Tensor -> file of an index as Hugging Face writes it; None where the file is no index."""
    head = files.first_bytes(path, kind="a checkpoint file", count=file_formats.HEAD_BYTES)
    if not head.lstrip().startswith(b"{"):
        return None
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    parts = content.get("weight_map")
    if not isinstance(parts, dict) or not parts:
        return None
    for file in parts.values():
        if not isinstance(file, str) or Path(file).name != file or not file:
            raise InputError(f"{path}: expected the names of files beside it, found {file!r}")
    return parts


def _joined(index: Path, parts: dict[str, str]) -> dict[object, object]:
    """The state dict whose tensors lie in the files that an index names."""
    state: dict[object, object] = {}
    for file in sorted(set(parts.values())):
        part = index.parent / file
        held = _unwrap(_read_file(part), part)
        for name in (name for name, where in parts.items() if where == file):
            if name not in held:
                raise InputError(f"{part}: expected {name}, as {index.name} says, found none")
            state[name] = held[name]
    return state


def _unwrap(content: object, path: Path) -> dict[object, object]:
    """The dict that has the weights: `content`, or the one within it."""
    for _ in range(_MOST_WRAPPERS):
        if not isinstance(content, dict) or _is_state(content):
            break
        known = [key for key in _WRAPPERS if isinstance(content.get(key), dict)]
        keys = [key for key in known if _holds_weights(content[key])]
        if not keys:
            keys = [key for key, value in content.items() if _is_state(value)]
            if len(keys) > 1:
                found = f"{formatting.count(len(keys), 'state dict')} ({', '.join(map(str, keys))})"
                message = f"{path}: expected one state dict, found {found}: save the one alone"
                raise InputError(message)
        keys = keys or known
        if not keys:
            break
        content = content[keys[0]]
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a state dict, found a {type(content).__name__}")
    if not content:
        raise InputError(f"{path}: expected a state dict, found an empty one")
    return content


def _is_state(content: object) -> bool:
    """Whether it is tensors by name, weights among them: the state of a generator is none."""
    return (
        isinstance(content, dict)
        and all(isinstance(value, Tensor) for value in content.values())
        and any(value.is_floating_point() and value.dim() for value in content.values())
    )


def _holds_weights(content: object, depth: int = _MOST_WRAPPERS) -> bool:
    if not isinstance(content, dict) or not depth:
        return False
    values = content.values()
    return any(isinstance(value, Tensor) or _holds_weights(value, depth - 1) for value in values)


def _checked(content: dict[object, object], path: Path) -> State:
    state: State = {}
    for name, value in content.items():
        values = value if isinstance(value, tuple) else (value,)
        if any(isinstance(part, Tensor) and part.is_quantized for part in values):
            raise InputError(
                f"{path}: expected a state dict of floating tensors, found a quantised one"
                f" ({name}): save the model's before it is quantised"
            )
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            found = f"a {type(value).__name__} under {name!r}"
            raise InputError(f"{path}: expected a state dict of tensors, found {found}")
        if value.layout != torch.strided or value.is_meta:
            found = f"{value.layout} on {value.device}"
            raise InputError(f"{path}: expected {name} to be a dense tensor, found {found}")
        state[_current_name(name)] = value
    return state


def _current_name(name: str) -> str:
    for pattern, replacement in _OLD_NAMES:
        name = pattern.sub(replacement, name)
    return name
