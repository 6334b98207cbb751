"""Exported files: each runs without this package and gives the models' own outputs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ensemble
from ensemble.artifacts import onnx as onnx_file
from ensemble.artifacts import pt2
from ensemble.artifacts.formats import Format
from ensemble.errors import InputError, UnavailableError
from ensemble.strategies import exported
from tests.artifacts import proto_schema
from tests.tiny import independent, tiny_models

BATCHES = (1, 3, 7)  # none is the example's, which is 2
SHAPES = {"shared": (2, 3, 8, 8), "per_model": (3, 2, 3, 8, 8)}
QUIET = pytest.mark.filterwarnings("ignore")  # of third-party packages
NEEDS_ONNX = "pip install -r requirements-peers.txt"

# In an isolated process: no file of this package can be imported.
ALONE = """
import sys
sys.modules["ensemble"] = None
path, inputs, outputs = sys.argv[1:]
{load}
{save}
assert not [name for name in sys.modules if name.startswith(("ensemble.", "tests"))]
"""
WITH_TORCH = """
import torch
found = [call(x) for x in torch.load(inputs)]
torch.save(found, outputs)
"""
WITH_NUMPY = """
import numpy
given = numpy.load(inputs)
numpy.savez(outputs, *[call(given[name]) for name in given.files])
"""
LOAD = {
    "torch.export": "import torch; call = torch.export.load(path).module()",
    "aoti": "import torch, torch._inductor; call = torch._inductor.aoti_load_package(path)",
    "onnxruntime": """
import onnxruntime
session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
call = lambda x: session.run(["logits"], {"x": x})[0]
""",
    "openvino": """
