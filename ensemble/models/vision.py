"""torchvision, imported without `torch._dynamo`.

torchvision 0.29's `ops/roi_align.py` imports `torch._dynamo.utils` for one function, which no
classification model calls. That import takes 1.2 s of a process's 3.6 s, and a run starts a process
for each of its measurements. Every module here imports torchvision by this one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

ASKED_FOR = "torch._dynamo.utils"


@contextmanager
def _put_off() -> Iterator[None]:
    """`ASKED_FOR` is a module that imports the real one once its function is called."""
    if ASKED_FOR in sys.modules:
        yield
        return

    def is_compile_supported(device_type: str) -> bool:
        return bool(import_module(ASKED_FOR).is_compile_supported(device_type))

    placeholder = ModuleType(ASKED_FOR)
    vars(placeholder)["is_compile_supported"] = is_compile_supported
    sys.modules[ASKED_FOR] = placeholder
    try:
        yield
    finally:
        if sys.modules.get(ASKED_FOR) is placeholder:
            del sys.modules[ASKED_FOR]


try:
    with _put_off():
        import torchvision
except ImportError:  # a torchvision that asks for more of it
    import torchvision

__all__ = ["torchvision"]
