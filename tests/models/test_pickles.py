"""Pickles of torch.save: plain data along with the weights is allowed, other globals are not."""

import argparse
import array
import builtins
import collections
import datetime
import decimal
import enum
import fractions
import functools
import http
import io
import operator
import pathlib
import pickle
import platform
import random
import re
import shutil
import sys
import time
import types
import uuid
import zoneinfo
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode

from ensemble.errors import InputError
from ensemble.models import pickles


class Mode(enum.Enum):
    """A user-defined enum of an imported module."""

    FAST = "fast"


class Parts(enum.Flag):
    """A user-defined flag."""

    HEAD = 1
    BODY = 2


class Options(argparse.Namespace):
    """A user-defined namespace."""


class Score(NamedTuple):
    """A user-defined named tuple."""

    top1: float


@dataclass
class Settings:
    """A user-defined dataclass."""

    lr: float


class Listed(list[int]):
    """A user-defined class that is none of these."""


class FlagOfPython3112:
    """A flag as Python 3.11.0 to 3.11.3 pickle it."""

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return operator.or_, (Parts.HEAD, Parts.BODY)


PLAIN: dict[str, object] = {
    "numpy number": np.float64(0.5),
    "numpy whole number": np.int64(3),
    "numpy bool": np.bool_(True),
    "numpy text": np.str_("a"),
    "numpy date": np.datetime64("2020-01-01"),
    "numpy array": np.arange(3),
    "numpy array of objects": np.array([{}, None], dtype=object),
    "numpy record": np.zeros(2, [("a", "f4")]),
    "numpy masked array": np.ma.array([1, 2]),
    "numpy dtype": np.dtype("f4"),
    "numpy type": np.float32,
    "numpy type of dtype": type(np.dtype("f4")),
    "numpy random state": np.random.RandomState(0),
    "numpy generator": np.random.default_rng(0),
    "defaultdict of lists": collections.defaultdict(list, loss=[0.5]),
    "defaultdict of dicts": collections.defaultdict(dict),
    "OrderedDict": collections.OrderedDict(a=1),
    "Counter": collections.Counter("abca"),
    "deque": collections.deque([1, 2], maxlen=2),
    "UserDict": collections.UserDict(a=1),
    "path": pathlib.Path("/data"),
    "path of Windows": pathlib.PureWindowsPath("c:\\data"),
    "Namespace": argparse.Namespace(lr=0.1, data=pathlib.Path("/data")),
    "SimpleNamespace": types.SimpleNamespace(a=1),
    "enum": http.HTTPStatus.OK,
    "enum of torchvision": InterpolationMode.BILINEAR,
    "datetime": datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC),
    "date": datetime.date(2020, 1, 2),
    "time": datetime.time(1, 2),
    "timedelta": datetime.timedelta(1),
    "struct_time": time.gmtime(0),
    "Decimal": decimal.Decimal("1.5"),
    "Fraction": fractions.Fraction(1, 3),
    "uuid": uuid.UUID(int=5),
    "set": {1, 2},
    "set of numpy numbers": {np.int64(1), np.int64(2)},
    "frozenset": frozenset([1]),
    "range": range(3),
    "slice": slice(1, 2),
    "complex": 1j,
    "bytes": b"a\xff",
    "bytearray": bytearray(b"a"),
    "array": array.array("d", [1.0]),
    "pattern": re.compile("a"),
    "Random": random.Random(0),
    "named tuple": platform.uname(),
    "named tuple of torch": torch.max(torch.eye(2), 0),
    "torch.Size": torch.Size([1]),
    "dtype": torch.float32,
    "device": torch.device("cpu"),
    "version": torch.__version__,
    "large number": 10**400,
    "keys": {np.int64(1): 2, pathlib.Path("a"): 3, Mode.FAST: 4},
    "the user's enum": Mode.FAST,
    "the user's flag": Parts.HEAD | Parts.BODY,
    "a flag of Python 3.11.2": FlagOfPython3112(),
    "the user's Namespace": Options(lr=0.1),
    "the user's named tuple": Score(0.5),
    "the user's dataclass": Settings(0.1),
}


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("what", PLAIN)
def test_plain_data_does_not_prevent_loading_the_weights(
    tmp_path: Path, what: str, new_format: bool
) -> None:
    content = {"before": [PLAIN[what]], "weights": {"a": torch.arange(3.0)}, "after": PLAIN[what]}
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    found = pickles.read(path)
    assert isinstance(found, dict)
    assert list(found) == list(content)
    assert torch.equal(found["weights"]["a"], torch.arange(3.0))


