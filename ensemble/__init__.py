"""Run N models of one architecture on one device by the fastest of many strategies.

models = ensemble.load_models(["a.pth", "b.pth"], arch="resnet18", device="cpu")
forward = ensemble.build("vmap", models, example)  # example: (B, 3, H, W), or (N, B, 3, H, W)
logits = forward(x)                                # (N, B, classes)
ensemble.save(forward, "winner.ensemble")          # and load it again, with this package
ensemble.export(models, example, "all.onnx")       # a file that runs without this package
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ensemble.errors import InputError, UnavailableError
from ensemble.strategies import STRATEGIES, build

if TYPE_CHECKING:
    from ensemble.models.weights import load_models
    from ensemble.strategies.exported import export
    from ensemble.strategies.loading import load
    from ensemble.strategies.saving import save

__all__ = [
    "STRATEGIES",
    "InputError",
    "UnavailableError",
    "build",
    "export",
    "load",
    "load_models",
    "save",
]

_LAZY = {
    "export": "ensemble.strategies.exported",
    "load": "ensemble.strategies.loading",
    "load_models": "ensemble.models.weights",
    "save": "ensemble.strategies.saving",
}


def __getattr__(name: str) -> object:
    """Import torch lazily, with the first name that requires it: `--help` does not."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
