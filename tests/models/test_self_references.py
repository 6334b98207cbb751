"""Detection of models whose functions refer to them, which deepcopy does not support."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ensemble.errors import UnavailableError
from ensemble.models import self_references, stacking
from ensemble.models.vision import torchvision

KEPT: dict[str, Tensor] = {}


def keep(module: nn.Module, args: object, output: Tensor) -> None:
    KEPT["last"] = output


def net(prepare: Callable[[Any], object] = lambda self: None) -> nn.Module:
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model.kept = {}
    prepare(model)
    return model.eval()


def helper(value: object) -> Callable[..., object]:
    return lambda *args: value


def keep_globally(model: Any) -> None:
    model.kept = KEPT
    model[0].register_forward_hook(keep)


REFERRING: dict[str, Callable[[Any], object]] = {
    "lambda": lambda self: setattr(self, "head", lambda y: y * self[0].weight),
    "hook": lambda self: self[0].register_forward_hook(
        lambda module, args, y: self.kept.__setitem__("y", y)
    ),
    "hook into a dict": lambda self: self[0].register_forward_hook(helper(self.kept)),
    "hook into a global dict": keep_globally,
    "default": lambda self: setattr(self, "f", lambda y, me=self: me(y)),
    "bound method in a closure": lambda self: setattr(self, "f", helper(self.forward)),
    "closure of a closure": lambda self: setattr(self, "f", helper(helper(self[1].weight))),
    "list of functions": lambda self: setattr(self, "f", [helper(self[0])]),
    "patched forward": lambda self: setattr(self, "forward", helper(self.forward)),
    "weak reference": lambda self: setattr(self[0], "parent", weakref.ref(self)),
}
OTHERS: dict[str, Callable[[Any], object]] = {
    "nothing": lambda self: None,
    "function": lambda self: setattr(self, "f", torch.relu),
    "lambda of constants": lambda self: setattr(self, "f", helper(3.0)),
    "bound method": lambda self: setattr(self, "f", self[0].forward),
    "partial": lambda self: setattr(self, "f", functools.partial(helper(1), self)),
    "weight norm": lambda self: parametrizations.weight_norm(self[0]),
    "a hook of nothing": lambda self: self[0].register_forward_hook(helper(None)),
    "recurrent": lambda self: setattr(self, "lstm", nn.LSTM(4, 4)),
    "itself": lambda self: setattr(self, "everything", [self]),
}


@pytest.mark.parametrize("name", REFERRING)
def test_a_function_that_refers_to_its_model_is_found(name: str) -> None:
    model = net(REFERRING[name])
    assert self_references.find(model)
    with pytest.raises(UnavailableError, match=r"cannot be copied: .* refers to the model"):
        stacking.private_copy(model)


@pytest.mark.parametrize("name", OTHERS)
def test_references_that_deepcopy_rebinds_are_accepted(name: str) -> None:
    model = net(OTHERS[name])
    assert self_references.find(model) == ""
    stacking.private_copy(model)


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "mnasnet0_5", "swin_t", "maxvit_t"])
def test_torchvision_models_have_no_self_references(name: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
    assert self_references.find(model) == ""