def test_plain_data_objects_are_not_constructed(tmp_path: Path) -> None:
    """An attacker-controlled dtype state could make an object array point anywhere."""
    path = tmp_path / "checkpoint.pth"
    torch.save({"a": np.array([{}], dtype=object), "b": pathlib.Path("a")}, path)
    found = pickles.read(path)
    assert isinstance(found, dict)
    assert not isinstance(found["a"], np.ndarray)
    assert not isinstance(found["b"], pathlib.Path)
    assert vars(found["a"]) == vars(found["b"]) == {}


class Calls:
    """Its pickle contains a function call."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


def marker() -> None:
    """Must not be called."""
    raise AssertionError("code of the file was run")


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Calls(marker), "tests.models.test_pickles.marker"),
        (Calls(exec, "raise SystemExit"), "exec"),
        (Calls(eval, "1/0"), "eval"),
        (Calls(shutil.rmtree, "nowhere"), "shutil.rmtree"),
        (Calls(operator.methodcaller, "read"), "operator.methodcaller"),
        (functools.partial(int), "functools.partial"),
        (Listed([1]), "tests.models.test_pickles.Listed"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (torch.optim.SGD, "torch.optim.sgd.SGD"),
        (builtins.open, "open"),
        (zoneinfo.ZoneInfo("UTC"), "zoneinfo.ZoneInfo"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_globals_are_rejected_by_name(tmp_path: Path, value: object, name: str) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": {"a": torch.ones(1)}, "more": value}, path)
    message = re.escape(f"{path}: ") + rf".*a pickle that references (\w+\.)?{re.escape(name)} .*"
    with pytest.raises(InputError, match=message + re.escape("torch.save(model.state_dict(), ")):
        pickles.read(path)


def test_a_class_that_cannot_be_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("users_training")
    exec("import enum\nclass Mode(enum.Enum):\n    A = 1\n", vars(module))
    monkeypatch.setitem(sys.modules, "users_training", module)
    path = tmp_path / "checkpoint.pth"
    torch.save({"mode": vars(module)["Mode"].A}, path)
    assert isinstance(pickles.read(path), dict)
    monkeypatch.delitem(sys.modules, "users_training")
    with pytest.raises(
        InputError, match=r"references users_training\.Mode .*save only the weights"
    ):
        pickles.read(path)


def pickled(*operations: bytes) -> bytes:
    """A legacy torch.save file (before torch 1.6) with these pickle operations."""
    buffer = io.BytesIO()
    torch.save({}, buffer, _use_new_zipfile_serialization=False)
    whole = buffer.getvalue()
    content = pickle.dumps({}, protocol=2)
    assert whole.count(content) >= 1
    return whole[: whole.rindex(content)] + b"\x80\x02" + b"".join(operations) + b"."


@pytest.mark.parametrize(
    "operations",
    [
        # the first step to getattr(Namespace, "__init__").__globals__
        (b"cbuiltins\ngetattr\n", b"cargparse\nNamespace\nX\x08\0\0\0__init__\x86R", b")R"),
        (b"cbuiltins\ngetattr\n", b"cposix\nsystem\n", b"X\x04\0\0\0call\x86R"),
        (b"cargparse\nNamespace\n", b")R", b")R"),
        (b"cpathlib\nPath\n", b"}X\x01\0\0\0aK\x01sb"),
    ],
    ids=["getattr", "posix", "instance", "class"],
)
def test_placeholders_do_not_lead_to_callables(
    tmp_path: Path, operations: tuple[bytes, ...]
) -> None:
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(pickled(*operations))
    message = f"{path}: expected a state dict of tensors, got a pickle that references"
    with pytest.raises(InputError, match=re.escape(message)):
        pickles.read(path)


def test_safe_globals_of_the_caller_are_preserved(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({"args": argparse.Namespace(lr=0.1)}, path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        before = set(torch.serialization.get_safe_globals())
        pickles.read(path)
        assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_later_pickle_protocol_is_reported(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({"a": torch.ones(1), "b": b"bytes"}, path, pickle_protocol=protocol)
    with pytest.raises(InputError, match=r"protocol 3 or later.*save it without pickle_protocol"):
        pickles.read(path)
