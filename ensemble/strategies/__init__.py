"""The registry: strategy name -> builder. Imports no torch, so that `--help` can list it.

A builder is a plain function `(models, example) -> forward`. `example` is `(B, 3, H, W)` for shared
inputs or `(N, B, 3, H, W)` for per-model inputs, on the models' device and in their dtype, and
`forward(x)` gives logits `(N, B, classes)` for any x like the example. A builder that cannot work
here raises `ensemble.errors.UnavailableError` with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    Forward = Callable[[Tensor], Tensor]
    Builder = Callable[[Sequence[nn.Module], Tensor], Forward]


@dataclass(frozen=True)
class Strategy:
    """Where a builder lives, and what it does in a few words."""

    module: str
    function: str
    summary: str
    rounds_apart: bool = False  # fewer multiplications: compare its rounding with float64's

    def builder(self) -> Builder:
        return getattr(import_module(f"{__name__}.{self.module}"), self.function)


STRATEGIES = {
    "loop": Strategy("eager", "loop", "one eager forward a model, stacked: the reference"),
    "vmap": Strategy("eager", "vmap", "one eager vmapped forward over the stacked state"),
    "folded_loop": Strategy("folded", "loop", "loop, batch norm folded, channels-last"),
    "folded_vmap": Strategy("folded", "vmap", "vmap, batch norm folded, channels-last"),
    "compiled_loop": Strategy("compiled", "loop", "folded_loop through torch.compile"),
    "compiled_vmap": Strategy("compiled", "vmap", "folded_vmap through torch.compile, one graph"),
    "packed_loop": Strategy("packed", "loop", "folded_loop, weights packed once (CPU)"),
    "packed_concurrent": Strategy("packed", "concurrent", "the same, one model a core"),
    "winograd_vmap": Strategy("winograd", "vmap", "folded_vmap, kernels for N models", True),
    "concurrent": Strategy("concurrent", "eager", "folded models, one a core or stream"),
    "concurrent_compiled": Strategy("concurrent", "compiled", "the same, compiled"),
    "captured_loop": Strategy("captured", "loop", "folded_loop as a CUDA graph"),
    "captured_vmap": Strategy("captured", "vmap", "folded_vmap as a CUDA graph"),
    "captured_compiled_loop": Strategy("captured", "compiled_loop", "compiled_loop as one"),
    "captured_compiled_vmap": Strategy("captured", "compiled_vmap", "compiled_vmap as one"),
    "captured_concurrent": Strategy("captured", "concurrent_eager", "concurrent as one"),
    "captured_concurrent_compiled": Strategy("captured", "concurrent_compiled", "compiled too"),
    "captured_matmul_vmap": Strategy("captured", "matmul_vmap", "vmap by matrix products as one"),
    "openvino": Strategy("peers", "openvino", "OpenVINO, the fastest of its settings"),
    "onnxruntime": Strategy("peers", "onnxruntime", "ONNX Runtime, the fastest of its settings"),
    "jax": Strategy("peers", "jax", "JAX, jit, the faster of loop and vmap (ResNets only)"),
}

BEST = "best"  # stands for the one of them that is expected to be the fastest


def build(name: str, models: Sequence[nn.Module], example: Tensor) -> Forward:
    """Build a strategy. Building and calling both run under `torch.inference_mode`.

    What the models hold is never changed, and any number of ensembles may be built of the same
    models, in any order. `loop` reads the models' own tensors, and so does `vmap` where these are
    slices of one stack, as those of `load_models` and every run of them are: that takes no memory,
    and a weight that is later changed in place is seen. Of models that lie apart `vmap` holds a
    copy, and every other strategy holds its own form of the weights: changes are not seen, and the
    models may be freed.

    Args:
        name: a key of `STRATEGIES`, or `BEST`.
        models: N eval-mode models of one class, on one device, in one dtype.
        example: `(B, 3, H, W)`, seen by all models, or `(N, B, 3, H, W)`, one batch for each.

    Returns:
        forward: x like `example` -> logits `(N, B, classes)`.

    Raises:
        ValueError: an unknown name, an example that does not fit the models, or models that differ
            in more than the values of their tensors (only `loop` and `packed_...` take them).
        UnavailableError: the strategy cannot run here.
    """
    import torch

    if name not in STRATEGIES and name != BEST:
        raise ValueError(f"expected a strategy out of {', '.join(STRATEGIES)}, found {name!r}")
    _check_example(models, example)
    if name == BEST:
        from ensemble.strategies import best

        name = best.pick(models, example.device.type, str(example.dtype).removeprefix("torch."))
    with torch.inference_mode():
        forward = STRATEGIES[name].builder()(models, example)
    return torch.inference_mode()(forward)


def _check_example(models: Sequence[nn.Module], example: Tensor) -> None:
    if not models:
        raise ValueError("expected at least one model, found none")
    per_model = example.dim() == 5 and example.shape[0] == len(models)
    if example.dim() != 4 and not per_model:
        expected = f"(B, 3, H, W) or ({len(models)}, B, 3, H, W)"
        raise ValueError(f"expected an example of shape {expected}, found {tuple(example.shape)}")
    weight = next(models[0].parameters())
    if (weight.device, weight.dtype) != (example.device, example.dtype):
        expected, found = (
            f"{weight.dtype} on {weight.device}",
            f"{example.dtype} on {example.device}",
        )
        raise ValueError(f"expected an example in {expected} like the models, found {found}")
    if any(module.training for model in models for module in model.modules()):
        raise ValueError("expected models in eval mode, found train mode; call model.eval()")
