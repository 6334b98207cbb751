"""Tests of the whole pipeline to the implicit GEMM: what it selects, fuses and leaves to torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from ensemble.compiler.cuda import launch
from ensemble.compiler.cuda.problem import ConvProblem, DotPrecision, rounded_to_tf32
from ensemble.compiler.cuda.tiles import Tile
from ensemble.compiler.cuda.tuning import TileTuner
from ensemble.compiler.graph.gemm_selection import select_gemms
from ensemble.compiler.operators.conv2d import CONV2D
from ensemble.compiler.operators.implicit_gemm import STACKED_CONV2D_BLOCK
from ensemble.compiler.pipeline import CompiledForward, compile_vmapped
from ensemble.compiler.planning.gemm_tuning import GemmTuning
from ensemble.compiler.planning.kernel_accuracy import ErrorBound
from ensemble.compiler.planning.step import Activation
from tests.compiler.cuda import interpreter
from tests.compiler.cuda.interpreter import DEVICE

pytestmark = pytest.mark.cuda
interpreter.require()
NUM_MODELS = 2


class Block(nn.Module):
    """A residual block that halves the image."""

    def __init__(self, channels: int, filters: int, kernel: int = 3) -> None:
        super().__init__()
        options = {"padding": kernel // 2, "bias": False}
        self.conv1 = nn.Conv2d(channels, filters, kernel, 2, **options)  # type: ignore[arg-type]
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, kernel, **options)  # type: ignore[arg-type]
        self.bn2 = nn.BatchNorm2d(filters)
        self.downsample = nn.Sequential(
            nn.Conv2d(channels, filters, 1, 2, bias=False), nn.BatchNorm2d(filters)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        out += self.downsample(x)
        return out.relu()


class Identity(Block):
    """A residual block without a convolution in its shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(out)) + out).relu()


class Unactivated(nn.Module):
    """A residual block whose first convolution gives what is convolved and added."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, first)
        self.second = nn.Conv2d(16, 16, second, padding=second // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x) + x


class Scaled(nn.Module):
    """A convolution without bias, and constants that all models share."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.conv(x) + 0.25


def net(*body: nn.Module, features: int) -> nn.Module:
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, 7))


NETS: dict[str, tuple[Callable[[], nn.Module], int, list[str]]] = {
    "residual": (
        lambda: net(nn.Conv2d(3, 8, 7, 2, 3), nn.MaxPool2d(3, 2, 1), Block(8, 16), features=16),
        4,
        [],
    ),
    "bottleneck": (lambda: net(Block(3, 16, kernel=1), features=16), 3, []),
    "identity": (lambda: net(Identity(3, 16), features=16), 3, []),
    "1x1, read twice": (lambda: net(Unactivated(1, 3), features=16), 3, []),
    "3x3, read twice by a 1x1": (lambda: net(Unactivated(3, 1), features=16), 3, []),
    "shared constants": (lambda: net(Scaled(), features=16), 2, []),
    "groups": (
        lambda: net(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3, groups=4), features=24),
        3,
        [],
    ),
    "depthwise": (
        lambda: net(
            *(nn.Conv2d(3, 16, 1), nn.ReLU6(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU6()),
            features=16,
        ),
        2,
        ["depthwise"],
    ),
    "activations": (
        lambda: net(
            *(nn.Conv2d(3, 16, 3), nn.SiLU(), nn.Conv2d(16, 16, 1), nn.Hardswish()),
            *(nn.Conv2d(16, 16, 1), nn.Sigmoid(), nn.Conv2d(16, 16, 1), nn.LeakyReLU(0.1)),
            features=16,
        ),
        5,
        [],
    ),
    "classes alone": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 17 * 13, 5)), 1, []),
}


