"""Functions of the user: `PATH.py:FUNCTION` of a file, `MODULE:FUNCTION` of a module."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from ensemble.errors import InputError, first_line


def names_file(text: str) -> bool:
    """Does a text have the form `PATH.py` or `PATH.py:FUNCTION`?"""
    return ".py:" in text or text.endswith(".py")


def split_file(text: str, *, argument: str) -> tuple[str, str]:
    """The path and the function of `PATH.py:FUNCTION`.

    Raises:
        InputError: it names no function.
    """
    path, _, function = text.rpartition(":") if ".py:" in text else (text, "", "")
    if not function:
        raise InputError(f"expected PATH.py:FUNCTION, got {text}", argument=argument)
    return path, function


def from_file(path: str, function: str, *, argument: str) -> Callable[..., Any]:
    """A function of a file, which is executed once per process. It can import modules of its
    folder.

    Raises:
        InputError: no such file; it raises; it has no such function.
    """
    file = Path(path).absolute()
    module = sys.modules.get(name := f"resnet_vmap file {file}")
    if module is None:
        if not file.is_file():
            raise InputError(f"expected a file at {path}, got none", argument=argument)
        spec = spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        if str(file.parent) not in sys.path:
            sys.path.append(str(file.parent))
        sys.modules[name] = module  # before it runs, as for any import: dataclasses look there
        with _import_errors(path, argument):
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[name]
                raise
    return _function(module, function, where=path, argument=argument)


def from_module(name: str, function: str, *, argument: str) -> Callable[..., Any]:
    """A function of a module, which the working folder may hold.

    Raises:
        InputError: no such module; it raises; it has no such function.
    """
    with _import_errors(name, argument), _working_folder_first():
        module = import_module(name)
    return _function(module, function, where=name, argument=argument)


@contextlib.contextmanager
def _import_errors(where: str, argument: str) -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{where} cannot be imported: {reason}", argument=argument) from error


@contextlib.contextmanager
def _working_folder_first() -> Iterator[None]:
    """The working folder at the front of `sys.path`, as for `python -m`; afterward at its end:
    what the module imports later is found, but hides no module of Python."""
    try:
        folder = os.getcwd()
    except OSError:  # it was removed
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)


def _function(
    module: ModuleType, function: str, *, where: str, argument: str
) -> Callable[..., Any]:
    found = getattr(module, function, None)
    if callable(found):
        return found  # type: ignore[no-any-return]
    got = "none" if found is None else type(found).__name__
    names = [name for name, value in vars(module).items() if callable(value)]
    near = get_close_matches(function, names, n=1)
    help = f"; did you mean {near[0]}?" if near else ""
    raise InputError(
        f"expected a function {function} in {where}, got {got}{help}", argument=argument
    )
