"""What models give: the selection of a tensor, and which outputs are class logits."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

import ensemble
from ensemble.errors import InputError
from ensemble.models import outputs
from ensemble.models.vision import torchvision
from tests import user_models
from tests.tiny import TinyNet, tiny_models

A, B, C = torch.zeros(2, 3), torch.ones(2, 4), torch.full((2,), 2.0)


class ModelOutput(OrderedDict[str, Any]):
    """A dict with attributes, as Hugging Face's models give it."""


@pytest.mark.parametrize(
    ("value", "output", "expected"),
    [
        ({"logits": A, "aux": B}, "aux", B),
        (ModelOutput(logits=A, hidden=B), "logits", A),
        ((A, B), 1, B),
        ([A, B], -1, B),
        (user_models.Output(A, B), "features", B),
        (user_models.Output(A, B), 0, A),
        ({0: A, "1": B}, 1, B),  # torchvision's feature pyramids have the keys "0", "1", ...
        ({0: A, "1": B}, 0, A),
        ({"out": (A, {"deep": C})}, "out.1.deep", C),
        ({"a.b": A, "a": {"b": B}}, "a.b", A),
    ],
)
def test_a_part_is_selected_by_key_index_field_or_path(
    value: object, output: str | int, expected: torch.Tensor
) -> None:
    assert outputs.select(value, output) is expected


@pytest.mark.parametrize(
    ("value", "output", "message"),
    [
        (
            {"logits": A, "aux": B},
            "auxx",
            "expected the name or index of a tensor, got auxx, but the model gives dict of logits"
            " (2, 3), aux (2, 4)",
        ),
        ((A, B), 2, "got 2, but the model gives tuple of 0 (2, 3), 1 (2, 4)"),
        ({"out": [A, B]}, "out", "got list of 0 (2, 3), 1 (2, 4) at out"),
        ({"out": [A, B]}, "out.2", "got out.2, but the model gives dict of out (list of 0 (2, 3)"),
        ({"size": 3}, "size", "got int at size"),
        (A, "logits", "expected none, got logits, but the model gives one tensor (2, 3)"),
        (object(), "logits", "got logits, but the model gives object"),
        ([A] * 10, "x", "7 (2, 3), 2 more"),
    ],
)
def test_a_part_that_is_not_there_is_an_error_that_lists_what_there_is(
    value: object, output: str | int, message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        outputs.select(value, output)
    assert caught.value.argument == "output"


@pytest.mark.parametrize(
    ("text", "expected"), [("out", "out"), ("0", 0), ("-1", -1), ("1x", "1x"), (None, None)]
)
def test_whole_numbers_are_indices(text: str | None, expected: str | int | None) -> None:
    assert outputs.parse(text) == expected


@pytest.mark.parametrize("name", ["loop", "vmap", "folded_loop", "lowered_vmap", "best"])
def test_every_strategy_gives_the_selected_tensor(name: str) -> None:
    models = [user_models.Several("dict").eval() for _ in range(2)]
    x = torch.randn(3, 3, 16, 16)
    forward = ensemble.build(name, models, x, output="features", tune_seconds=5)
    with torch.no_grad():
        expected = torch.stack([model(x)["features"] for model in models])
    torch.testing.assert_close(forward(x), expected)


@pytest.mark.parametrize("name", ["loop", "vmap", "best"])
@pytest.mark.parametrize("output", [None, "nothing"])
def test_models_with_several_outputs_need_the_name_of_one(name: str, output: str | None) -> None:
    models, x = [user_models.Several("tuple").eval() for _ in range(2)], torch.randn(3, 3, 16, 16)
    with pytest.raises(ValueError, match=re.escape("Output of logits (3, 7), features (3, 8)")):
        ensemble.build(name, models, x, output=output, tune_seconds=1)(x)


def test_a_selection_keeps_the_mode_of_the_model() -> None:
    model = TinyNet().train()
    wrapped = outputs.SelectedOutput(model, 0)
    assert wrapped.training
    assert outputs.unwrapped(wrapped) is model
    with pytest.raises(ValueError, match="model 0 is in train mode"):
        ensemble.build("loop", [model], torch.randn(1, 3, 8, 8), output=0)


@pytest.mark.parametrize(
    ("arch", "classes"),
    [("resnet18", 7), ("squeezenet1_1", 7), ("vgg11", 7), ("vit_b_16", 7), ("densenet121", 7)],
)
def test_the_classes_of_a_classifier_are_those_of_its_last_layer(arch: str, classes: int) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(arch, weights=None, num_classes=classes)
    assert outputs.class_count(model) == classes


def test_other_models_have_no_classes_unless_they_say_so() -> None:
    embedder = user_models.Embedder()
    assert outputs.class_count(embedder) is None
    assert outputs.class_count(nn.ReLU()) is None
    vars(embedder)["num_classes"] = 8
    assert outputs.class_count(embedder) == 8
    assert outputs.class_count(outputs.SelectedOutput(embedder, "logits")) == 8
    vars(embedder)["num_classes"] = 0  # timm's models without their last layer
    assert outputs.class_count(embedder) is None


@pytest.mark.parametrize(
    ("shape", "classes", "expected"),
    [
        ((2, 1, 5), 5, True),
        ((2, 1, 8), 5, False),  # features before the last layer
        ((2, 1, 5), None, False),
        ((2, 1, 1), 1, False),  # one logit: its class is always 0
        ((2, 1, 5, 4, 4), 5, False),
        ((2, 5), 5, False),
    ],
)
def test_class_logits_have_a_value_for_each_class(
    shape: tuple[int, ...], classes: int | None, expected: bool
) -> None:
    assert outputs.is_class_logits(torch.zeros(shape), classes) is expected
    assert not outputs.is_class_logits(torch.zeros(shape, dtype=torch.int64), classes)


def test_models_with_one_tensor_are_not_wrapped() -> None:
    models = tiny_models(2)
    assert outputs.selected(models, None) is models
