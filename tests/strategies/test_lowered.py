"""The strategy `lowered_vmap`: its accuracy, what it holds, and what it falls back to."""

import copy
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ensemble
from ensemble import strategies
from ensemble.compiler import pipeline
from ensemble.compiler.cuda import launch
from ensemble.compiler.cuda.tiles import Limits, default_tile
from ensemble.compiler.cuda.tuning import TileTuner
from ensemble.compiler.graph.constant_folding import State
from ensemble.compiler.pipeline import compile_vmapped
from ensemble.errors import UnavailableError
from ensemble.machine.precision import Float32Precision, float32_precision
from ensemble.models import stacking
from ensemble.models.vision import torchvision
from ensemble.strategies import lowered
from ensemble.strategies.agreement import TOLERANCES
from ensemble.strategies.build_result import ForwardFn
from tests import nets
from tests.checkpoints import lively
from tests.compiler.cuda import interpreter
from tests.compiler.cuda.interpreter import DEVICE
from tests.marks import some_slow
from tests.nets import Net, Norm, SumWith
from tests.tiny import independent

pytest.importorskip("numba")

ROOT = Path(__file__).parents[2]
H100 = Limits(132, 227 * 2**10)
LIMIT = 2e-5  # of the largest logit, against float64


def in_float64(models: Sequence[nn.Module], x: Tensor) -> Tensor:
    inputs = x.double() if x.dim() == 5 else [x.double()] * len(models)
    with torch.no_grad():
        return torch.stack(
            [
                copy.deepcopy(model).double()(batch)
                for model, batch in zip(models, inputs, strict=True)
            ]
        )


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("seed", some_slow(range(5), quick=2))
def test_the_error_against_float64_is_small_for_any_weights(seed: int) -> None:
    models = [lively("resnet18", 10 * seed + index) for index in range(2)]
    x = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(seed))
    found = ensemble.build("lowered_vmap", models, x)(x)
    assert error(found, in_float64(models, x)) < LIMIT


@pytest.mark.parametrize("seed", some_slow(range(3), quick=1))
def test_badly_scaled_weights_keep_the_error_small(seed: int) -> None:
    """Batch norm scales spread over four orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    models = [lively("resnet18", seed + index) for index in range(2)]
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                spread = torch.rand(len(module.weight), generator=generator) * 4 - 2
                module.weight.data.copy_(10**spread)
    x = torch.randn(1, 3, 96, 96, generator=generator)
    exact = in_float64(models, x)
    found = ensemble.build("lowered_vmap", models, x)(x)
    assert error(found, exact) < LIMIT


class Cancelling(nn.Module):
    """A convolution whose large products nearly cancel: Winograd's own trap."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        nn.init.constant_(self.first.bias, 1000.0)  # type: ignore[arg-type]
        with torch.no_grad():
            self.second.weight -= self.second.weight.mean(1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).mean((2, 3))


def test_a_layer_where_winograd_is_inaccurate_takes_the_direct_kernel_and_is_reported() -> None:
    torch.manual_seed(0)
    models = [Cancelling().eval().requires_grad_(False) for _ in range(2)]
    x = torch.randn(1, 3, 16, 16)
    built = strategies.build_unverified("lowered_vmap", models, x)
    forward, note = built.forward, built.note
    assert note.startswith("kernels: 2 direct, 1 average pooling; second.weight: direct, for Wino")
    expected = torch.stack([model(x) for model in models])
    assert error(forward(x), in_float64(models, x)) < 5 * error(expected, in_float64(models, x))


def test_an_example_without_contrast_does_not_hide_winograds_error() -> None:
    torch.manual_seed(0)
    models = [Cancelling().eval().requires_grad_(False)]
    built = strategies.build_unverified("lowered_vmap", models, torch.zeros(1, 3, 16, 16))
    assert "second.weight: direct" in built.note


class Active(nn.Module):
    """Activations of results that nothing else reads, and one whose input is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 3, 1, 1, groups=24)
        self.c, self.d = nn.Conv2d(24, 40, 1), nn.Conv2d(40, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.b(nn.functional.hardswish(self.a(x))))
        x = nn.functional.relu6(self.c(x))
        y = self.d(x)
        return (nn.functional.sigmoid(y) + y).mean((2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_activation_is_fused_unless_its_input_has_other_readers(
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    models = [Active().eval().requires_grad_(False) for _ in range(2)]
    x = 4 * torch.randn(1, 3, 9, 9)
    built = strategies.build_unverified(
        "lowered_vmap", [copy.deepcopy(m).to(dtype) for m in models], x.to(dtype)
    )
    assert " 1 activation," in built.note
    limit = LIMIT if dtype == torch.float32 else TOLERANCES[dtype]
    assert error(built.forward(x.to(dtype)).float(), in_float64(models, x)) < limit


class Constants(nn.Module):
    """What does not depend on x, in every place of a convolution but its own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.pos, self.channel = nn.Parameter(torch.randn(32, 8, 8)), nn.Parameter(torch.randn(32))
        self.seed = nn.Parameter(torch.randn(1, 32, 8, 8))
        self.a, self.b = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.c, self.d = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.a(x) + self.pos).relu()
        x = self.b(x) + self.channel[:, None, None]
        return torch.relu(self.c(self.seed) + x).add(self.d(x)).mean((2, 3))


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("num_models", [1, 2])
def test_constants_are_summands_and_inputs_as_they_are_in_the_model(
    images: int, num_models: int
) -> None:
    torch.manual_seed(0)
    models = [Constants().eval().requires_grad_(False) for _ in range(num_models)]
    x, example = torch.randn(2, images, 3, 8, 8)
    built = strategies.build_unverified("lowered_vmap", models, example)
    assert "direct" in built.note
    assert error(built.forward(x), in_float64(models, x)) < LIMIT


