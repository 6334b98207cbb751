"""torchvision, imported without `torch._dynamo`.

torchvision 0.29's `ops/roi_align.py` imports `torch._dynamo.utils` for a function that no
classification model calls. The import takes 1.2 of the 3.6 s that a process takes to start, and a
run starts a process per measurement. All modules import torchvision from here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

_DYNAMO_UTILS = "torch._dynamo.utils"


@contextmanager
def _lazy_dynamo() -> Iterator[None]:
    """Replace `torch._dynamo.utils` by a stub that imports the real module when called."""
    if _DYNAMO_UTILS in sys.modules:
        yield
        return

    def is_compile_supported(device_type: str) -> bool:
        return bool(import_module(_DYNAMO_UTILS).is_compile_supported(device_type))

    placeholder = ModuleType(_DYNAMO_UTILS)
    vars(placeholder)["is_compile_supported"] = is_compile_supported
    sys.modules[_DYNAMO_UTILS] = placeholder
    try:
        yield
    finally:
        if sys.modules.get(_DYNAMO_UTILS) is placeholder:
            del sys.modules[_DYNAMO_UTILS]


try:
    with _lazy_dynamo():
        import torchvision
except ImportError:  # a torchvision that imports other names from it
    import torchvision

__all__ = ["torchvision"]
