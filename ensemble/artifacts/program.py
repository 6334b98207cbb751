"""N models as one program of torch.export: what every format is written from.

A loop over the models, in torch's operators alone. Their stacked form, which vmap gives, is not
used: torch's batching rules of pooling, concatenation and grouped convolutions fix the batch size
while they are traced, a CPU runs it slower than the loop, and cuDNN has no fast kernel for the
grouped convolutions that it becomes (`compiler.operators.im2col`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from ensemble.compiler.graph.call_trace import record
from ensemble.errors import UnavailableError, first_line
from ensemble.machine import captured_warnings
from ensemble.machine.memory import is_out_of_memory
from ensemble.models import stacking

INPUT, OUTPUT, BATCH = "x", "logits", "batch"
# Batch size of the traced input: torch.export specializes a batch of 1.
_TRACED_BATCH = 2
_NAMESPACES = {"aten", "prim", "prims"}


@dataclass(frozen=True)
class Layout:
    """The order of dimensions of inputs and outputs.

    per_model: x has a batch for each model, `(N, B, C, H, W)`, not `(B, C, H, W)` for all.
    batch_first: the batch is the first dimension, x `(B, N, C, H, W)` and logits `(B, N, classes)`,
        as servers require that batch requests; otherwise logits are `(N, B, classes)`.
    """

    per_model: bool
    batch_first: bool = False

    def of_input(self, x: Tensor) -> Tensor:
        """x as `ensemble.build` takes it, in this layout."""
        return x.transpose(0, 1).contiguous() if self.per_model and self.batch_first else x

    def of_output(self, logits: Tensor) -> Tensor:
        """Outputs of the program as `(N, B, classes)`."""
        return logits.transpose(0, 1) if self.batch_first else logits

    @property
    def batch_dim(self) -> int:
        """The batch dimension of the input."""
        return 1 if self.per_model and not self.batch_first else 0


class _Ensemble(nn.Module):
    """x -> the stacked outputs of the models, called sequentially."""

    def __init__(self, models: Sequence[nn.Module], layout: Layout, *, private: bool) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self._layout, self._private = layout, private

    def forward(self, x: Tensor) -> Tensor:
        if self._layout.per_model:
            batches = x.unbind(1 if self._layout.batch_first else 0)
        else:
            batches = (x,) * len(self.models)
        outputs = [
            model(batch.clone() if self._private else batch)
            for model, batch in zip(self.models, batches, strict=True)
        ]
        return torch.stack(outputs, 1 if self._layout.batch_first else 0)


def sharing_equal_tensors(
    models: Sequence[nn.Module], *, memory_format: torch.memory_format
) -> list[nn.Module]:
    """Copies of the models in which tensors with the same values are one tensor, so that a file
    has them once.

    memory_format: of the copies.
    """
    unique: dict[tuple[object, ...], Tensor] = {}

    def shared(tensor: Tensor) -> Tensor:
        copied = tensor.clone(memory_format=memory_format)  # not a slice of a stack
        content = copied.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest = hashlib.sha256(content.tobytes()).digest()
        key = (copied.shape, copied.stride(), copied.dtype, copied.device, digest)
        return unique.setdefault(key, copied)

    copies = []
    with torch.inference_mode(False), torch.no_grad():
        for model in models:
            copy = stacking.skeleton(model).eval()
            tensors = stacking.named_tensors(model).items()
            stacking.set_tensors(copy, {name: shared(tensor) for name, tensor in tensors})
            copies.append(copy)
    return copies


def trace(models: Sequence[nn.Module], example: Tensor, layout: Layout) -> ExportedProgram:
    """The program of N models: `x` -> `logits`, for any batch size; other dimensions are those of
    the example.

    Args:
        models: they are not modified.
        example: `(B, C, H, W)`, or `(N, B, C, H, W)` if `layout.per_model`.

    Raises:
        UnavailableError: torch.export cannot trace them, or they use operators that are not torch's
            own.
    """
    with torch.inference_mode(False), torch.no_grad(), captured_warnings.capture("ignore"):
        images, batch_dim = layout.of_input(example), layout.batch_dim
        sizes = list(images.shape)
        sizes[batch_dim] = _TRACED_BATCH
        writes = [_writes_to_input(model, example) for model in models]
        ensemble = _Ensemble(models, layout, private=any(writes))
        program = _exported(ensemble, images.new_zeros(sizes), batch_dim)
    foreign = sorted(n for n in _operators(program) if n.partition("::")[0] not in _NAMESPACES)
    if foreign:
        raise UnavailableError(
            f"these models use operators that torch alone does not have: {', '.join(foreign)}"
        )
    _rename_output(program)
    _drop_source_lines(program)
    return program


def _exported(ensemble: nn.Module, x: Tensor, batch_dim: int) -> ExportedProgram:
    shapes = {INPUT: {batch_dim: Dim(BATCH, min=1)}}
    try:
        return torch.export.export(ensemble, (x,), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        message = f"torch.export cannot trace these models: {_why(error)}"
        raise UnavailableError(message) from error


def output_shape(program: ExportedProgram) -> tuple[int | None, ...]:
    """The shape of `logits`; None for the batch dimension."""
    (result,) = program.graph.output_node().args[0]
    sizes: Sequence[int | torch.SymInt] = result.meta["val"].shape
    return tuple(size if isinstance(size, int) else None for size in sizes)


def _writes_to_input(model: nn.Module, example: Tensor) -> bool:
    """Does a forward modify its input in place?

    Raises:
        UnavailableError: it reads values of tensors, which a program has as constants. torch.export
            finds that too, and prints the whole program.
    """
    x = (example[0] if example.dim() == 5 else example).clone()
    before = x._version
    if record(stacking.private_copy(model), x).reads_values:
        raise UnavailableError(
            "torch.export cannot trace these models: their code reads values of tensors"
            " (data-dependent control flow)"
        )
    return x._version != before


def _why(error: Exception) -> str:
    """One line of an error of torch.export."""
    text = str(error)
    if "specialized it to be a constant" in text or "Constraints violated" in text:
        return "their code fixes the batch size"
    return f"{type(error).__name__}: {first_line(error)}"


def _graphs(program: ExportedProgram) -> Iterator[fx.Graph]:
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            yield module.graph


def _operators(program: ExportedProgram) -> set[str]:
    """The names of all operators, `aten::conv2d`."""
    return {
        node.target.name()
        for graph in _graphs(program)
        for node in graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    }


def _rename_output(program: ExportedProgram) -> None:
    (result,) = program.graph.output_node().args[0]
    before = result.name
    result._rename(OUTPUT)
    program.graph_signature.replace_all_uses(before, result.name)
    program.graph_module.recompile()


def _drop_source_lines(program: ExportedProgram) -> None:
    """Files that are passed on do not contain the paths of source files."""
    for graph in _graphs(program):
        for node in graph.nodes:
            node.meta.pop("stack_trace", None)
