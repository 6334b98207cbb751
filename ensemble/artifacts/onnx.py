"""`.onnx`: an ONNX graph. Requires the packages onnx and onnxscript."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ensemble.artifacts.program import BATCH, INPUT, OUTPUT
from ensemble.machine import captured_warnings

_BFLOAT16_OPSET = 22  # the first whose convolution and pooling accept bfloat16
# A protobuf message has at most 2 GiB; larger weights are external data, a file of their own.
MAX_MESSAGE_BYTES = 2**31 - 2**24


def to_proto(
    model: nn.Module | ExportedProgram,
    arguments: tuple[Tensor, ...],
    *,
    dtype: torch.dtype,
    optimize: bool,
    input_names: list[str] | None = None,
    output_names: list[str] | None = None,
) -> Any:
    """The ONNX graph of a model or program, an `onnx.ModelProto`.

    Args:
        arguments: of the model; empty for a program.
        dtype: of images and weights; it decides the version of the operator set.
        optimize: constant-fold.
        input_names, output_names: default: the exporter's.
    """
    opset = _BFLOAT16_OPSET if dtype == torch.bfloat16 else None
    # Warnings: deprecations within the exporter.
    with captured_warnings.capture("ignore"), torch.inference_mode(False), torch.no_grad():
        program = torch.onnx.export(
            model,
            arguments,
            dynamo=True,
            verbose=False,
            optimize=optimize,
            opset_version=opset,
            input_names=input_names,
            output_names=output_names,
        )
    assert program is not None
    return program.model_proto


def write(program: ExportedProgram, path: Path, *, dtype: torch.dtype) -> None:
    """Write `program` to `path`; weights above 2 GB to `<path>.data`, which goes with it."""
    onnx: Any = import_module("onnx")  # optional: `strategies.peer_conversion.require`
    proto = to_proto(
        program, (), dtype=dtype, optimize=True, input_names=[INPUT], output_names=[OUTPUT]
    )
    share_equal_initializers(proto.graph)
    _drop_metadata(proto)
    _rename_batch(proto.graph)
    weights = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    if weights > MAX_MESSAGE_BYTES:
        data = f"{path.name}.data"
        onnx.save_model(proto, path, save_as_external_data=True, location=data, size_threshold=1024)
    else:
        onnx.save_model(proto, path)
    onnx.checker.check_model(str(path), full_check=True)


def share_equal_initializers(graph: Any) -> None:
    """Keep one of several initializers with the same values: the exporter has one for each name of
    a tensor."""
    kept: dict[tuple[object, ...], str] = {}
    renamed: dict[str, str] = {}
    unique = []
    for tensor in graph.initializer:
        key = (
            (tensor.data_type, *tensor.dims, tensor.raw_data) if tensor.raw_data else (tensor.name,)
        )
        first = kept.setdefault(key, tensor.name)
        if first == tensor.name:
            unique.append(tensor)
        else:
            renamed[tensor.name] = first
    if not renamed:
        return
    del graph.initializer[:]
    graph.initializer.extend(unique)
    for node in _nodes(graph):
        node.input[:] = [renamed.get(name, name) for name in node.input]
    for output in graph.output:
        assert output.name not in renamed


def _nodes(graph: Any) -> Iterator[Any]:
    """All nodes, also those of subgraphs, whose nodes read tensors of the graphs around them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _nodes(subgraph)


def _drop_metadata(proto: Any) -> None:
    """Remove names of modules and paths of source files, which no runtime reads."""
    graphs = [proto.graph, *proto.functions]
    for graph in graphs:
        del graph.metadata_props[:]
        del graph.value_info[:]  # runtimes infer the shapes
        for node in _nodes(graph):
            del node.metadata_props[:]
            node.doc_string = ""
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""


def _rename_batch(graph: Any) -> None:
    """Call the symbol of the batch size `batch`; torch numbers it."""
    sizes = [size for value in graph.input for size in value.type.tensor_type.shape.dim]
    (symbol,) = {size.dim_param for size in sizes if size.dim_param}
    for value in (*graph.input, *graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", BATCH, size.dim_param)
