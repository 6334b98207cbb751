"""Read the state dict of a checkpoint file, whose format is detected by content, not by name."""

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

# Keys under which training scripts save the weights, most likely first. Any other key is accepted
# if it is the only one with weights.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "model_state", "module", "net")
_MAX_NESTING = 8
_LEGACY_NAMES = (  # in torchvision's published files
    (re.compile(r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)"), r"\1\2"),  # DenseNet
    (re.compile(r"\.mlp\.linear_1\."), ".mlp.0."),  # VisionTransformer
    (re.compile(r"\.mlp\.linear_2\."), ".mlp.3."),
)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# In a folder, most likely first; the index of a sharded checkpoint before the shards.
_IN_FOLDERS = ("*.index.json", "*.safetensors", "*.bin", "*.pth", "*.pt", "*.ckpt")
_DISTRIBUTED = re.compile(r"__\d+_\d+\.distcp")  # rank, number of the file
_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})(\.\w+)")  # Hugging Face's naming


def read(path: str | os.PathLike[str]) -> State:
    """The state dict of a checkpoint file, unwrapped, on the CPU.

    Supports files of torch.save, safetensors, and the index of a sharded checkpoint, under any
    file name. Code in pickles is not executed (`weights_only=True`).

    Raises:
        InputError: the file does not exist, is not readable, or is not a checkpoint.
    """
    path = Path(path)
    _check_is_whole(path)
    if shard := _SHARD.fullmatch(path.name):
        index = path.with_name(f"{shard[1]}{shard[3]}.index.json")
        if os.path.exists(index):  # Path.exists raises if the name is too long
            raise InputError(
                f"{path}: expected a complete checkpoint, got one of its {int(shard[2])} shards;"
                f" pass the index instead: {index}"
            )
    shards = _shards(path)
    content = _read_file(path) if shards is None else _read_shards(path, shards)
    return _validated(_unwrap(content, path), path)


def _check_is_whole(path: Path) -> None:
    """Raise InputError for a folder with a checkpoint in it, or a file of a distributed one."""
    is_folder = os.path.isdir(path)
    folder = path if is_folder else path.parent
    is_part = os.path.isfile(path) and (
        _DISTRIBUTED.fullmatch(path.name) or path.name == ".metadata"
    )
    if is_part or (is_folder and os.path.isfile(folder / ".metadata")):
        what = "the folder" if is_folder else "one file"
        raise InputError(
            f"{path}: expected a checkpoint file, got {what} of a torch.distributed.checkpoint;"
            " convert it with torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
            f"({str(folder)!r}, OTHER)"
        )
    if is_folder:
        inside = [file for pattern in _IN_FOLDERS for file in sorted(folder.glob(pattern))]
        if inside:
            message = f"{path}: expected a checkpoint file, got a directory"
            raise InputError(f"{message}; pass {inside[0]} instead")


def _read_file(path: Path) -> object:
    head = files.first_bytes(path, kind="a checkpoint file", count=file_formats.HEAD_BYTES)
    if file_formats.is_safetensors(head):
        return _read_safetensors(path)
    found = file_formats.identify(head, wanted="checkpoint")
    if found is None and (kind := file_formats.image(head)):
        found = f"a {kind} image"
    if found is None and head.startswith(b"PK"):
        found = file_formats.identify_archive(path)
    if found is None and file_formats.is_other_pickle(head):
        found = "a pickle not written by torch.save; load it and save its tensors with torch.save"
    if found is None and file_formats.is_text(head):
        found = "a text file"
    if found is not None:
        raise InputError(f"{path}: expected a checkpoint file, got {found}")
    if path.suffix == ".safetensors" and not head.startswith((b"PK", b"\x80")):
        raise InputError(
            f"{path}: expected a safetensors file, got a truncated or corrupted file"
            " (or an unknown format); download or copy it again"
        )
    return pickles.read(path)


def _read_safetensors(path: Path) -> object:
    try:
        return load_file(path)
    except Exception as error:  # SafetensorError, or an error of torch about dtype or shape
        raise InputError(
            f"{path}: expected a safetensors file, got a truncated or corrupted file"
            f" ({first_line(error)}); download or copy it again"
        ) from error


def _shards(path: Path) -> dict[str, str] | None:
    """Tensor name -> file name, from a Hugging Face index; None if the file is not an index."""
    head = files.first_bytes(path, kind="a checkpoint file", count=file_formats.HEAD_BYTES)
    if not head.removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(b"{"):
        return None
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not shards:
        return None
    for file in shards.values():
        if not isinstance(file, str) or Path(file).name != file or not file:
            message = f"{path}: expected names of files in the same directory, got {file!r}"
            raise InputError(message)
    return shards


def _read_shards(index: Path, shards: dict[str, str]) -> dict[object, object]:
    """The merged state dict of the shards of an index."""
    state: dict[object, object] = {}
    for file in sorted(set(shards.values())):
        path = index.parent / file
        shard = _unwrap(_read_file(path), path)
        for name in (name for name, where in shards.items() if where == file):
            if name not in shard:
                raise InputError(f"{path}: expected a shard with {name}, as in {index.name}")
            state[name] = shard[name]
    return state


def _unwrap(content: object, path: Path) -> dict[object, object]:
    """The dict that contains the weights: `content`, or one nested in it."""
    for _ in range(_MAX_NESTING):
        if not isinstance(content, dict) or _is_state(content):
            break
        known = [key for key in _WRAPPERS if isinstance(content.get(key), dict)]
        keys = [key for key in known if _holds_weights(content[key])]
        if not keys:
            keys = [key for key, value in content.items() if _is_state(value)]
            if len(keys) > 1:
                found = f"{formatting.count(len(keys), 'state dict')} ({', '.join(map(str, keys))})"
                message = f"{path}: expected one state dict, got {found}; save only one of them"
                raise InputError(message)
        keys = keys or known
        if not keys:
            break
        content = content[keys[0]]
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a state dict, got {type(content).__name__}")
    if not content:
        raise InputError(f"{path}: expected a state dict, got an empty one")
    return content


def _is_state(content: object) -> bool:
    """Whether it is a dict of tensors that includes weights, unlike the states of generators."""
    return (
        isinstance(content, dict)
        and all(isinstance(value, Tensor) for value in content.values())
        and any(value.is_floating_point() and value.dim() for value in content.values())
    )


def _holds_weights(content: object, depth: int = _MAX_NESTING) -> bool:
    if not isinstance(content, dict) or not depth:
        return False
    values = content.values()
    return any(isinstance(value, Tensor) or _holds_weights(value, depth - 1) for value in values)


def _validated(content: dict[object, object], path: Path) -> State:
    state: State = {}
    for name, value in content.items():
        values = value if isinstance(value, tuple) else (value,)
        if any(isinstance(part, Tensor) and part.is_quantized for part in values):
            raise InputError(
                f"{path}: expected a state dict of floating-point tensors, got a quantized one"
                f" ({name}); save the state dict of the unquantized model"
            )
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            found = f"{type(value).__name__} for key {name!r}"
            raise InputError(f"{path}: expected a state dict of tensors, got {found}")
        if value.layout != torch.strided or value.is_meta:
            found = f"{value.layout} on {value.device}"
            raise InputError(f"{path}: expected {name} to be a dense tensor, got {found}")
        state[_current_name(name)] = value
    return state


def _current_name(name: str) -> str:
    for pattern, replacement in _LEGACY_NAMES:
        name = pattern.sub(replacement, name)
    return name