def models_of(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> list[nn.Module]:
    """N models with weights, and statistics of batch norms, of their own."""
    torch.manual_seed(0)
    models = [make().eval() for _ in range(NUM_MODELS)]
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
                nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    return [model.to(DEVICE, dtype) for model in models]


def compiled(
    models: list[nn.Module],
    x: Tensor,
    precision: DotPrecision = DotPrecision.TF32X3,
    error_bound: ErrorBound = ErrorBound.PER_LAYER,
) -> CompiledForward:
    with torch.inference_mode():
        tuning = GemmTuning(precision, TileTuner(0.0, folder=Path("/nonexistent")), error_bound)
        return compile_vmapped(models, x, threads=1, gemm=tuning)


def check(found: CompiledForward, models: list[nn.Module], x: Tensor, tolerance: float) -> None:
    with torch.inference_mode():
        result = found.forward(x)
        exact = torch.stack(
            [
                copy.deepcopy(model).double()((x if x.dim() == 4 else x[index]).double())
                for index, model in enumerate(models)
            ]
        )
    assert (result - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("inputs", ["shared", "per_model"])
@pytest.mark.parametrize("name", list(NETS))
def test_a_net_is_computed_by_implicit_gemms_and_matches_float64(name: str, inputs: str) -> None:
    make, gemms, left = NETS[name]
    models = models_of(make)
    x = torch.randn(*(NUM_MODELS,) * (inputs == "per_model"), 2, 3, 17, 13, device=DEVICE)
    found = compiled(models, x)
    assert found.gemms == gemms
    assert list(found.left) == left
    check(found, models, x, 2e-6)


def test_in_16_bits_the_products_need_no_emulation() -> None:
    models = models_of(NETS["residual"][0], torch.float16)
    x = torch.randn(1, 3, 17, 13, dtype=torch.float16, device=DEVICE)
    found = compiled(models, x)
    assert not found.has_fast_kernels
    check(found, models, x, 4e-3)


def blocks(found: CompiledForward) -> list[tuple[object, ...]]:
    nodes = found.forward.graph.find_nodes(op="call_function", target=STACKED_CONV2D_BLOCK)
    return [node.args for node in nodes]


def test_a_shortcut_and_its_relu_become_part_of_the_last_convolution() -> None:
    models = models_of(NETS["residual"][0])
    *_, last, classes = blocks(compiled(models, torch.randn(1, 3, 17, 13, device=DEVICE)))
    other, shortcut, activation = last[3], last[4], last[12]
    assert other is None
    assert shortcut is not None
    assert activation == Activation.RELU
    assert classes[12] == Activation.NONE


class Inexact:
    """A launch whose TF32 products are off, in the layers that `is_off` selects."""

    def __init__(self, is_off: Callable[[ConvProblem], bool]) -> None:
        self._is_off, self._launch = is_off, launch.conv2d

    def __call__(self, problem: ConvProblem, tile: Tile, *tensors: Tensor) -> Tensor:
        result = self._launch(problem, tile, *tensors)
        is_off = problem.precision is DotPrecision.TF32X3 and self._is_off(problem)
        return result * (1 + 1e-4) if is_off else result


def test_a_layer_whose_emulated_products_are_off_does_without_tensor_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        launch, "conv2d", Inexact(lambda problem: problem.geometry.kernel == (7, 7))
    )
    models = models_of(NETS["residual"][0])
    x = torch.randn(1, 3, 17, 13, device=DEVICE)
    found = compiled(models, x)
    assert [args[-2] for args in blocks(found)] == ["ieee", "tf32x3", "tf32x3", "tf32x3"]
    assert found.rejections == (
        "0.weight: without tensor cores, for three TF32 products differ by 1e-04",
    )
    check(found, models, x, 2e-6)


def test_tf32_products_that_the_caller_asks_for_are_not_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = models_of(NETS["residual"][0])
    found = compiled(models, torch.randn(1, 3, 17, 13, device=DEVICE), DotPrecision.TF32)
    assert {args[-2] for args in blocks(found)} == {"tf32"}
    weights = [weight for name, weight in found.forward.named_buffers() if "pack" in name]
    assert len(weights) == 4
    assert all(torch.equal(weight, rounded_to_tf32(weight)) for weight in weights)
    assert not found.has_fast_kernels


def test_without_fast_kernels_no_layer_emulates_float32() -> None:
    models = models_of(NETS["residual"][0])
    x = torch.randn(1, 3, 17, 13, device=DEVICE)
    found = compiled(models, x, error_bound=ErrorBound.NO_FAST_KERNELS)
    assert {args[-2] for args in blocks(found)} == {"ieee"}


@pytest.mark.parametrize(
    ("width", "left"), [(2**22 - 1, ["images too large"]), (2**22 - 2, [])], ids=str
)
def test_images_whose_last_tile_ends_beyond_32_bits_are_left_to_torch(
    width: int, left: list[str]
) -> None:
    graph = fx.Graph()
    shapes = {"weight": (1, 1, 1, 1), "x": (1, 1, 512, width)}
    inputs = {name: graph.placeholder(name) for name in shapes}
    none, ones = [0, 0], [1, 1]
    conv = graph.call_function(
        CONV2D, (inputs["x"], inputs["weight"], None, None, ones, none, ones, 1, False)
    )
    graph.output(conv)
    for name, node in inputs.items():
        node.meta["val"] = torch.empty(shapes[name], device="meta")
    conv.meta["val"] = inputs["x"].meta["val"]
    assert select_gemms(fx.GraphModule(nn.Module(), graph)) == left
