"""`config.pbtxt`: Triton's own schema accepts it, with the values that its ONNX back end needs."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch

from ensemble.artifacts.triton_repository import Model, config
from tests.artifacts import proto_schema

pytest.importorskip("google.protobuf", reason="pip install -r requirements-peers.txt")
MODEL = Model(
    name="resnet_x4",
    input_shape=(3, 224, 224),
    input_dtype=torch.float32,
    output_shape=(4, 1000),
    output_dtype=torch.float32,
    max_batch_size=64,
    device_type="cpu",
)


def test_the_schema_has_every_value_and_each_means_what_the_model_is() -> None:
    found = proto_schema.parse(config(MODEL))
    assert (found.name, found.backend, found.max_batch_size) == ("resnet_x4", "onnxruntime", 64)
    (x,), (logits,) = found.input, found.output
    types = {
        value.name: value.number
        for value in x.DESCRIPTOR.fields_by_name["data_type"].enum_type.values
    }
    assert (x.name, list(x.dims), x.data_type) == ("x", [3, 224, 224], types["TYPE_FP32"])
    assert (logits.name, list(logits.dims)) == ("logits", [4, 1000])
    assert found.WhichOneof("scheduling_choice") == "dynamic_batching"
    (group,) = found.instance_group
    assert (group.count, group.Kind.Name(group.kind)) == (1, "KIND_CPU")


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]
)
def test_every_dtype_has_the_name_that_the_schema_gives_it(dtype: torch.dtype) -> None:
    found = proto_schema.parse(config(replace(MODEL, output_dtype=dtype)))
    enum = found.output[0].DESCRIPTOR.fields_by_name["data_type"].enum_type
    name = enum.values_by_number[found.output[0].data_type].name
    bits = {torch.bool: "BOOL", torch.bfloat16: "BF16", torch.int64: "INT64"}
    assert name == "TYPE_" + bits.get(dtype, f"FP{dtype.itemsize * 8}")


def test_on_cuda_each_gpu_has_an_instance() -> None:
    (group,) = proto_schema.parse(config(replace(MODEL, device_type="cuda"))).instance_group
    assert group.Kind.Name(group.kind) == "KIND_GPU"


def test_one_number_per_image_is_a_reshaped_dimension_as_triton_has_no_empty_shapes() -> None:
    (logits,) = proto_schema.parse(config(replace(MODEL, output_shape=()))).output
    assert (list(logits.dims), logits.HasField("reshape"), list(logits.reshape.shape)) == (
        [1],
        True,
        [],
    )


def test_the_schema_refuses_what_it_does_not_have() -> None:
    parse_error = import_module("google.protobuf.text_format").ParseError
    for wrong in (
        "max_batch: 4",
        'input [ { name: "x" data_type: TYPE_FLOAT } ]',
        "dynamic_batching: 1",
    ):
        with pytest.raises(parse_error):
            proto_schema.parse(wrong)
