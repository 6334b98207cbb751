"""Read files of torch.save: tensors and plain data only, no code is executed.

Training scripts save options, history and metrics along with the weights. These are not needed, so
the allow list maps each type of plain data to a placeholder class that accepts any arguments and
discards them. No name on the allow list resolves to the code of that type.
"""

import re
import sys
import warnings
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ensemble.errors import InputError, first_line
from ensemble.models import plain_data

Allowed = Callable[..., Any] | tuple[Callable[..., Any], str]

_REJECTED = re.compile(r"nsupported (?:global: )?GLOBAL ([\w.]+) w")  # messages of torch.load
_OPCODE = re.compile(r"Unsupported operand (\d+)")
_LATER_OPCODES = {66, 67, *range(138, 152)}  # of pickle protocols 3 to 5
_SAVE_WEIGHTS = "save only the weights, torch.save(model.state_dict(), PATH)"


class _Object:
    """Placeholder for a data type: accepts any arguments and discards them."""

    def __new__(cls, *args: object) -> "_Object":
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        """Discard the arguments."""

    def __setstate__(self, state: object) -> None:
        """Discard the state."""


class _List:
    """Placeholder for a type that the pickle appends to: constructs a list."""

    def __new__(cls, *args: object) -> list[object]:  # type: ignore[misc]
        return []


class _Dict:
    """Placeholder for a dict subclass: constructs an OrderedDict."""

    def __new__(cls, *args: object) -> OrderedDict[object, object]:  # type: ignore[misc]
        return OrderedDict()


def _placeholder(base: type, name: str) -> Allowed:
    """An entry of `torch.serialization.safe_globals`: a class to use for the global `name`."""
    last = name.rpartition(".")[2]
    return type(plain_data.DISPLAY_NAMES.get(last, last), (base,), {}), name


_ALLOW_LIST = [
    *(_placeholder(_List, name) for name in plain_data.LIST_TYPES),
    *(_placeholder(_Dict, name) for name in plain_data.DICT_TYPES),
    *(_placeholder(_Object, name) for name in plain_data.OBJECT_TYPES),
]


def read(path: Path) -> object:
    """The content of a file of torch.save, on the CPU, with placeholders for plain data.

    Raises:
        InputError: the file is corrupted or of another format, or its pickle references globals
            that are not on the allow list.
    """
    try:
        return _load(path)
    except UnpicklingError as error:
        found = _diagnosis(str(error))
        raise InputError(f"{path}: expected a state dict of tensors, got {found}") from error
    except Exception as error:  # the readers in torch.load raise various types
        reason = first_line(error).partition(". ")[0]  # without torch's advice
        raise InputError(
            f"{path}: expected a checkpoint, got a truncated or corrupted file"
            f" ({reason}); download or copy it again"
        ) from error


def _load(path: Path) -> object:
    """torch.load, retried with each plain data type that it rejects added to the allow list."""
    allowed, names = [*_ALLOW_LIST], set[str]()
    while True:
        try:
            with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
                warnings.simplefilter("ignore")  # of torch.load, before it rejects an archive
                with path.open("rb") as file:  # given a path, torch dispatches on its suffix
                    return torch.load(file, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            rejected = _REJECTED.search(str(error))
            if not rejected or rejected[1] in names or not _is_plain_data(rejected[1]):
                raise
            names.add(rejected[1])
            allowed.append(_placeholder(_Object, rejected[1]))


def _is_plain_data(name: str) -> bool:
    """Whether `name` is a data class, enum or the like of an already imported module."""
    module, _, attribute = name.rpartition(".")
    found = vars(sys.modules[module]).get(attribute) if module in sys.modules else None
    if not isinstance(found, type):
        return False
    is_named_tuple = issubclass(found, tuple) and (
        hasattr(found, "_fields") or hasattr(found, "n_fields")
    )
    return issubclass(found, Enum | Namespace) or is_dataclass(found) or is_named_tuple


def _diagnosis(message: str) -> str:
    """The kind of file, and advice, by the message of torch.load."""
    rejected = _REJECTED.search(message)
    if rejected or "unrecognized function" in message or "Can only" in message:
        reference = rejected[1] if rejected else "a function call"
        return (
            f"a pickle that references {reference} (a whole module, a class of the training script,"
            f" or code to execute); in the script that wrote it, {_SAVE_WEIGHTS}"
        )
    opcode = _OPCODE.search(message)
    if opcode and int(opcode[1]) in _LATER_OPCODES:
        return (
            "a pickle of protocol 3 or later, which torch.load(weights_only=True) does not"
            " support; save it without pickle_protocol"
        )
    return "an unknown format or a corrupted file; download or copy it again"
