"""A model of a Triton Inference Server model repository, for its ONNX Runtime back end.

Triton batches requests along the first dimension of all inputs and outputs, which `config.pbtxt`
leaves out. Its PyTorch back end takes AOTInductor packages too (`platform: "torch_aoti"`), but
without batches of several requests: "Support for batch sizes greater than 1 ... has not be
completed" (README of triton-inference-server/pytorch_backend, 26.05). Fields: `ModelConfig` in
model_config.proto of triton-inference-server/common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ensemble.artifacts.program import INPUT, OUTPUT

CONFIG, VERSION, MODEL_FILE = "config.pbtxt", "1", "model.onnx"
# Of a request batch; the memory of activations grows with it.
MAX_BATCH_SIZE = 64
_TYPES = {
    torch.bool: "TYPE_BOOL",
    torch.uint8: "TYPE_UINT8",
    torch.int8: "TYPE_INT8",
    torch.int16: "TYPE_INT16",
    torch.int32: "TYPE_INT32",
    torch.int64: "TYPE_INT64",
    torch.float16: "TYPE_FP16",
    torch.float32: "TYPE_FP32",
    torch.float64: "TYPE_FP64",
    torch.bfloat16: "TYPE_BF16",
}


@dataclass(frozen=True)
class Model:
    """A served model: shapes are without the batch dimension."""

    name: str
    input_shape: Sequence[int]
    input_dtype: torch.dtype
    output_shape: Sequence[int]
    output_dtype: torch.dtype
    max_batch_size: int
    device_type: str


def config(model: Model) -> str:
    """The text of `config.pbtxt`: requests are batched as they wait; one instance has all cores, or
    each GPU one."""
    kind = "KIND_GPU" if model.device_type == "cuda" else "KIND_CPU"
    return f"""\
name: "{model.name}"
backend: "onnxruntime"
max_batch_size: {model.max_batch_size}
input [
  {_tensor(INPUT, model.input_dtype, model.input_shape)}
]
output [
  {_tensor(OUTPUT, model.output_dtype, model.output_shape)}
]
dynamic_batching {{ }}
instance_group [
  {{ count: 1 kind: {kind} }}
]
"""


def _tensor(name: str, dtype: torch.dtype, shape: Sequence[int]) -> str:
    # A tensor of one number per image: Triton requires a dimension, and reshapes.
    dims = (
        f"dims: [ {', '.join(map(str, shape))} ]" if shape else "dims: [ 1 ] reshape { shape: [ ] }"
    )
    return f'{{ name: "{name}" data_type: {_TYPES[dtype]} {dims} }}'


def is_model(folder: Path) -> bool:
    """Is a folder a model of a repository?"""
    return (folder / CONFIG).is_file()


def model_file(folder: Path) -> Path:
    """Where the ONNX graph of the model in `folder` lies."""
    return folder / VERSION / MODEL_FILE


def write_config(model: Model, folder: Path) -> None:
    """Write `config.pbtxt` in the folder of a model."""
    (folder / CONFIG).write_text(config(model))
