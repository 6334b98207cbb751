"""Architectures by name: torchvision's, timm's, and functions of the user that give a module."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from os import path as os_path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ensemble import user_functions
from ensemble.errors import InputError, first_line
from ensemble.models.preprocessing import IMAGENET, Preprocessing
from ensemble.models.vision import torchvision

TIMM = "timm/"
KINDS = "timm/NAME, MODULE:FUNCTION or PATH.py:FUNCTION"
ARGUMENT = "arch"
_AUXILIARY = "aux_classifier."  # of torchvision's segmentation models, used in training

Function = Callable[[], nn.Module]
Construct = Callable[[int | None], nn.Module]


@dataclass(frozen=True)
class Architecture:
    """How to construct a model.

    Attributes:
        name: for messages.
        construct: the number of classes, or None for the architecture's own -> a new module in
            float32 and eval mode. It raises InputError if that fails.
        classifier: a model -> the name of the tensor whose first dimension is the number of
            classes; None where `construct` takes no number.
        constructs_on_meta: names and shapes are found by constructing on the meta device. Other
            code may read values, or keep tensors in plain attributes, which would lose them.
        headless: does `construct(0)` give a model without its last layer?
        is_random: are the weights of a new model random?
        has_published_weights: does torchvision publish weights of it?
        preprocessing: of its images.
        image_size: its own, in pixels; None for any.
    """

    name: str
    construct: Construct
    classifier: Callable[[nn.Module], str | None] | None = None
    constructs_on_meta: bool = False
    headless: bool = False
    is_random: bool = True
    has_published_weights: bool = False
    preprocessing: Preprocessing = IMAGENET
    image_size: int | None = None


def torchvision_names() -> list[str]:
    """The names of torchvision's classification and segmentation architectures."""
    return [*_classifiers(), *_segmenters()]


def is_users(arch: str | Function) -> bool:
    """Is it a function of the user, rather than an architecture of torchvision or timm?"""
    return callable(arch) or (not arch.startswith(TIMM) and _is_function_name(arch))


def is_torchvisions(arch: str | Function) -> bool:
    """Is it a name of torchvision, rather than of timm or a function of the user?"""
    return not callable(arch) and not arch.startswith(TIMM) and not _is_function_name(arch)


def find(
    arch: str | Function, *, channels: int | None = None, state: Mapping[str, Tensor] | None = None
) -> Architecture:
    """The architecture of a name or a function.

    Args:
        arch: a name of torchvision, `timm/NAME`, `MODULE:FUNCTION`, `PATH.py:FUNCTION`, or a
            function. Functions are called without arguments and give a module.
        channels: of the images, where the architecture has a choice (timm's).
        state: a state dict that is to be loaded: options that it shows, such as its input channels
            and an auxiliary classifier, are those of the architecture.

    Raises:
        InputError: there is none; the message names close ones.
    """
    if callable(arch):
        return _of_function(arch, getattr(arch, "__qualname__", type(arch).__name__))
    if arch.startswith(TIMM):
        return _timm(arch.removeprefix(TIMM), channels, state or {})
    if _is_function_name(arch):
        return _of_function(_users_function(arch), arch)
    return _torchvision(arch, state or {})


def _classifiers() -> list[str]:
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def _segmenters() -> list[str]:
    names: list[str] = torchvision.models.list_models(module=torchvision.models.segmentation)
    return names


def _torchvision(name: str, state: Mapping[str, Tensor]) -> Architecture:
    known = torchvision_names()
    if name not in known:
        close = get_close_matches(name, known, n=3) or ["resnet18", "resnet50"]
        raise InputError(
            f"expected one of torchvision's {len(known)} classification and segmentation"
            f" architectures ({', '.join(close)}, ...), {KINDS}, got {name!r}",
            argument=ARGUMENT,
        )
    options: dict[str, Any] = {}
    if name in _segmenters():
        options["weights_backbone"] = None
        if any(tensor.startswith(_AUXILIARY) for tensor in state):
            options["aux_loss"] = True

    def construct(classes: int | None) -> nn.Module:
        own = options if classes is None else {**options, "num_classes": classes}
        with warnings.catch_warnings():
            # GoogLeNet and Inception warn of a future change of their default initialization.
            warnings.filterwarnings("ignore", category=FutureWarning, module="torchvision")
            model: nn.Module = torchvision.models.get_model(name, weights=None, **own)
        return _prepared(model)

    return Architecture(
        name,
        construct,
        classifier=lambda model: [*dict(model.named_parameters())][-1],
        constructs_on_meta=True,
        has_published_weights=True,
    )


