"""Eager implementation of a stacked operator: a program of one step."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from torch.nn import functional

from ensemble.compiler.planning.step import Geometry, Step
from ensemble.compiler.planning.vector_layout import in_vectors

X, OTHER, OUT = range(3)  # value ids


def run(step: Step, inputs: Sequence[Tensor], *, num_models: int) -> Tensor:
    """Run a step from X and OTHER to OUT: `(N, B, C, H, W)`, channels-last in memory."""
    from ensemble.compiler.runtime.program import Program

    values = (X, OTHER)[: len(inputs)]
    program = Program(
        [step],
        inputs=values,
        outputs=[OUT],
        num_models=num_models,
        threads=1,
        dtype=inputs[0].dtype,
    )
    (result,) = program(*inputs)
    # Without padding channels, in the strides that `fake_result` promises.
    return result.movedim(-3, -1).contiguous().movedim(-1, -3)


def fake_result(x: Tensor, num_models: int, geometry: Geometry) -> Tensor:
    """The shape and strides of what `run` returns."""
    return x.new_empty(num_models, *geometry.out_shape).movedim(-1, -3)


def padded_channels(step: Step) -> Step:
    """The step with its channels padded to whole vectors."""
    geometry = step.geometry
    return replace(
        step,
        geometry=in_vectors(geometry),
        channels=geometry.channels,
        out_channels=geometry.out_channels,
    )


def padded_values(values: Tensor, channels: int) -> Tensor:
    """`(N, C)` in float32, padded with zeros to so many channels."""
    return functional.pad(values.float(), (0, channels - values.shape[1])).contiguous()
