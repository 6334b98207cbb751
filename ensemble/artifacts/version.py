"""What a saved forward depends on: the code of this package, torch, vector instructions."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ensemble.errors import InputError
from ensemble.machine import jit

_SOURCES = Path(__file__).parents[1]


def version() -> dict[str, Any]:
    """Of this process."""
    return {"package": _digest(), "torch": torch.__version__, "vectors": _vectors()}


def check_version(saved: dict[str, Any], path: str) -> None:
    """Check that a forward of this version runs here.

    Raises:
        InputError: it does not.
    """
    here = version()
    if saved["vectors"] != here["vectors"]:
        what = f"a CPU with {here['vectors']} instructions, got a file of one with"
        raise InputError(f"{path}: expected {what} {saved['vectors']}; build the forward again")
    if saved["torch"] != here["torch"]:
        what = f"torch {here['torch']}, got a file of torch {saved['torch']}"
        raise InputError(f"{path}: expected {what}; build the forward again")
    if saved["package"] != here["package"]:
        raise InputError(
            f"{path}: expected a file of this version of the package, got one of another; build the"
            " forward again"
        )


@cache
def _digest() -> str:
    """The hash of the sources that saved plans and packed weights depend on."""
    files = sorted(
        path
        for folder in ("artifacts", "compiler", "strategies")
        for path in (_SOURCES / folder).rglob("*.py")
    )
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _vectors() -> str:
    """The vector instructions that kernels are compiled for."""
    if not jit.is_usable():
        return "unknown"
    from ensemble.compiler.codegen.simd import HAS_BF16_DOT, VECTOR_BYTES

    return f"{8 * VECTOR_BYTES}-bit vector{' and bfloat16' if HAS_BF16_DOT else ''}"
