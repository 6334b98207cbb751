"""Activation fusion: an activation becomes the epilogue of the kernel that writes its input."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from ensemble.compiler.kernels import KERNELS
from ensemble.compiler.planning.step import Activation, Kind, Step


def fuse_activations(steps: Sequence[Step], outputs: Collection[int]) -> list[Step]:
    """The steps with each activation fused that is the only reader of its input."""
    readers = [value for step in steps for value in step.reads]
    producers = {step.out: step for step in steps if not step.relu and not step.activation}
    fused: dict[int, Step] = {}  # by the value that only the activation reads
    for step in steps:
        producer = producers.get(step.x) if step.kind == Kind.ACTIVATION else None
        if producer is None or step.x in outputs or not _can_fuse(producer.kind, step.activation):
            continue
        if readers.count(step.x) == 1:
            fused[step.x] = step
    gone = {step.out for step in fused.values()}
    return [
        _with_epilogue(step, fused[step.out]) if step.out in fused else step
        for step in steps
        if not (step.kind == Kind.ACTIVATION and step.out in gone)
    ]


def _can_fuse(kind: Kind, activation: Activation) -> bool:
    kernel = KERNELS[kind]
    return kernel.fuses_relu if activation == Activation.RELU else kernel.fuses_activations


def _with_epilogue(step: Step, activation: Step) -> Step:
    is_relu = activation.activation == Activation.RELU
    function = Activation.NONE if is_relu else activation.activation
    scalar = activation.scalar if function else step.scalar
    return replace(step, relu=is_relu, activation=function, scalar=scalar, out=activation.out)
