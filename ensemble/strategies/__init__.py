"""The registry: strategy name -> builder. Imports no torch, so that `--help` can list it.

A builder is a plain function `(models, example) -> Built(forward, note)`. `example` is
`(B, 3, H, W)` for shared inputs or `(N, B, 3, H, W)` for per-model inputs, on the models' device
and in their dtype, and `forward(x)` gives logits `(N, B, classes)` for any x like the example, or
the outputs of each model (`PerModel`); it does not write to x. `make` adds what all strategies
share. A builder that cannot work here raises `ensemble.errors.UnavailableError` with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from ensemble.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from ensemble.strategies.build_result import Builder, Built
    from ensemble.strategies.forward import Forward

LOOP, BEST = "loop", "best"
TUNE_SECONDS = 60.0  # a strategy that chooses among others begins none after so long


@dataclass(frozen=True)
class Strategy:
    """Where a builder lives; what it does, needs, and takes to start, in a few words."""

    module: str
    function: str
    summary: str
    needs: str = ""
    start: str = "at once"
    saves_multiplications: bool = False  # Winograd, Strassen: it is compared with float64 too
    has_kernels: bool = False  # of its own, which are compiled once per installation
    tunes: bool = False  # at build, for as long as it is told
    one_by_one: bool = False  # one model after another: under load, only those that are asked for

    def builder(self, *, tune_seconds: float = TUNE_SECONDS) -> Builder:
        builder: Callable[..., Built] = getattr(
            import_module(f"{__name__}.{self.module}"), self.function
        )
        return partial(builder, tune_seconds=tune_seconds) if self.tunes else builder


_COMPILES = "up to 1 min"
_CONVERTS = "seconds"
_PEERS = "CPU, peers"  # requirements-peers.txt


@dataclass(frozen=True)
class Hybrid:
    """Two strategies for tenants under load: of a few models, and of all of them together."""

    alone: str
    together: str
    summary: str
    needs: str = "--scenario"
    start: str = "as both"


# A name says how: [cudagraph_][compiled_|prepacked_|folded_|lowered_]loop, vmap or concurrent.
STRATEGIES = {
    "loop": Strategy(
        "eager", "loop", "one eager forward per model: the reference", one_by_one=True
    ),
    "vmap": Strategy("eager", "vmap", "functorch: one eager forward over the stacked state"),
    "chunked_vmap": Strategy(
        "chunked", "vmap", "vmap over some models at a time: the fastest chunk_size", tunes=True
    ),
    "folded_loop": Strategy(
        "folded", "loop", "loop, batch norm folded, channels-last", one_by_one=True
    ),
    "folded_vmap": Strategy("folded", "vmap", "vmap, batch norm folded, channels-last"),
    "compiled_loop": Strategy(
        "compiled",
        "loop",
        "folded_loop through torch.compile",
        start=_COMPILES,
        one_by_one=True,
    ),
    "compiled_vmap": Strategy(
        "compiled", "vmap", "folded_vmap through torch.compile, one graph", start=_COMPILES
    ),
    "prepacked_loop": Strategy(
        "prepacked",
        "loop",
        "folded_loop, weights in oneDNN's order, relu and sum fused",
        "CPU",
        one_by_one=True,
    ),
    "prepacked_concurrent": Strategy(
        "prepacked", "concurrent", "the same, one model per core", "CPU"
    ),
    "lowered_vmap": Strategy(
        "lowered",
        "vmap",
        "vmap by operators with kernels of their own for N models",
        "CPU, numba",
        "seconds; once 15 s",
        saves_multiplications=True,
        has_kernels=True,
    ),
    "concurrent": Strategy("concurrent", "eager", "folded models, one per core or stream"),
    "compiled_concurrent": Strategy(
        "concurrent", "compiled", "the same through torch.compile", start=_COMPILES
    ),
    "cudagraph_loop": Strategy(
        "cudagraph", "loop", "folded_loop as one CUDA graph", "CUDA", one_by_one=True
    ),
    "cudagraph_vmap": Strategy("cudagraph", "vmap", "folded_vmap as one CUDA graph", "CUDA"),
    "cudagraph_concurrent": Strategy(
        "cudagraph", "eager_concurrent", "concurrent: streams as branches of one graph", "CUDA"
    ),
    "cudagraph_compiled_loop": Strategy(
        "cudagraph",
        "compiled_loop",
        "compiled_loop as one CUDA graph",
        "CUDA",
        _COMPILES,
        one_by_one=True,
    ),
    "cudagraph_compiled_vmap": Strategy(
        "cudagraph", "compiled_vmap", "compiled_vmap as one CUDA graph", "CUDA", _COMPILES
    ),
    "cudagraph_compiled_concurrent": Strategy(
        "cudagraph", "compiled_concurrent", "the streams, compiled", "CUDA", _COMPILES
    ),
    "cudagraph_compiled_im2col_vmap": Strategy(
        "cudagraph",
        "compiled_im2col_vmap",
        "vmap, convolutions as batched matrix products (im2col)",
        "CUDA",
        _COMPILES,
    ),
    "openvino": Strategy(
        "peers",
        "openvino",
        "OpenVINO, the fastest of its settings",
        _PEERS,
        _CONVERTS,
        one_by_one=True,
    ),
    "onnxruntime": Strategy(
        "peers",
        "onnxruntime",
        "ONNX Runtime, the fastest of its settings",
        _PEERS,
        _CONVERTS,
        one_by_one=True,
    ),
    "jax": Strategy(
        "peers", "jax", "JAX, jit, the faster of loop and vmap; ResNets", _PEERS, _COMPILES
    ),
    BEST: Strategy(
        "best",
        "fastest",
        "the fastest of those above that are quick to build here, found by trying them",
        start="seconds; on CUDA 1 min or more",
        saves_multiplications=True,
        has_kernels=True,
        tunes=True,
    ),
}

# Beside the strategies where tenants are served under load.
HYBRIDS = {
    "hybrid": Hybrid("loop", "vmap", "loop over few waiting models, vmap over many"),
    "lowered_hybrid": Hybrid(
        "lowered_vmap", "lowered_vmap", "the same by kernels for one model and for N"
    ),
}


def build(
    name: str,
    models: Sequence[nn.Module],
    example: Tensor,
    *,
    tune_seconds: float = TUNE_SECONDS,
) -> Forward:
    """Build a strategy: a `strategies.forward.Forward`, whose contract is the same for all.

    Its answer for the example, or for noise where that is blank, is compared with the models'.

    What the models hold is never changed, and any number of ensembles may be built of the same
    models, in any order and from several threads. `loop` reads the models' own tensors, and so do
    `vmap` and `chunked_vmap` where these are slices of one stack, as those of `load_models` and
    every run of them are: that takes no memory, and a weight that is later changed in place is
    seen. Of models that lie apart they hold a copy, and every other strategy holds its own form of
    the weights: changes are not seen, and the models may be freed. `best` does as what it picked.

    A process that is forked afterwards may call the forward, and build others; torch's own threads
    do not live there, so it computes on one (`lowered_vmap` and the concurrent ones on as many as
    here).

    Args:
        name: a key of `STRATEGIES`; `best` tries those that could win here and keeps the fastest.
        models: N eval-mode models of one class, on one device, in one dtype, each called with one
            tensor.
        example: `(B, channels, H, W)`, seen by all models, or `(N, B, channels, H, W)`, one batch
            for each.
        tune_seconds: after so long a strategy that chooses among others begins no further one.

    Returns:
        forward: x like `example` -> logits `(N, B, classes)`, or whatever single tensor each model
            gives: `(N, *its shape)`.

    Raises:
        ValueError: an unknown name; models or an example that cannot be used, and why; models that
            give no single tensor, or that differ in more than the values of their tensors (only
            `loop` and `prepacked_...` take them).
        UnavailableError: the strategy cannot run here, or not these models: it gives another result
            than they, or they remember or count their calls, compute gradients, or cannot be copied
            (a hook or function in them refers to the model). `loop` runs all of these but those
            with gradients; `best` is then the loop.
    """
    from ensemble.machine.memory import unavailable_on_failure
    from ensemble.strategies import arguments, verification
    from ensemble.strategies.forward import Forward
    from ensemble.strategies.verification import Behavior

    if name not in STRATEGIES:
        raise ValueError(f"expected a strategy out of {', '.join(STRATEGIES)}, found {name!r}")
    models, example = arguments.checked(models, example)
    behavior = verification.behavior(models[0], example)
    if behavior is Behavior.GRADED:
        raise UnavailableError(
            "these models compute gradients in their forward, and a built one runs without them"
        )
    if behavior is Behavior.STATEFUL and name != LOOP:
        if name != BEST:
            raise UnavailableError(f"{name} cannot run models that remember or count their calls")
        name = LOOP
    failed = f"{name} cannot run these models"
    with unavailable_on_failure(failed, but=(ValueError, UnavailableError)):
        forward = make(name, models, example, tune_seconds=tune_seconds).forward
        assert isinstance(forward, Forward)
        if behavior is Behavior.PLAIN and name not in (LOOP, BEST):
            verification.check(forward, models, example)
    return forward


def make(
    name: str,
    models: Sequence[nn.Module],
    example: Tensor,
    *,
    tune_seconds: float = TUNE_SECONDS,
) -> Built:
    """`build`, with the strategy's note on how it was built, and what it chose."""
    import torch

    from ensemble.machine.per_process import compute_alone_in_forks
    from ensemble.strategies import arguments, forward

    if name not in STRATEGIES:
        raise ValueError(f"expected a strategy out of {', '.join(STRATEGIES)}, found {name!r}")
    models, example = arguments.checked(models, example)
    compute_alone_in_forks()
    builder = STRATEGIES[name].builder(tune_seconds=tune_seconds)
    with forward.settings(example.device), torch.device(example.device):
        try:
            built = builder(models, example)
        except Exception:
            arguments.check_runs(models[0], example)
            raise
    run = built.forward.run if isinstance(built.forward, forward.Forward) else built.forward
    return replace(built, forward=forward.Forward(run, name, example, len(models)))
