"""A graph as a list of instructions: what is saved of a forward, and run after it is loaded.

Unlike `fx.GraphModule` it needs no generated code, so that a file can hold it without holding code.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor, fx, nn

if TYPE_CHECKING:  # it imports numba, without which graphs have no programs
    from ensemble.compiler.runtime.program import Program


@dataclass(frozen=True)
class Value:
    """An argument: the value of an input or an instruction, by its number."""

    number: int


@dataclass(frozen=True)
class Instruction:
    """`target(*args, **kwargs)`; the result is value `out`. `freed` are not read later."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: int
    freed: tuple[int, ...] = ()

    def read(self) -> set[int]:
        """The numbers of the values that it reads."""
        return {*_numbers(self.args), *_numbers(list(self.kwargs.values()))}


@dataclass(frozen=True)
class Instructions:
    """A graph: its inputs are values 0 to `num_inputs - 1`, its constants the next ones.

    The last input is x.
    """

    num_inputs: int
    constants: tuple[Tensor, ...]
    body: tuple[Instruction, ...]
    output: Value

    def __call__(self, *inputs: Any) -> Any:
        values: dict[int, Any] = dict(enumerate((*inputs, *self.constants)))
        for instruction in self.body:
            args = [_resolved(each, values) for each in instruction.args]
            kwargs = {name: _resolved(each, values) for name, each in instruction.kwargs.items()}
            values[instruction.out] = instruction.target(*args, **kwargs)
            for number in instruction.freed:
                del values[number]
        return values[self.output.number]

    def programs(self) -> Iterator[Program]:
        """The programs that it calls."""
        for instruction in self.body:
            if is_program(instruction.target):
                yield instruction.target

    def with_batch_size(self, num_models: int, old: int, new: int) -> Instructions | None:
        """The same for `new` images a model instead of `old`, over the same weights, without
        another trace; None if more than programs and final reshapes depend on their number.

        Only for models that treat the images of a batch independently.
        """
        body: list[Instruction] = []
        for each in self.body:
            if is_program(each.target):
                if any(step.geometry.images != old for step in each.target.steps):
                    return None
                steps = [
                    replace(step, geometry=replace(step.geometry, images=new))
                    for step in each.target.steps
                ]
                body.append(replace(each, target=each.target.with_steps(steps)))
            elif each.target is torch.ops.aten.reshape.default:
                size = each.args[1]
                if list(size[:2]) != [num_models, old] or -1 in size:
                    return None
                args = (each.args[0], [num_models, new, *size[2:]], *each.args[2:])
                body.append(replace(each, args=args))
            elif each.target is operator.getitem:
                body.append(each)
            else:
                return None
        return None if self.constants else replace(self, body=tuple(body))


def is_program(target: object) -> TypeGuard[Program]:
    """Is what an instruction calls a program?"""
    return isinstance(target, nn.Module) and hasattr(target, "with_steps")


def instructions_of(module: fx.GraphModule) -> Instructions:
    """The instructions of a graph module, whose last placeholder is x."""
    placeholders = module.graph.find_nodes(op="placeholder")
    attributes = module.graph.find_nodes(op="get_attr")
    numbers: dict[fx.Node, Value] = {
        node: Value(number) for number, node in enumerate([*placeholders, *attributes])
    }
    constants = tuple(getattr(module, str(node.target)) for node in attributes)
    body: list[Instruction] = []
    for node in module.graph.nodes:
        if node.op not in ("call_function", "call_module"):
            continue
        target: Any = node.target
        if node.op == "call_module":
            target = module.get_submodule(str(target))
        numbers[node] = Value(len(numbers))
        arguments: Any = (node.args, node.kwargs)
        args, kwargs = fx.node.map_arg(arguments, cast("Any", numbers.__getitem__))
        body.append(Instruction(target, args, kwargs, numbers[node].number))
    output = module.graph.output_node().args[0]
    return with_lifetimes(
        Instructions(len(placeholders), constants, tuple(body), numbers[output])  # type: ignore[index]
    )


def with_lifetimes(graph: Instructions) -> Instructions:
    """The instructions, each with the values that none after it reads."""
    kept, body = {graph.output.number}, list[Instruction]()
    for instruction in reversed(graph.body):
        read = instruction.read()
        freed = tuple(sorted((read | {instruction.out}) - kept))
        kept |= read
        body.append(replace(instruction, freed=freed))
    return replace(graph, body=tuple(reversed(body)))


def _numbers(argument: Any) -> Iterator[int]:
    if isinstance(argument, Value):
        yield argument.number
    elif isinstance(argument, Sequence) and not isinstance(argument, str):
        for each in argument:
            yield from _numbers(each)


def _resolved(argument: Any, values: Mapping[int, Any]) -> Any:
    if type(argument) is Value:
        return values[argument.number]
    if isinstance(argument, list | tuple) and not isinstance(argument, torch.Size):
        return type(argument)(_resolved(each, values) for each in argument)
    return argument