def test_a_resnet_becomes_one_program_on_constants_that_were_packed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = [lively("resnet18", index) for index in range(2)]
    x = torch.randn(1, 3, 64, 64)
    states: list[State] = []
    original = pipeline.stacked_weights

    def stacked_weights(*arguments: Any) -> State:
        states.append(original(*arguments))
        assert states[-1]
        return states[-1]

    monkeypatch.setattr(pipeline, "stacked_weights", stacked_weights)
    with torch.inference_mode():
        found = compile_vmapped(models, x, threads=2)
    (state,) = states
    assert not state
    called = [node.op for node in found.forward.graph.nodes]
    assert called == ["placeholder", "call_module", "call_function", "call_function", "output"]
    assert len(found.steps) == 20 + 3
    assert not list(found.forward.buffers())


@pytest.mark.filterwarnings("ignore:.*initialization of GoogleNet")
@pytest.mark.parametrize(
    ("arch", "programs"),
    [
        ("resnext50_32x4d", 1),
        # Adaptive pooling to 7x7 pixels is torch's own.
        pytest.param("vgg11_bn", 2, marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", 1, marks=pytest.mark.slow),
        ("mobilenet_v3_small", 1),
        pytest.param("efficientnet_b0", 1, marks=pytest.mark.slow),
        pytest.param("regnet_y_400mf", 1, marks=pytest.mark.slow),
        pytest.param("densenet121", 1, marks=pytest.mark.slow),
        ("squeezenet1_1", 1),
        pytest.param("googlenet", 1, marks=pytest.mark.slow),
        ("shufflenet_v2_x0_5", 1),
        # Layer norm and attention are torch's own; a mask is written piece by piece.
        pytest.param("swin_t", None, marks=pytest.mark.slow),
    ],
)
def test_other_architectures_are_programs_too(arch: str, programs: int | None) -> None:
    models = [lively(arch, index) for index in range(2)]
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        graph = compile_vmapped(models, x, threads=torch.get_num_threads()).forward
        found = graph(x)
    assert error(found, in_float64(models, x)) < LIMIT
    called = [node.op for node in graph.graph.nodes].count("call_module")
    assert called == programs if programs else called > 1


@pytest.mark.parametrize("classes", [1, 7, 32, 69])
@pytest.mark.parametrize("images", [1, 30])
@pytest.mark.parametrize("pooled", [True, False])
def test_a_linear_layer_is_right_for_any_number_of_classes(
    pooled: bool, images: int, classes: int
) -> None:
    torch.manual_seed(0)
    pool = nn.AdaptiveAvgPool2d(1) if pooled else nn.Identity()
    inputs = 40 * (1 if pooled else 3 * 2)
    models = [
        nn.Sequential(
            *(nn.Conv2d(3, 40, 3), pool, nn.Flatten(), nn.Linear(inputs, classes, bias=images > 1))
        ).eval()
        for _ in range(3)
    ]
    x = torch.randn(images, 3, 5, 4)
    with torch.inference_mode():
        graph = compile_vmapped(models, x, threads=torch.get_num_threads()).forward
        assert error(graph(x), in_float64(models, x)) < 1e-5
    assert [node.op for node in graph.graph.nodes].count("call_module") == 1


class FewChannels(nn.Module):
    """Convolutions of few channels read an image and what a step writes, and so do others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 7, 3, padding=1)
        self.c, self.d = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 5, 3, padding=1, groups=5)
        self.norm, self.fc = nn.BatchNorm2d(12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = (self.a(x) + self.c(x)).relu()
        both = torch.cat([self.b(first), self.d(first) + nn.functional.silu(first)], 1)
        both = self.norm(both) * torch.sigmoid(both.mean((2, 3), keepdim=True))
        return self.fc(nn.functional.hardswish(both).mean((2, 3)))


@pytest.mark.parametrize("per_model", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_channels_is_right(per_model: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    models = [FewChannels().eval().requires_grad_(False).to(dtype) for _ in range(3)]
    x = torch.randn(*([3] if per_model else []), 2, 3, 9, 7).to(dtype)
    found = ensemble.build("lowered_vmap", models, x)(x)
    assert error(found, in_float64(models, x)) < (LIMIT if dtype == torch.float32 else 3e-2)


def test_a_view_of_a_tensor_with_other_strides_than_in_its_trace_works() -> None:
    net = Net((SumWith(how="method alpha", what="conv"), Norm()), (5, 5))
    models, x = nets.models(net, 2, torch.float32), torch.randn(2, 3, 5, 5)
    found = ensemble.build("lowered_vmap", models, x)(x)
    torch.testing.assert_close(found, independent(models, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_models", some_slow([3, 1, 2, 5], quick=2))
def test_calls_from_several_threads_do_not_mix(num_models: int) -> None:
    models = [lively("resnet18", index) for index in range(num_models)]
    images = [torch.randn(1, 3, 64, 64) for _ in range(6)]
    forward = ensemble.build("lowered_vmap", models, images[0])
    expected = [forward(x) for x in images]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(forward, images))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@lru_cache(maxsize=1)
def forward_of_resnets() -> ForwardFn:
    models = [lively("resnet18", index) for index in range(2)]
    return ensemble.build("lowered_vmap", models, torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("per_model", some_slow([True, False], quick=1))
def test_the_cuda_path_is_batched_matrix_products_under_fake_tensors(
    per_model: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda self, _: self, raising=False)
    with FakeTensorMode(), torch.device("cuda"):
        template = torchvision.models.resnet18(num_classes=7).eval()
        models = stacking.allocate(template, 3, device=torch.device("cuda"))
        x = torch.empty((3, 2, 3, 64, 64) if per_model else (2, 3, 64, 64))
        graph = compile_vmapped(models, x, threads=torch.get_num_threads()).forward
        logits = graph(x)
    assert (logits.device.type, logits.shape) == ("cuda", (3, 2, 7))
    names = [str(node.target) for node in graph.graph.nodes]
    assert sum(name.startswith("aten.bmm") for name in names) >= 20
    assert not [name for name in names if "conv" in name]


@pytest.mark.parametrize("per_model", some_slow([True, False], quick=1))
def test_the_triton_path_has_the_right_device_dtype_and_shape_under_fake_tensors(
    per_model: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda self, _: self, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(launch, "limits_of", lambda device: H100)
    monkeypatch.setattr(TileTuner, "select", lambda self, problem, *_: default_tile(problem, H100))
    with FakeTensorMode(), torch.device("cuda"):
        template = torchvision.models.resnet18(num_classes=7).eval()
        device = torch.device("cuda")
        models = stacking.allocate(template, 3, device=device, dtype=torch.bfloat16)
        x = torch.empty((3, 2, 3, 64, 64) if per_model else (2, 3, 64, 64), dtype=torch.bfloat16)
        with torch.inference_mode():
            built = lowered.implicit_gemm_vmap(models, x, tune_seconds=0.0)
            logits = built.forward(x)
    found = logits.device.type, logits.dtype, logits.shape
    assert found == ("cuda", torch.bfloat16, (3, 2, 7))
    assert built.note == "kernels: 18 implicit GEMM"


@pytest.mark.cuda
@pytest.mark.skipif(bool(interpreter.why_not()), reason=interpreter.why_not())
def test_the_triton_kernels_give_what_the_loop_gives() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten()).eval() for _ in range(2)]
    models, x = [model.to(DEVICE) for model in models], torch.rand(1, 3, 7, 6, device=DEVICE)
    with torch.inference_mode(), float32_precision(Float32Precision.IEEE):
        built = lowered.implicit_gemm_vmap(models, x, tune_seconds=0.0)
        expected = torch.stack([model(x) for model in models])
        torch.testing.assert_close(built.forward(x), expected, rtol=0, atol=1e-5)
    assert built.note == "kernels: 1 implicit GEMM"


def test_a_device_without_the_tensor_cores_that_triton_needs_is_unavailable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with FakeTensorMode():
        x = torch.empty(1, 3, 8, 8, device="cuda")
    with pytest.raises(UnavailableError, match=r"need compute capability 8.0, cuda:0 has 7.5"):
        lowered.implicit_gemm_vmap([], x, tune_seconds=0.0)


def test_a_triton_that_cannot_compile_is_an_unavailable_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC")

    monkeypatch.setattr(launch, "conv2d", fail)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten()).eval()
    expected = "Triton's kernels fail here: RuntimeError: Failed to find C compiler"
    with torch.inference_mode(), pytest.raises(UnavailableError, match=expected):
        lowered.implicit_gemm_vmap([model], torch.rand(1, 3, 7, 6), tune_seconds=0.0)


def test_without_triton_the_row_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowered, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="Triton, which is not installed"):
        lowered.implicit_gemm_vmap([], torch.rand(1, 3, 7, 6), tune_seconds=0.0)


def test_the_kernels_of_the_cpu_need_no_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None; import torch; from torch import nn;"
        " from ensemble.strategies import lowered;"
        " import ensemble.compiler.pipeline as pipeline;"
        " model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten()).eval();"
        " print(pipeline.compile_vmapped([model], torch.rand(1, 3, 7, 6), threads=1).gemms)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
