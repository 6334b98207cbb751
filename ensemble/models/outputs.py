"""What models give: one tensor, or a dict, tuple or list of tensors of which one is selected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ensemble.errors import InputError

_MAX_LISTED = 8  # parts in a message


class SelectedOutput(nn.Module):
    """`model`, of whose output one tensor is returned: see `select`."""

    def __init__(self, model: nn.Module, output: str | int) -> None:
        super().__init__()
        self.model, self.output = model, output
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        return select(self.model(x), self.output)


def selected(models: Sequence[nn.Module], output: str | int | None) -> Sequence[nn.Module]:
    """Each model with one tensor of its output, or as it is without `output`."""
    return models if output is None else [SelectedOutput(model, output) for model in models]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within a `SelectedOutput`, or the model itself."""
    return model.model if isinstance(model, SelectedOutput) else model


def select(value: object, output: str | int) -> Tensor:
    """A tensor of the output of a model.

    Args:
        value: a dict (or another mapping), tuple, named tuple or list, possibly nested.
        output: a key, an index or the name of a field; `out.0` is part 0 of `out`.

    Raises:
        InputError: there is no such part, it is no tensor, or the model gives one tensor.
    """
    found = _part(value, output)
    if isinstance(found, Tensor):
        return found
    if found is not None:
        got = f"{describe(found)} at {output}"
    elif isinstance(value, Tensor):
        got = f"{output}, but the model gives one tensor {_size(value)}"
    else:
        got = f"{output}, but the model gives {describe(value)}"
    expected = "none" if isinstance(value, Tensor) else "the name or index of a tensor"
    raise InputError(f"expected {expected}, got {got}", argument="output")


def check_single(value: object) -> Tensor:
    """The output of a model as a tensor.

    Raises:
        InputError: it is none; the message lists what there is.
    """
    if isinstance(value, Tensor):
        return value
    if is_selectable(value):
        message = f"expected the name or index of a tensor, as the model gives {describe(value)}"
        raise InputError(message, argument="output")
    raise InputError(
        f"expected a model that gives a tensor, or a dict, tuple or list of tensors, got"
        f" {type(value).__name__}",
        argument="arch",
    )


def is_selectable(value: object) -> bool:
    """Does an output have parts, of which one may be selected?"""
    return isinstance(value, Mapping | tuple | list)


def parse(text: str | None) -> str | int | None:
    """A name or an index from its text."""
    is_index = text is not None and text.removeprefix("-").isdecimal()
    return int(text) if text is not None and is_index else text


def describe(value: object, *, is_stacked: bool = False) -> str:
    """The type of an output and its parts with their shapes: `dict of out (1, 21, 64, 64)`.

    is_stacked: the shapes begin with the number of models, which is left out.
    """
    parts = list(_parts(value).items())
    shown = [f"{name} {_size(part, is_stacked)}" for name, part in parts[:_MAX_LISTED]]
    more = [f"{len(parts) - _MAX_LISTED} more"] if len(parts) > _MAX_LISTED else []
    of = f" of {', '.join([*shown, *more])}" if parts else ""
    return f"{type(value).__name__}{of}"


def class_count(model: nn.Module) -> int | None:
    """The number of classes that a classifier distinguishes; None if it is not known.

    It is the model's own `num_classes` (0 in timm: no classifier), else the number of outputs of
    its last layer, if that is a linear layer or a convolution.
    """
    own = getattr(unwrapped(model), "num_classes", None)
    if isinstance(own, int) and not isinstance(own, bool):
        return own or None
    weights = [
        weight
        for module in model.modules()
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter)
    ]
    return len(weights[-1]) if weights and weights[-1].dim() >= 2 else None


def is_class_logits(outputs: Tensor, classes: int | None) -> bool:
    """Are outputs of N models, `(N, B, classes)`, logits of so many classes?"""
    is_score = outputs.is_floating_point() and outputs.dim() == 3
    return is_score and classes is not None and outputs.shape[2] == classes > 1


def _parts(value: object) -> dict[str, Any]:
    """The parts of an output by name or index; empty if it has none."""
    if isinstance(value, Mapping):
        return {str(key): part for key, part in value.items()}
    if isinstance(value, tuple | list):
        names = getattr(value, "_fields", map(str, range(len(value))))
        return dict(zip(names, value, strict=True))
    return {}


def _part(value: object, output: str | int) -> object:
    """The part of this name, or index, or dotted path; None if there is none."""
    if isinstance(value, tuple | list) and isinstance(output, int):
        return value[output] if -len(value) <= output < len(value) else None
    parts = _parts(value)
    if str(output) in parts:
        return parts[str(output)]
    first, _, rest = str(output).partition(".")
    inner = _part(value, parse(first) or 0) if first and rest else None
    return None if inner is None else _part(inner, parse(rest) or 0)


def _size(part: object, is_stacked: bool = False) -> str:
    if isinstance(part, Tensor):
        return str(tuple(part.shape[is_stacked:]))
    return f"({describe(part, is_stacked=is_stacked)})"
