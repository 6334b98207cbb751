"""Layers of ResNets as the implicit GEMM computes them, with random tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ensemble.compiler.cuda.problem import ConvProblem, DotPrecision, Shortcut, pack_weight
from ensemble.compiler.cuda.tiles import Tile
from ensemble.compiler.operators.implicit_gemm import plain_conv2d_block
from ensemble.compiler.planning.shape_inference import conv_geometry
from ensemble.compiler.planning.step import Activation


@dataclass(frozen=True)
class Operands:
    """What `cuda.launch.conv2d` takes after the problem and the tile."""

    x: Tensor
    packed: Tensor
    bias: Tensor
    other: Tensor | None
    shortcut: Tensor | None
    weight: Tensor
    shortcut_weight: Tensor | None

    @property
    def of_launch(self) -> tuple[Tensor | None, ...]:
        return self.x, self.packed, self.bias, self.other, self.shortcut


@dataclass(frozen=True)
class Layer:
    """A convolution of N models with relu, and how it is divided (`tile`, the fields of a `Tile`).

    The images are padded so that stride 1 keeps their size. A shortcut has stride 2.
    """

    channels: int
    size: int
    filters: int
    kernel: int
    stride: int
    other: bool = False
    shortcut: int = 0  # its channels
    groups: int = 1
    dtype: str = "bfloat16"
    precision: str = "ieee"
    num_models: int = 4
    tile: tuple[int, ...] = ()

    @property
    def _sizes(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        return (self.stride,) * 2, (self.kernel // 2,) * 2, (1, 1)

    def problem(self) -> ConvProblem:
        """All sizes."""
        x = torch.empty(1, self.channels, self.size, self.size, device="meta")
        geometry = conv_geometry(x, self.filters, (self.kernel,) * 2, *self._sizes, self.groups)
        return ConvProblem(
            self.num_models,
            geometry,
            getattr(torch, self.dtype),
            DotPrecision(self.precision),
            Activation.RELU,
            self.other,
            Shortcut(self.shortcut, (2, 2)) if self.shortcut else None,
        )

    def operands(self, device: torch.device) -> Operands:
        """Random tensors on a device; weights are scaled so that results are about 1."""
        geometry, images = self.problem().geometry, (self.num_models, 1)
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int, inputs: int = 1) -> Tensor:
            values = torch.randn(shape, generator=generator, device=device) / inputs**0.5
            return values.to(getattr(torch, self.dtype))

        per_group, taps = self.channels // self.groups, self.kernel**2
        weight = draw(
            *(self.num_models, self.filters, per_group, self.kernel, self.kernel),
            inputs=per_group * taps,
        )
        shortcut = shortcut_weight = None
        if self.shortcut:
            twice = (2 * length for length in geometry.out_size)
            shortcut = draw(*images, self.shortcut, *twice)
            shape = self.num_models, self.filters, self.shortcut, 1, 1
            shortcut_weight = draw(*shape, inputs=self.shortcut)
        return Operands(
            x=draw(*images, self.channels, *geometry.size),
            packed=pack_weight(weight, shortcut_weight, self.groups),
            bias=draw(self.num_models, self.filters).float(),
            other=draw(*images, self.filters, *geometry.out_size) if self.other else None,
            shortcut=shortcut,
            weight=weight,
            shortcut_weight=shortcut_weight,
        )

    def exact(self, given: Operands) -> Tensor:
        """The layer in float64 by torch, `(N, B, K, OH, OW)`."""
        stacks = (
            given.x,
            given.weight,
            given.bias,
            given.other,
            given.shortcut,
            given.shortcut_weight,
        )
        results = []
        for model in range(self.num_models):
            own = [None if stack is None else stack[model].double() for stack in stacks]
            sizes = *self._sizes, self.groups, (2, 2), int(Activation.RELU)
            results.append(plain_conv2d_block(*own, None, *sizes))  # type: ignore[call-arg, arg-type]
        return torch.stack(results)

    def launch(self) -> None:
        """Launch it in its tile, on the CPU: for compiling alone."""
        from ensemble.compiler.cuda import launch

        given = self.operands(torch.device("cpu"))
        launch.conv2d(self.problem(), Tile(*self.tile), *given.of_launch)  # type: ignore[arg-type]


RESNET18 = {
    "conv1": Layer(3, 224, 64, 7, 2),
    "stage 1": Layer(64, 56, 64, 3, 1, other=True),
    "stage 2, first": Layer(64, 56, 128, 3, 2),
    "stage 2": Layer(128, 28, 128, 3, 1, other=True),
    "stage 2, shortcut": Layer(128, 28, 128, 3, 1, shortcut=64),
    "stage 3": Layer(256, 14, 256, 3, 1, other=True),
    "stage 4": Layer(512, 7, 512, 3, 1, other=True),
    "fc": Layer(512, 1, 1000, 1, 1),
}
OTHERS = {
    "ResNet-50, 1x1": Layer(256, 56, 64, 1, 1),
    "ResNet-50, shortcut": Layer(64, 56, 256, 1, 1, shortcut=64),
    "ResNeXt-50": Layer(128, 56, 128, 3, 1, groups=32),
    "odd": Layer(19, 9, 21, 3, 1, other=True),
}
