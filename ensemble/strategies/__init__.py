"""The registry: strategy name -> builder. Imports no torch, so that `--help` can list it.

A builder is a function `(models, example) -> BuildResult(forward, note)`. `example` is
`(B, 3, H, W)` for shared inputs or `(N, B, 3, H, W)` for per-model inputs, on the models' device
and in their dtype. `forward(x)` returns logits `(N, B, classes)` for any x like the example, or the
outputs of each model (`PerModel`), and does not write to x. `build_unverified` adds the checks and
the contract that all strategies share. A builder that does not support this machine or these models
raises `ensemble.errors.UnavailableError`.
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

    from ensemble.strategies.build_result import Builder, BuildResult, RawForward
    from ensemble.strategies.forward import Forward

LOOP, BEST = "loop", "best"
TUNE_SECONDS = 60.0  # autotuning budget: no further candidate is built after it


@dataclass(frozen=True)
class Strategy:
    """An entry of the registry: where the builder is, and a summary for `--list_strategies`."""

    module: str
    function: str
    summary: str
    requires: str = ""  # devices and packages
    build_time: str = "< 1 s"
    uses_fast_algorithms: bool = False  # Winograd, Strassen: also compared with float64
    has_kernels: bool = False  # of this package, compiled once per installation
    uses_inductor: bool = False  # whose cache on disk makes later builds quicker
    autotunes: bool = False  # at build, within `tune_seconds`
    sequential: bool = False  # one model at a time: under load, only the requested models run

    def builder(self, *, tune_seconds: float = TUNE_SECONDS) -> Builder:
        builder: Callable[..., BuildResult] = getattr(
            import_module(f"{__name__}.{self.module}"), self.function
        )
        return partial(builder, tune_seconds=tune_seconds) if self.autotunes else builder


_COMPILES = "up to 1 min"
_CONVERTS = "seconds"
# peers: requirements-peers.txt; on CUDA requirements-peers-cuda.txt
_PEERS, _PEERS_BOTH, _PEERS_CUDA = "CPU, peers", "CPU or CUDA, peers", "CUDA, peers"


@dataclass(frozen=True)
class Hybrid:
    """Two strategies for tenants under load: for few models per batch, and for all of them."""

    few: str
    many: str
    summary: str
    requires: str = "--scenario"
    build_time: str = "of both"


STRATEGIES = {
    "loop": Strategy(
        "eager", "loop", "one eager forward per model; the reference", sequential=True
    ),
    "vmap": Strategy("eager", "vmap", "functorch: one eager forward over the stacked weights"),
    "chunked_vmap": Strategy(
        "chunked", "vmap", "vmap over chunks of models; autotuned chunk_size", autotunes=True
    ),
    "folded_loop": Strategy(
        "folded", "loop", "loop with batch norm folded, channels-last", sequential=True
    ),
    "folded_vmap": Strategy("folded", "vmap", "vmap with batch norm folded, channels-last"),
    "compiled_loop": Strategy(
        "compiled",
        "loop",
        "folded_loop through torch.compile",
        build_time=_COMPILES,
        uses_inductor=True,
        sequential=True,
    ),
    "compiled_vmap": Strategy(
        "compiled",
        "vmap",
        "folded_vmap through torch.compile, one graph",
        build_time=_COMPILES,
        uses_inductor=True,
    ),
    "prepacked_loop": Strategy(
        "prepacked",
        "loop",
        "folded_loop with prepacked oneDNN weights, relu and sum fused",
        "CPU",
        sequential=True,
    ),
    "prepacked_concurrent": Strategy(
        "prepacked", "concurrent", "prepacked_loop, one model per core", "CPU"
    ),
    "lowered_vmap": Strategy(
        "lowered",
        "vmap",
        "vmap over convolutions with kernels for N models; numba, or Triton in one CUDA graph",
        "CPU, numba; CUDA",
        "seconds; up to 1 min once",
        uses_fast_algorithms=True,
        has_kernels=True,
        autotunes=True,
    ),
    "concurrent": Strategy("concurrent", "eager", "folded models, one per core or CUDA stream"),
    "compiled_concurrent": Strategy(
        "concurrent",
        "compiled",
        "concurrent through torch.compile",
        build_time=_COMPILES,
        uses_inductor=True,
    ),
    "cudagraph_loop": Strategy(
        "cudagraph",
        "loop",
        "folded_loop as one CUDA graph; autotuned memory format and cudnn.benchmark",
        "CUDA",
        _CONVERTS,
        autotunes=True,
        sequential=True,
    ),
    "cudagraph_vmap": Strategy(
        "cudagraph",
        "vmap",
        "folded_vmap as one CUDA graph; autotuned as cudagraph_loop",
        "CUDA",
        _CONVERTS,
        autotunes=True,
    ),
    "cudagraph_concurrent": Strategy(
        "cudagraph", "eager_concurrent", "concurrent streams as branches of one CUDA graph", "CUDA"
    ),
    "cudagraph_compiled_loop": Strategy(
        "cudagraph",
        "compiled_loop",
        "compiled_loop as one CUDA graph",
        "CUDA",
        _COMPILES,
        uses_inductor=True,
        sequential=True,
    ),
    "cudagraph_compiled_vmap": Strategy(
        "cudagraph",
        "compiled_vmap",
        "compiled_vmap as one CUDA graph",
        "CUDA",
        _COMPILES,
        uses_inductor=True,
    ),
    "cudagraph_compiled_concurrent": Strategy(
        "cudagraph",
        "compiled_concurrent",
        "compiled_concurrent as one CUDA graph",
        "CUDA",
        _COMPILES,
        uses_inductor=True,
    ),
    "cudagraph_compiled_im2col_vmap": Strategy(
        "cudagraph",
        "compiled_im2col_vmap",
        "vmap, convolutions as batched matmul (im2col), one CUDA graph",
        "CUDA",
        _COMPILES,
        uses_inductor=True,
    ),
    "openvino": Strategy(
        "peers",
        "openvino",
        "OpenVINO in its fastest setting",
        _PEERS,
        _CONVERTS,
        sequential=True,
    ),
    "onnxruntime": Strategy(
        "peers",
        "onnxruntime",
        "ONNX Runtime in its fastest setting",
        _PEERS_BOTH,
        _CONVERTS,
        sequential=True,
    ),
    "tensorrt": Strategy(
        "peers",
        "tensorrt",
        "TensorRT in its fastest setting",
        _PEERS_CUDA,
        "seconds per model",
        sequential=True,
    ),
    "jax": Strategy(
        "peers",
        "jax",
        "JAX jit, the faster of loop and vmap; ResNets only",
        _PEERS_BOTH,
        _COMPILES,
    ),
    "exported_pt2": Strategy(
        "exported",
        "pt2_file",
        "a .pt2 file (torch.export) of folded_loop, run by torch alone",
        build_time=_CONVERTS,
    ),
    "exported_aoti": Strategy(
        "exported",
        "aoti_package",
        "an .aoti.pt2 package (AOTInductor) of folded_loop, run by torch alone",
        build_time=_COMPILES,
    ),
    "exported_onnx": Strategy(
        "exported",
        "onnx_file",
        "an .onnx file of all models, run by ONNX Runtime in one session",
        _PEERS_BOTH,
        _CONVERTS,
    ),
    BEST: Strategy(
        "best",
        "fastest",
        "autotuned: the fastest of a short list for this kind of device",
        build_time="seconds; on CUDA 1 min or more",
        uses_fast_algorithms=True,
        has_kernels=True,
        autotunes=True,
    ),
}

# Additional choices under load with per-model inputs.
HYBRIDS = {
    "hybrid": Hybrid("loop", "vmap", "loop for few queued models, vmap for many"),
    "lowered_hybrid": Hybrid(
        "lowered_vmap", "lowered_vmap", "lowered_vmap for one model and for N"
    ),
}


def find(name: str) -> Strategy | None:
    """The strategy of a name, from the registry or from a file of the user; None if unknown."""
    from ensemble.strategies import user

    if user.is_user_strategy(name):
        return user.user_strategy(name)
    return STRATEGIES.get(name)


def get(name: str) -> Strategy:
    """The strategy of a name.

    Raises:
        ValueError: an unknown name.
    """
    strategy = find(name)
    if strategy is None:
        expected = f"{', '.join(STRATEGIES)}, or PATH.py:FUNCTION"
        raise ValueError(f"expected a strategy of {expected}, got {name!r}")
    return strategy


def build(
    name: str,
    models: Sequence[nn.Module],
    example: Tensor,
    *,
    max_batch: int | None = None,
    tune_seconds: float = TUNE_SECONDS,
    output: str | int | None = None,
) -> Forward:
    """Build a strategy: returns a `strategies.forward.Forward`; all share its contract.

    Its output for the example (or for noise, if the example is constant) is compared with that of
    the models.

    Models are never modified, and any number of ensembles may be built from the same models, in any
    order and from several threads. `loop` reads the models' own tensors. So do `vmap` and
    `chunked_vmap` if these are consecutive slices of one stack, as returned by `load_models`: that
    needs no extra memory, and later in-place updates of the weights are visible. Otherwise they
    copy the weights. All other strategies hold transformed weights: updates are not visible, and
    the models may be freed, but those of other runtimes, `cudagraph_...` and the user's own, which
    are built again for each shape. `best` behaves like the strategy it selects.

    A process forked afterward may call the forward and build others. torch's thread pool does not
    survive a fork, so it computes on one thread there (`lowered_vmap` and the concurrent strategies
    use as many as in the parent).

    Args:
        name: a key of `STRATEGIES`, or `PATH.py:FUNCTION` (see `strategies.user`); `best` autotunes
            over the likely candidates.
        models: N eval-mode models of one class, on one device, in one dtype, each called with one
            tensor.
        example: `(B, channels, H, W)`, shared by all models, or `(N, B, channels, H, W)`, one batch
            per model.
        max_batch: the largest number of images a model in a call; default: the example's. The
            strategy is tuned for the example.
        tune_seconds: the autotuning budget: no further candidate is built after it.
        output: of models that give a dict, tuple or list: the key, index or field name of the
            tensor that the forward gives.

    Returns:
        forward: images -> logits `(N, B, classes)`, or the stacked outputs `(N, *shape)` of models
            that return another single tensor.

    Raises:
        ValueError: an unknown name or output; unusable models or example; models that do not return
            a single tensor (name it by `output`), or that differ in more than the values of their
            tensors (supported by `loop` and `prepacked_...` only).
        UnavailableError: the strategy does not support this machine or these models: its output
            disagrees with theirs, they are stateful, compute gradients, or cannot be copied (a hook
            or function refers to the model). `loop` supports all of these except gradients, and
            `best` then selects it.
    """
    from ensemble.machine.memory import unavailable_on_failure
    from ensemble.models import outputs, stacking
    from ensemble.strategies import arguments, verification
    from ensemble.strategies.contexts import execution_context
    from ensemble.strategies.forward import Forward
    from ensemble.strategies.verification import Behavior

    get(name)
    models, example = arguments.validated(models, example)
    arguments.check_max_batch(max_batch, example)
    if output is not None:
        models = outputs.selected(models, output)
        with execution_context(example.device):
            arguments.check_runs(models[0], example)
    behavior = verification.behavior(models[0], example)
    if behavior is Behavior.USES_AUTOGRAD:
        raise UnavailableError(
            "these models compute gradients in their forward, which runs under inference_mode"
        )
    if behavior is Behavior.STATEFUL and name != LOOP:
        if name != BEST:
            raise UnavailableError(f"{name} does not support stateful models")
        name = LOOP
    failed = f"{name} cannot run these models"
    with unavailable_on_failure(failed, but=(ValueError, UnavailableError)):
        built = _build(name, models, example, tune_seconds=tune_seconds)
        is_verified = behavior is Behavior.PURE and name != LOOP
        forward = Forward(
            built,
            name,
            example,
            num_models=len(models),
            model=stacking.private_copy(models[0]) if is_verified else models[0],
            max_batch=max_batch,
            is_verified=is_verified,
        )
        if behavior is Behavior.PURE and name not in (LOOP, BEST):
            verification.check(forward, models, example)
    return forward


def build_unverified(
    name: str,
    models: Sequence[nn.Module],
    example: Tensor,
    *,
    tune_seconds: float = TUNE_SECONDS,
) -> BuildResult:
    """`build` without comparing the output with the models', and with the builder's notes."""
    from ensemble.strategies import arguments
    from ensemble.strategies.forward import Forward

    get(name)
    models, example = arguments.validated(models, example)
    built = _build(name, models, example, tune_seconds=tune_seconds)
    forward = Forward(built, name, example, num_models=len(models), model=models[0])
    return replace(built, forward=forward)


def _build(
    name: str, models: Sequence[nn.Module], example: Tensor, *, tune_seconds: float
) -> BuildResult:
    """The builder's own result, in the context of a build, with `Serving`."""
    from ensemble.machine.per_process import use_one_thread_after_fork
    from ensemble.strategies import arguments, contexts
    from ensemble.strategies.forward import Forward
    from ensemble.strategies.serving import Rebuilding

    use_one_thread_after_fork()
    builder = get(name).builder(tune_seconds=tune_seconds)
    with contexts.execution_context(example.device), contexts.default_device(example.device):
        try:
            built = builder(models, example)
        except Exception:
            arguments.check_runs(models[0], example)
            raise
    # `best` returns what another strategy has built.
    inner = built.forward
    if isinstance(inner, Forward):
        built = replace(built, forward=inner.raw)
    if built.serving is not None:
        return built

    def rebuild(models: Sequence[nn.Module], example: Tensor) -> RawForward:
        return _build(name, models, example, tune_seconds=tune_seconds).forward

    rebuilding = Rebuilding(rebuild, models, built.forward, example)
    return replace(built, forward=rebuilding.first, serving=rebuilding.serving)