def _timm(name: str, channels: int | None, state: Mapping[str, Tensor]) -> Architecture:
    timm = _import_timm()
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=3)
        help = f" ({', '.join(near)}, ...)" if near else ""
        raise InputError(
            f"expected one of timm's architectures{help}, got {name!r}", argument=ARGUMENT
        )
    config = timm.get_pretrained_cfg(name)
    first = state.get(f"{getattr(config, 'first_conv', None)}.weight")
    if first is not None and first.dim() == 4:
        channels = first.shape[1]
    options = {} if channels in (None, 3) else {"in_chans": channels}

    def construct(classes: int | None) -> nn.Module:
        own = options if classes is None else {**options, "num_classes": classes}
        try:
            model = timm.create_model(name, pretrained=False, **own)
        except Exception as error:
            given = ", ".join(f"{option}={value}" for option, value in own.items())
            reason = f"{type(error).__name__}: {first_line(error)}"
            message = f"timm cannot create {name}{f' with {given}' if given else ''}: {reason}"
            raise InputError(message, argument=ARGUMENT) from error
        return _prepared(model)

    def classifier(model: nn.Module) -> str | None:
        known = getattr(config, "classifier", None)
        layer = known[0] if isinstance(known, tuple | list) and known else known
        return f"{layer}.weight" if f"{layer}.weight" in dict(model.named_parameters()) else None

    return Architecture(
        f"{TIMM}{name}",
        construct,
        classifier=classifier,
        headless=True,
        preprocessing=_timms_preprocessing(config),
        image_size=config.input_size[-1] if config is not None else None,
    )


def _import_timm() -> Any:
    try:
        import timm
    except ImportError as error:
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == "timm"
        reason = "not installed: pip install timm" if is_missing else first_line(error)
        raise InputError(
            f"timm/... requires the package timm: {reason}", argument=ARGUMENT
        ) from error
    return timm


def _timms_preprocessing(config: Any) -> Preprocessing:
    if config is None:
        return IMAGENET
    return Preprocessing(
        tuple(config.mean), tuple(config.std), config.crop_pct, config.interpolation
    )


def _is_function_name(arch: str) -> bool:
    return ":" in arch or user_functions.names_file(arch)


def _users_function(arch: str) -> Function:
    """The function of `MODULE:FUNCTION` or `PATH.py:FUNCTION`."""
    if user_functions.names_file(arch):
        path, name = user_functions.split_file(arch, argument=ARGUMENT)
        return user_functions.from_file(path, name, argument=ARGUMENT)
    module, _, name = arch.rpartition(":")
    if os_path.isfile(module):
        message = f"expected a Python file, whose name ends in .py, got {module}"
        raise InputError(message, argument=ARGUMENT)
    if not module or not name:
        raise InputError(f"expected MODULE:FUNCTION, got {arch}", argument=ARGUMENT)
    return user_functions.from_module(module, name, argument=ARGUMENT)


def _of_function(function: Function, name: str) -> Architecture:
    """The architecture of a function without arguments that gives a module.

    Raises:
        InputError: it has required arguments.
    """
    required = _required_arguments(function)
    if required:
        expected = f"expected {name} to be called without arguments"
        raise InputError(
            f"{expected}, got required arguments {', '.join(required)}", argument=ARGUMENT
        )
    return Architecture(name, partial(_call, function, name), is_random=False)


def _required_arguments(function: Function) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # not implemented in Python: the call shows it
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        one.name
        for one in parameters
        if one.default is inspect.Parameter.empty and one.kind not in variadic
    ]


def _call(function: Function, name: str, classes: int | None) -> nn.Module:
    try:
        model = function()
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{name} failed: {reason}", argument=ARGUMENT) from error
    if not isinstance(model, nn.Module):
        got = f"{type(model).__name__}"
        raise InputError(f"expected {name} to give an nn.Module, got {got}", argument=ARGUMENT)
    for kind, tensors in (("parameters", model.parameters()), ("buffers", model.buffers())):
        if any(map(is_lazy, tensors)):
            message = f"expected {name} to initialize its {kind}, got lazy ones; call it once there"
            raise InputError(message, argument=ARGUMENT)
    return _prepared(model)


def _prepared(model: nn.Module) -> nn.Module:
    """The model in float32 and eval mode; it needs no gradients."""
    floating = [*model.parameters(), *model.buffers()]
    if any(one.is_floating_point() and one.dtype != torch.float32 for one in floating):
        model = model.float()
    return model.eval().requires_grad_(False)
