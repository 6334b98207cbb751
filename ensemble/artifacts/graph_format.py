"""`Instructions` as JSON: operators by name, tensors by their number in a table."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ensemble.compiler.planning.step import Activation, Geometry, Kind, Step
from ensemble.compiler.runtime.instructions import (
    Instruction,
    Instructions,
    Value,
    is_program,
    with_lifetimes,
)
from ensemble.compiler.runtime.packed_weight import PackedWeight
from ensemble.errors import InputError, UnavailableError

if TYPE_CHECKING:
    from ensemble.compiler.runtime.program import Program

# Operators that a file may name: those of torch and of this package that compute from arguments.
_NAMESPACES = ("aten", "ensemble")
_ENUMS = {
    f"torch.{name}": getattr(torch, name)
    for name in (
        *("float32", "float64", "float16", "bfloat16", "bool", "uint8"),
        *("int8", "int16", "int32", "int64", "complex64", "complex128"),
        *("strided", "contiguous_format", "channels_last", "preserve_format"),
    )
}


@dataclass
class TensorTable:
    """Tensors by number; one that is added twice has one number."""

    tensors: list[Tensor] = field(default_factory=list)
    _numbers: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def add(self, tensor: Tensor) -> int:
        key: tuple[Any, ...]
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if not tensor.numel():
            key = (len(self.tensors),)
        return self._add(key, lambda: tensor)

    def add_packed(self, weight: PackedWeight) -> int:
        return self._add((id(weight.weight),), weight.dense)

    def _add(self, key: tuple[Any, ...], values: Callable[[], Tensor]) -> int:
        if key not in self._numbers:
            self._numbers[key] = len(self.tensors)
            self.tensors.append(values())
        return self._numbers[key]


def encode(graph: Instructions, table: TensorTable) -> dict[str, Any]:
    """A graph as JSON; its tensors are added to the table.

    Raises:
        UnavailableError: it holds something that the format does not have.
    """
    return {
        "inputs": graph.num_inputs,
        "constants": [table.add(tensor) for tensor in graph.constants],
        "body": [_encode_instruction(each, table) for each in graph.body],
        "output": graph.output.number,
    }


def decode(data: Mapping[str, Any], tensors: Sequence[Tensor], *, threads: int) -> Instructions:
    """The graph of `encode`; programs use so many threads.

    Raises:
        InputError: an operator that a file may not name, or that this torch does not have.
    """
    body = [_decode_instruction(each, tensors, threads) for each in data["body"]]
    constants = tuple(tensors[number] for number in data["constants"])
    graph = Instructions(data["inputs"], constants, tuple(body), Value(data["output"]))
    known = set(range(graph.num_inputs + len(constants)))
    for each in graph.body:
        if not known.issuperset(each.read()):
            raise ValueError("an instruction reads a value that is not there yet")
        known.add(each.out)
    if graph.output.number not in known:
        raise ValueError("the output is a value that is not there")
    return with_lifetimes(graph)


def _encode_instruction(each: Instruction, table: TensorTable) -> dict[str, Any]:
    called: Any = each.target
    target = _encode_program(called, table) if is_program(called) else _name_of(called)
    return {
        "target": target,
        "args": [_encode(argument) for argument in each.args],
        "kwargs": {name: _encode(argument) for name, argument in each.kwargs.items()},
        "out": each.out,
    }


def _decode_instruction(
    data: Mapping[str, Any], tensors: Sequence[Tensor], threads: int
) -> Instruction:
    target = data["target"]
    called: Callable[..., Any]
    if isinstance(target, str):
        called = _function_of(target)
    else:
        called = _decode_program(target, tensors, threads)
    args = tuple(_decode(argument) for argument in data["args"])
    kwargs = {str(name): _decode(argument) for name, argument in data["kwargs"].items()}
    return Instruction(called, args, kwargs, data["out"])


def _functions() -> Mapping[str, Callable[..., Any]]:
    """Functions of this package that graphs call, by name."""
    from ensemble.compiler.graph import prepacking  # which imports torch.compile

    return {function.__name__: function for function in prepacking.FUNCTIONS}


def _name_of(function: Callable[..., Any]) -> str:
    if function is operator.getitem:
        return "getitem"
    if isinstance(function, torch._ops.OpOverload) and function.namespace in _NAMESPACES:
        return str(function)
    name: str = getattr(function, "__name__", "")
    if _functions().get(name) is function:
        return f"function {name}"
    raise UnavailableError(f"this forward cannot be saved: it calls {name or function}")


def _function_of(name: str) -> Callable[..., Any]:
    kind, _, rest = name.partition(" ")
    if name == "getitem":
        return operator.getitem
    if kind == "function" and (found := _functions().get(rest)):
        return found
    parts = name.split(".")
    if len(parts) == 3 and parts[0] in _NAMESPACES:
        if parts[0] == "ensemble":
            import ensemble.compiler.operators  # noqa: F401  # registers them
        try:
            operators = getattr(torch.ops, parts[0])
            overload = getattr(getattr(operators, parts[1]), parts[2])
        except AttributeError:
            overload = None
        if isinstance(overload, torch._ops.OpOverload) and _is_pure(overload):
            return overload
    raise InputError(f"expected operators that this version has, got {name!r}")


def _is_pure(overload: torch._ops.OpOverload) -> bool:
    """Does an operator only compute a result, without writing to an argument or a file?"""
    return not overload._schema.is_mutable and "file" not in overload._schema.name


def _encode(argument: Any) -> Any:
    if argument is None or isinstance(argument, bool | str):
        return argument
    if isinstance(argument, Value):
        return {"value": argument.number}
    if isinstance(argument, int):
        return int(argument)
    if isinstance(argument, float):
        return argument if math.isfinite(argument) else {"float": str(argument)}
    if isinstance(argument, list | tuple):
        return [_encode(each) for each in argument]
    if str(argument) in _ENUMS and _ENUMS[str(argument)] is argument:
        return {"torch": str(argument)}
    if isinstance(argument, torch.device) and argument.type == "cpu":
        return {"device": "cpu"}
    raise UnavailableError(
        f"this forward cannot be saved: an argument is a {type(argument).__name__}"
    )


def _decode(argument: Any) -> Any:
    if isinstance(argument, list):
        return [_decode(each) for each in argument]
    if not isinstance(argument, dict):
        return argument
    ((kind, value),) = argument.items()
    if kind == "value":
        return Value(value)
    if kind == "float":
        return float(value)
    if kind == "device":
        return torch.device("cpu")
    return _ENUMS[value]


def _encode_program(program: Program, table: TensorTable) -> dict[str, Any]:
    return {
        "steps": [_encode_step(step, table) for step in program.steps],
        "inputs": list(program.inputs),
        "outputs": list(program.outputs),
        "num_models": program.num_models,
        "dtype": str(program.dtype),
    }


def _decode_program(data: Mapping[str, Any], tensors: Sequence[Tensor], threads: int) -> Program:
    from ensemble.compiler.runtime.program import Program  # which imports numba

    steps = [_decode_step(step, tensors, data["num_models"]) for step in data["steps"]]
    return Program(
        steps,
        inputs=data["inputs"],
        outputs=data["outputs"],
        num_models=data["num_models"],
        threads=threads,
        dtype=_ENUMS[data["dtype"]],
    )


def _encode_step(step: Step, table: TensorTable) -> dict[str, Any]:
    found = {
        name: value
        for name, value in vars(step).items()
        if name not in ("geometry", "weight", "bias")
    }
    for name in ("weight", "bias"):
        tensor = getattr(step, name)
        found[name] = None if tensor is None else table.add(tensor)
    return found | {"geometry": asdict(step.geometry)}


def _decode_step(data: Mapping[str, Any], tensors: Sequence[Tensor], num_models: int) -> Step:
    geometry: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in data["geometry"].items()
    }
    operands = {
        name: None if data[name] is None else tensors[data[name]] for name in ("weight", "bias")
    }
    kinds = {"kind": Kind(data["kind"]), "activation": Activation(data["activation"])}
    step = Step(**{**data, **kinds, **operands, "geometry": Geometry(**geometry)})
    _check_step(step, num_models)
    return step


def _check_step(step: Step, num_models: int) -> None:
    """Raise ValueError for a step that would read or write outside its tensors."""
    numbers = [step.x, step.out, *([] if step.other is None else [step.other])]
    sizes = [
        number
        for value in vars(step.geometry).values()
        for number in (value if isinstance(value, tuple) else (value,))
        if number is not None
    ]
    if not all(type(number) is int and 0 <= number < 2**31 for number in (*numbers, *sizes)):
        raise ValueError(f"a step of {step.kind.label} has sizes that are none")
    if 0 in step.geometry.stride or 0 in step.geometry.kernel or 0 in step.geometry.dilation:
        raise ValueError(f"a step of {step.kind.label} has a stride of 0")
    for tensor in (step.weight, step.bias):
        if tensor is not None and len(tensor) != num_models:
            raise ValueError(
                f"a step of {step.kind.label} has not the weights of {num_models} models"
            )
    from ensemble.compiler import kernels  # which import numba
    from ensemble.compiler.planning.vector_layout import weight_shape

    if step.weight is None or kernels.KERNELS[step.kind].empty is None:
        return
    shape = (num_models, *weight_shape(step.geometry))
    expected = kernels.empty_packed(
        torch.empty(shape, device="meta", dtype=torch.float32), step.kind
    )
    found = step.weight
    if (found.shape, found.dtype) != (expected.shape, expected.dtype) or not found.is_contiguous():
        raise ValueError(f"a step of {step.kind.label} has weights of another size")
    if step.bias is None or step.bias.shape != (num_models, step.geometry.out_channels):
        raise ValueError(f"a step of {step.kind.label} has no bias for each channel")