import openvino
compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
call = lambda x: compiled({"x": x})["logits"].copy()
""",
}


def alone(runtime: str, path: Path, inputs: list[Tensor]) -> list[Tensor]:
    """What a process with this runtime, and without this package, computes of a file."""
    with_torch = runtime in ("torch.export", "aoti")
    folder = path.parent
    given, taken = folder / "inputs.npz", folder / "outputs.npz"
    if with_torch:
        torch.save(inputs, given)
    else:
        np.savez(given, *[x.numpy() for x in inputs])
    program = ALONE.format(load=LOAD[runtime], save=WITH_TORCH if with_torch else WITH_NUMPY)
    command = [sys.executable, "-I", "-c", program, *map(str, (path, given, taken))]
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    if with_torch:
        found: list[Tensor] = torch.load(taken)
        return found
    arrays = np.load(taken)
    return [torch.from_numpy(arrays[name]) for name in arrays.files]


def inputs_like(shape: tuple[int, ...], batches: tuple[int, ...] = BATCHES) -> list[Tensor]:
    """New images at several batch sizes."""
    generator = torch.Generator().manual_seed(5)
    sizes = [(*shape[:-4], batch, *shape[-3:]) for batch in batches]
    return [torch.randn(size, generator=generator) for size in sizes]


@QUIET
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("suffix", "runtime"),
    [
        (".pt2", "torch.export"),
        pytest.param(".aoti.pt2", "aoti", marks=pytest.mark.slow),
        (".onnx", "onnxruntime"),
        (".onnx", "openvino"),
    ],
)
def test_a_file_alone_gives_the_models_outputs_at_any_batch_size(
    suffix: str, runtime: str, shape: str, tmp_path: Path
) -> None:
    if suffix == ".onnx":
        for package in ("onnxscript", "onnxruntime", runtime):
            pytest.importorskip(package, reason=NEEDS_ONNX)
    models = tiny_models(3)
    report = ensemble.export(models, torch.zeros(SHAPES[shape]), tmp_path / f"all{suffix}")
    assert report.path == tmp_path / f"all{suffix}"
    assert report.bytes == report.path.stat().st_size
    assert report.batch_sizes == (1, 2, 3, 5)
    assert report.max_rel_error is not None
    assert report.max_rel_error < 1e-5
    inputs = inputs_like(SHAPES[shape])
    for x, found in zip(inputs, alone(runtime, report.path, inputs), strict=True):
        expected = independent(models, x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.argmax(-1), expected.argmax(-1))


@QUIET
@pytest.mark.parametrize("shape", SHAPES)
def test_a_triton_model_takes_the_batch_first_as_its_configuration_says(
    shape: str, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx", reason=NEEDS_ONNX)
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=NEEDS_ONNX)
    models = tiny_models(3)
    other = tmp_path / "triton_repository" / "other_model"
    other.mkdir(parents=True)
    report = ensemble.export(models, torch.zeros(SHAPES[shape]), other.parent)
    assert other.is_dir()
    assert report.path == other.parent / "tinynet_x3"
    config = proto_schema.parse((report.path / "config.pbtxt").read_text())
    file = report.path / "1" / "model.onnx"
    graph = onnx.load(file).graph
    for value, described in (
        (graph.input[0], config.input[0]),
        (graph.output[0], config.output[0]),
    ):
        batch, *sizes = value.type.tensor_type.shape.dim
        assert (value.name, batch.dim_param) == (described.name, "batch")
        assert [size.dim_value for size in sizes] == list(described.dims)
    inputs = inputs_like(SHAPES[shape])
    given = [x.transpose(0, 1).contiguous() if x.dim() == 5 else x for x in inputs]
    for x, found in zip(inputs, alone("onnxruntime", file, given), strict=True):
        expected = independent(models, x).transpose(0, 1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class Segmentation(nn.Module):
    """(B, 3, H, W) -> (B, 4, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = self.head(self.norm(self.conv(x)).relu_())
        return functional.interpolate(found, size=x.shape[-2:], mode="bilinear")


class InPlace(Segmentation):
    """It doubles the caller's images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2))


class Classes(Segmentation):
    """(B, 3, H, W) -> (B, H, W), integers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(1)


def made(kind: type[nn.Module], count: int = 2) -> list[nn.Module]:
    torch.manual_seed(3)
    return [kind().eval().requires_grad_(False) for _ in range(count)]


@QUIET
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize("kind", [Segmentation, InPlace, Classes])
def test_outputs_of_any_shape_are_stacked(
    kind: type[nn.Module], suffix: str, tmp_path: Path
) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnxscript", reason=NEEDS_ONNX)
        pytest.importorskip("onnxruntime", reason=NEEDS_ONNX)
    models, path = made(kind), tmp_path / f"all{suffix}"
    ensemble.export(models, torch.zeros(1, 3, 16, 16), path)
    call = exported._load(Format.PT2 if suffix == ".pt2" else Format.ONNX, path, torch.zeros(1))
    (x,) = inputs_like((1, 3, 16, 16), (3,))
    before = x.clone()
    found = call(x)
    assert torch.equal(x, before)
    expected = torch.stack([model(x.clone()) for model in models])
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_of_the_models_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    models = [model.to(dtype) for model in tiny_models(2)]
    report = ensemble.export(models, torch.zeros(1, 3, 8, 8, dtype=dtype), tmp_path / "all.pt2")
    program = torch.export.load(report.path)
    assert {tensor.dtype for tensor in program.state_dict.values()} <= {dtype, torch.int64}
    assert program.module()(torch.zeros(4, 3, 8, 8, dtype=dtype)).dtype == dtype


def test_a_program_has_torchs_operators_and_no_batch_norm_and_names_its_tensors(
    tmp_path: Path,
) -> None:
    report = ensemble.export(tiny_models(2), torch.zeros(1, 3, 8, 8), tmp_path / "all.pt2")
    program = torch.export.load(report.path)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    names = [target.name() for target in targets]
    assert {name.partition("::")[0] for name in names} == {"aten"}
    assert names.count("aten::conv2d") == 2
    assert not [name for name in names if "norm" in name]
    assert program.graph_signature.user_inputs == ("x",)
    assert program.graph_signature.user_outputs == ("logits",)
    assert str(Path(__file__).parents[1]).encode() not in report.path.read_bytes()


class Wide(nn.Module):
    """A megabyte of weights, so that the rest of a file is small."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 128, 3, bias=False), nn.BatchNorm2d(128)
        self.more, self.fc = nn.Conv2d(128, 192, 3), nn.Linear(192, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        return self.fc(self.more(x).mean((2, 3)))


@QUIET
@pytest.mark.parametrize(
    ("suffix", "other"),  # bytes that are no weights: AOTInductor's is a library with its code
    [
        (".pt2", 80_000),
        pytest.param(".aoti.pt2", 2_000_000, marks=pytest.mark.slow),
        (".onnx", 10_000),
    ],
)
@pytest.mark.parametrize(
    ("given", "stored"), [("different", 3), ("one", 1), ("a shared backbone", 1)]
)
def test_weights_are_stored_once(
    given: str, stored: int, suffix: str, other: int, tmp_path: Path
) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnxscript", reason=NEEDS_ONNX)
        pytest.importorskip("onnxruntime", reason=NEEDS_ONNX)
    models = made(Wide, 3)
    weights = sum(parameter.nbytes for parameter in models[0].parameters())
    if given == "one":
        models = [models[0]] * 3
    elif given == "a shared backbone":
        for model in models[1:]:
            model.more.load_state_dict(models[0].more.state_dict())  # type: ignore[union-attr]
    report = ensemble.export(models, torch.zeros(1, 3, 8, 8), tmp_path / f"all{suffix}")
    heads = 2 * 30_000 if given == "a shared backbone" else 0  # of the two other models
    assert weights * stored * 0.98 <= report.bytes <= weights * stored + heads + other


@QUIET
def test_weights_above_the_limit_of_a_message_are_external_data_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript", reason=NEEDS_ONNX)
    pytest.importorskip("onnxruntime", reason=NEEDS_ONNX)
    monkeypatch.setattr(onnx_file, "MAX_MESSAGE_BYTES", 2**19)
    models = made(Wide)
    report = ensemble.export(models, torch.zeros(1, 3, 8, 8), tmp_path / "all.onnx")
    data = tmp_path / "all.onnx.data"
    assert report.bytes == report.path.stat().st_size + data.stat().st_size
    assert report.path.stat().st_size < 50_000 < data.stat().st_size
    inputs = inputs_like((2, 3, 8, 8))
    for x, found in zip(inputs, alone("onnxruntime", report.path, inputs), strict=True):
        torch.testing.assert_close(found, independent(models, x), rtol=1e-4, atol=1e-4)


class Branching(Segmentation):
    """Its control flow depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.max() > 1 else x * 2)


