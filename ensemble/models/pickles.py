"""Files of torch.save: tensors and plain data, nothing that a pickle asks for is executed.

Training scripts save more than weights: their options, the history, the best accuracy so far. None
of it is wanted here, so a type of plain data is not allowed itself: in its place the pickle gets a
class that takes whatever it is given and keeps nothing. No allowed name leads to code of its own.
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

_REFUSED = re.compile(r"nsupported (?:global: )?GLOBAL ([\w.]+) w")  # torch.load's words
_OPERAND = re.compile(r"Unsupported operand (\d+)")
_LATER_OPERANDS = {66, 67, *range(138, 152)}  # of pickle's protocols 3 to 5; torch reads 2
_SAVE_WEIGHTS = "save the weights alone, torch.save(model.state_dict(), PATH)"


class _Inert:
    """Stands in for a type of plain data: takes what the pickle gives it and keeps nothing."""

    def __new__(cls, *args: object) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        """Whatever it is given, it is dropped."""

    def __setstate__(self, state: object) -> None:
        """Whatever it is given, it is dropped."""


class _List:
    """Stands in for what the pickle appends to: it gets a list."""

    def __new__(cls, *args: object) -> list[object]:  # type: ignore[misc]
        return []


class _Dict:
    """Stands in for a dict with more to it: what the pickle gets and fills is an OrderedDict."""

    def __new__(cls, *args: object) -> OrderedDict[object, object]:  # type: ignore[misc]
        return OrderedDict()


def _stand_in(base: type, name: str) -> Allowed:
    """What `torch.serialization.safe_globals` takes: a class to use in place of one by its name."""
    last = name.rpartition(".")[2]
    return type(plain_data.CALLED.get(last, last), (base,), {}), name


_ALLOWED = [
    *(_stand_in(_List, name) for name in plain_data.LISTS),
    *(_stand_in(_Dict, name) for name in plain_data.DICTS),
    *(_stand_in(_Inert, name) for name in plain_data.OBJECTS),
]


def read(path: Path) -> object:
    """What torch.save wrote, on the CPU, plain data replaced by stand-ins.

    Raises:
        InputError: damaged, another format, or a pickle that asks for more than plain data.
    """
    try:
        return _load(path)
    except UnpicklingError as error:
        found = _refusal(str(error))
        raise InputError(f"{path}: expected a state dict of tensors, found {found}") from error
    except Exception as error:  # torch.load raises what its many readers do
        reason = first_line(error).partition(". ")[0]  # it goes on about what may have happened
        raise InputError(
            f"{path}: expected a checkpoint, found a truncated or damaged file"
            f" ({reason}): download or copy it again"
        ) from error


def _load(path: Path) -> object:
    """torch.load, which names one type that it refuses at a time."""
    allowed, names = [*_ALLOWED], set[str]()
    while True:
        try:
            with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
                warnings.simplefilter("ignore")  # of archives that are refused a line further on
                with path.open("rb") as file:  # by its path torch goes by the name's suffix
                    return torch.load(file, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            refused = _REFUSED.search(str(error))
            if not refused or refused[1] in names or not _is_plain_data(refused[1]):
                raise
            names.add(refused[1])
            allowed.append(_stand_in(_Inert, refused[1]))


def _is_plain_data(name: str) -> bool:
    """Whether a name is, in a module that is loaded anyhow, a class of plain data. Imports none."""
    module, _, attribute = name.rpartition(".")
    found = vars(sys.modules[module]).get(attribute) if module in sys.modules else None
    if not isinstance(found, type):
        return False
    is_named_tuple = issubclass(found, tuple) and (
        hasattr(found, "_fields") or hasattr(found, "n_fields")
    )
    return issubclass(found, Enum | Namespace) or is_dataclass(found) or is_named_tuple


def _refusal(message: str) -> str:
    """What an error of torch.load says that a file is, and what to do."""
    refused = _REFUSED.search(message)
    if refused or "unrecognized function" in message or "Can only" in message:
        asked = refused[1] if refused else "a call"
        return (
            f"a pickle that asks for {asked} (a whole module, a class of the script that wrote"
            f" it, or code to run): where it was written, {_SAVE_WEIGHTS}"
        )
    operand = _OPERAND.search(message)
    if operand and int(operand[1]) in _LATER_OPERANDS:
        return (
            "a pickle of a later protocol than torch.save's own: where it was written, save it"
            " without pickle_protocol"
        )
    return "another format, or a damaged file: download or copy it again"
