"""Tests of the Triton kernels: on a GPU where there is one, else by Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ensemble.compiler.cuda import launch
from ensemble.compiler.cuda.problem import (
    ConvProblem,
    DotPrecision,
    Shortcut,
    pack_weight,
    rounded_to_tf32,
)
from ensemble.compiler.cuda.tiles import Tile, candidate_tiles, default_tile
from ensemble.compiler.operators.activation import activated
from ensemble.compiler.planning.shape_inference import conv_geometry
from ensemble.compiler.planning.step import Activation, Kind, Step
from tests.compiler.cuda import interpreter
from tests.compiler.cuda.interpreter import DEVICE

pytestmark = pytest.mark.cuda
interpreter.require()
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Layer:
    """A convolution of N models to test."""

    num_models: int = 2
    batch: int = 1
    channels: int = 16
    size: tuple[int, int] = (6, 5)
    filters: int = 16
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    shared: bool = False
    bias: bool = True
    other: bool = False
    activation: Activation = Activation.NONE
    shortcut: tuple[int, tuple[int, int]] | None = None  # channels, stride
    dtype: torch.dtype = torch.float32
    channels_last: bool = True


def tensors(layer: Layer) -> dict[str, Tensor | None]:
    """Random inputs and weights of a layer."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(layer.dtype).to(DEVICE)

    models = () if layer.shared else (layer.num_models,)
    x = draw(*models, layer.batch, layer.channels, *layer.size)
    geometry = geometry_of(layer, x)
    result = layer.num_models, layer.batch, layer.filters, *geometry.out_size
    shortcut = shortcut_weight = None
    if layer.shortcut:
        channels, stride = layer.shortcut
        # Input sizes that are no multiple of the stride.
        size = [(out - 1) * step + 1 for out, step in zip(geometry.out_size, stride, strict=True)]
        shortcut = draw(layer.num_models, layer.batch, channels, *size)
        shortcut_weight = draw(layer.num_models, layer.filters, channels, 1, 1)
    weight = draw(layer.num_models, layer.filters, layer.channels // layer.groups, *layer.kernel)
    return {
        "x": channels_last(x) if layer.channels_last else x,
        "weight": weight,
        "bias": draw(layer.num_models, layer.filters).float() if layer.bias else None,
        "other": draw(*result) if layer.other else None,
        "shortcut": shortcut,
        "shortcut_weight": shortcut_weight,
    }


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(-3, -1).contiguous().movedim(-1, -3)


def geometry_of(layer: Layer, x: Tensor):  # type: ignore[no-untyped-def]
    sizes = layer.kernel, layer.stride, layer.padding, layer.dilation, layer.groups
    return conv_geometry(x, layer.filters, *sizes)


def problem_of(layer: Layer, x: Tensor, precision: DotPrecision) -> ConvProblem:
    return ConvProblem(
        layer.num_models,
        geometry_of(layer, x),
        layer.dtype,
        precision,
        layer.activation,
        layer.other,
        Shortcut(*layer.shortcut) if layer.shortcut else None,
    )


def exact(layer: Layer, given: dict[str, Tensor | None]) -> Tensor:
    """The layer of each model by torch, in float64 on the CPU."""
    named = {name: None if t is None else t.cpu().double() for name, t in given.items()}
    results = []
    for model in range(layer.num_models):
        own = {
            name: None if t is None else t if name == "x" and layer.shared else t[model]
            for name, t in named.items()
        }
        assert own["x"] is not None
        assert own["weight"] is not None
        result = functional.conv2d(
            own["x"],
            own["weight"],
            own["bias"],
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
        )
        if own["shortcut"] is not None and own["shortcut_weight"] is not None:
            assert layer.shortcut
            result += functional.conv2d(
                own["shortcut"], own["shortcut_weight"], None, layer.shortcut[1]
            )
        if own["other"] is not None:
            result += own["other"]
        step = Step(Kind.ACTIVATION, None, 0, 0, activation=layer.activation)  # type: ignore[arg-type]
        results.append(activated(step, result))
    return torch.stack(results)


def found(
    layer: Layer,
    given: dict[str, Tensor | None],
    tile: Tile | None = None,
    precision: DotPrecision = DotPrecision.IEEE,
) -> Tensor:
    x, weight = given["x"], given["weight"]
    assert x is not None
    assert weight is not None
    problem = problem_of(layer, x, precision)
    packed = pack_weight(weight, given["shortcut_weight"], layer.groups)
    packed = rounded_to_tf32(packed) if precision is DotPrecision.TF32 else packed
    tile = tile or default_tile(problem, launch.limits_of(x.device))
    return launch.conv2d(problem, tile, x, packed, given["bias"], given["other"], given["shortcut"])


def check(layer: Layer, tile: Tile | None = None) -> None:
    """The kernel's result is that of torch in float64, up to rounding."""
    if layer.dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as integers")
    given = tensors(layer)
    result, expected = found(layer, given, tile), exact(layer, given)
    assert result.shape == expected.shape
    assert result.dtype == layer.dtype
    assert result.movedim(-3, -1).is_contiguous()
    error = (result.cpu().double() - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCES[layer.dtype]


SMALL = Tile(16, 16, 16, num_warps=4, num_stages=2)
LAYERS = {
    "1x1": Layer(kernel=(1, 1), padding=(0, 0)),
    "3x3": Layer(),
    "7x7 of stride 2": Layer(
        channels=3, size=(11, 9), kernel=(7, 7), stride=(2, 2), padding=(3, 3)
    ),
    "stride 2": Layer(stride=(2, 2)),
    "stride in y only": Layer(stride=(2, 1), padding=(0, 2)),
    "no padding": Layer(padding=(0, 0)),
    "much padding": Layer(size=(2, 2), kernel=(5, 3), padding=(4, 2)),
    "dilation": Layer(size=(9, 7), dilation=(2, 3), padding=(2, 3)),
    "odd channels": Layer(channels=19, filters=21),
    "one channel": Layer(channels=1),
    "narrow channels, 1x1": Layer(channels=7, filters=5, kernel=(1, 1), padding=(0, 0)),
    "one filter": Layer(filters=1),
    "many filters": Layer(filters=40),
    "batch": Layer(batch=3),
    "shared images": Layer(shared=True, batch=2),
    "shared images in NCHW": Layer(shared=True, batch=2, channels=3, channels_last=False),
    "images in NCHW": Layer(channels_last=False),
    "no bias": Layer(bias=False),
    "residual": Layer(other=True, activation=Activation.RELU, batch=2),
    "groups": Layer(channels=40, filters=40, groups=2, other=True),
    "narrow groups": Layer(channels=16, filters=24, groups=4),
    "shortcut": Layer(shortcut=(24, (2, 2)), activation=Activation.RELU, stride=(2, 2), batch=2),
    "shortcut of a narrow convolution": Layer(channels=3, shortcut=(5, (1, 1))),
    "shortcut without bias": Layer(shortcut=(16, (1, 2)), bias=False, other=True),
    "one model": Layer(num_models=1),
    "bfloat16": Layer(dtype=torch.bfloat16, other=True, activation=Activation.RELU),
    "float16": Layer(dtype=torch.float16, channels=24),
}


@pytest.mark.parametrize("name", list(LAYERS))
def test_a_layer_matches_torch_in_float64(name: str) -> None:
    check(LAYERS[name])


@pytest.mark.parametrize("name", list(LAYERS))
def test_a_layer_with_a_split_depth_and_small_tiles_matches_torch(name: str) -> None:
    check(LAYERS[name], replace(SMALL, splits=2))


@pytest.mark.parametrize("activation", list(Activation)[:7])
@pytest.mark.parametrize("splits", [1, 4])
def test_every_activation_is_that_of_torch(activation: Activation, splits: int) -> None:
    layer = Layer(channels=20, filters=12, activation=activation, other=True)
    check(layer, replace(SMALL, splits=splits))


@pytest.mark.parametrize("blocks", [(16, 32, 16), (32, 16, 32), (64, 64, 16), (128, 16, 32)])
def test_every_shape_of_tiles_gives_the_same(blocks: tuple[int, int, int]) -> None:
    layer = Layer(channels=32, filters=24, size=(9, 7), batch=2, other=True)
    check(layer, Tile(*blocks, num_warps=4, num_stages=2))


def test_more_splits_than_blocks_of_the_depth_add_nothing() -> None:
    check(Layer(kernel=(1, 1), padding=(0, 0)), replace(SMALL, splits=8))


@pytest.mark.parametrize("splits", [1, 2])
def test_a_bias_that_all_models_share_is_not_read_beyond_its_end(splits: int) -> None:
    layer = Layer(num_models=3)
    given = tensors(layer)
    assert given["bias"] is not None
    given["bias"] = given["bias"][:1].expand(3, -1)
    result = found(layer, given, replace(SMALL, splits=splits))
    assert (result.cpu().double() - exact(layer, given)).abs().max() <= 1e-4


def in_tf32(x: Tensor) -> Tensor:
    """The nearest numbers of 10 bits of mantissa."""
    fraction, exponent = torch.frexp(x.double())
    return torch.ldexp((fraction * 2**11).round() / 2**11, exponent).to(x.dtype)


def test_tf32_factors_are_rounded_to_nearest_not_cut_off() -> None:
    layer = Layer(shortcut=(16, (1, 1)))
    given = tensors(layer)
    result = found(layer, given, precision=DotPrecision.TF32)
    factors = ("x", "weight", "shortcut", "shortcut_weight")
    rounded = {
        name: in_tf32(t) if name in factors and t is not None else t for name, t in given.items()
    }
    expected = exact(layer, rounded)
    error = (result.cpu().double() - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5  # 3e-4 if they are cut off


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_tf32_factors_that_are_not_finite_stay_so(value: float) -> None:
    layer = Layer(kernel=(1, 1), padding=(0, 0), bias=False)
    given = tensors(layer)
    x, weight = given["x"], given["weight"]
    assert x is not None
    assert weight is not None
    given["weight"] = weight.abs()
    x[1, 0, 3, 2, 2] = value
    result = found(layer, given, precision=DotPrecision.TF32)
    expected = torch.tensor(value, device=DEVICE).expand(layer.filters)
    torch.testing.assert_close(result[1, 0, :, 2, 2], expected, equal_nan=True)
    assert result[0].isfinite().all()


def test_nan_is_no_negative_number() -> None:
    layer = Layer(activation=Activation.RELU)
    given = tensors(layer)
    assert given["bias"] is not None
    given["bias"][1, 3] = float("nan")
    result = found(layer, given)
    assert result[1, :, 3].isnan().all()
    assert not result[0].isnan().any()


def test_every_candidate_of_the_autotuner_matches_torch() -> None:
    layer = Layer(channels=64, filters=64, size=(5, 5), other=True, shortcut=(32, (1, 1)))
    given = tensors(layer)
    assert given["x"] is not None
    problem = problem_of(layer, given["x"], DotPrecision.IEEE)
    tiles = candidate_tiles(problem, launch.limits_of(given["x"].device))
    assert len(set(tiles)) == len(tiles) >= 3
    for tile in tiles:
        check(layer, tile)