class FixedBatch(Segmentation):
    """It runs batches of two alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).reshape(2, 4, -1)


class Counting(Segmentation):
    """Stateful."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) + self.calls


class Dropping(Segmentation):
    """Random."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(super().forward(x), training=True)


class Foreign(Segmentation):
    """An operator of torchvision."""

    def forward(self, x: Tensor) -> Tensor:
        boxes = x.new_tensor([[0, 0, 0, 4, 4]])
        return torch.ops.torchvision.roi_align(super().forward(x), boxes, 1.0, 2, 2, 1, False)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Branching, "their code reads values of tensors"),
        (FixedBatch, "their code fixes the batch size"),
        (Counting, "does not support stateful models"),
        (Dropping, "does not support models that draw random numbers"),
        (Foreign, "operators that torch alone does not have: torchvision::roi_align"),
    ],
)
def test_models_that_no_file_can_hold_are_unavailable_and_leave_nothing(
    kind: type[nn.Module], reason: str, tmp_path: Path
) -> None:
    import torchvision  # noqa: F401  # registers its operators

    (tmp_path / "all.pt2").write_bytes(b"PK\x03\x04before")
    with pytest.raises(UnavailableError, match=reason) as caught:
        ensemble.export(made(kind), torch.zeros(2, 3, 16, 16), tmp_path / "all.pt2")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["all.pt2"]
    assert (tmp_path / "all.pt2").read_bytes() == b"PK\x03\x04before"


class Unbatched(Segmentation):
    """One number for all images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean()


def test_triton_refuses_outputs_without_a_batch_dimension(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="outputs of these models have no batch dimension"):
        ensemble.export(made(Unbatched), torch.zeros(2, 3, 16, 16), tmp_path / "a_repository")
    assert list(tmp_path.iterdir()) == []


class Pair(Segmentation):
    """Two outputs."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            lambda: (made(Pair), torch.zeros(1, 3, 8, 8)),
            "expected one tensor from each model, got tuple",
        ),
        (lambda: ([], torch.zeros(1, 3, 8, 8)), "expected at least one model, got none"),
        (lambda: (tiny_models(2), torch.zeros(3, 8, 8)), "example: expected shape"),
        (lambda: (tiny_models(2), torch.zeros(1, 4, 8, 8)), "example: model 0 fails with it"),
    ],
)
def test_unusable_arguments_are_errors_and_leave_nothing(
    arguments: Callable[[], tuple[list[nn.Module], Tensor]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        ensemble.export(*arguments(), tmp_path / "all.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_stops_a_writer_leaves_no_temporary_file(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(program: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr("ensemble.artifacts.pt2.write", write)
    with pytest.raises((KeyboardInterrupt, UnavailableError)):
        ensemble.export(tiny_models(2), torch.zeros(1, 3, 8, 8), tmp_path / "all.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_disagrees_with_the_models_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = pt2.load
    monkeypatch.setattr(
        "ensemble.artifacts.pt2.load",
        lambda path: lambda x: load(path)(x) * (1 + (len(x) == 5) * 0.1),
    )
    with pytest.raises(
        UnavailableError, match="the exported file is wrong at batch 5: outputs dis"
    ):
        ensemble.export(tiny_models(2), torch.zeros(1, 3, 8, 8), tmp_path / "all.pt2")
    assert list(tmp_path.iterdir()) == []


@QUIET
def test_a_folder_that_is_no_model_of_triton_is_not_replaced(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason=NEEDS_ONNX)
    pytest.importorskip("onnxruntime", reason=NEEDS_ONNX)
    place = tmp_path / "triton_repository" / "tinynet_x2"
    place.mkdir(parents=True)
    (place / "precious").write_text("mine")
    models, x = tiny_models(2), torch.zeros(1, 3, 8, 8)
    with pytest.raises(
        InputError, match=r"expected no folder or a model of Triton at .*tinynet_x2"
    ):
        ensemble.export(models, x, place.parent)
    assert (place / "precious").read_text() == "mine"
    (place / "config.pbtxt").write_text("an earlier one")
    (place / "1").mkdir()
    ensemble.export(models, x, place.parent)
    assert sorted(path.name for path in place.iterdir()) == ["1", "config.pbtxt"]
    assert [path.name for path in tmp_path.iterdir()] == ["triton_repository"]


def test_models_of_different_classes_are_one_program(tmp_path: Path) -> None:
    models = [*made(Segmentation, 1), *made(InPlace, 1)]
    ensemble.export(models, torch.zeros(2, 3, 16, 16), tmp_path / "all.pt2")
    call = torch.export.load(tmp_path / "all.pt2").module()
    (x,) = inputs_like((1, 3, 16, 16), (4,))
    expected = torch.stack([model(x.clone()) for model in models])
    torch.testing.assert_close(call(x), expected, rtol=1e-4, atol=1e-4)
