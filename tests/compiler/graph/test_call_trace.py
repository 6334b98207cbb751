"""Call traces: use-def information, and equality of the calls of two models."""

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ensemble.compiler.graph.call_trace import record, renumbered
from tests.tiny import tiny_models


def names(trace: Any) -> list[str]:
    return [call.function.__name__ for call in trace.calls]


def test_calls_are_in_order_with_their_arguments() -> None:
    (model,) = tiny_models(1)
    found = record(model, torch.randn(2, 3, 8, 8))
    assert names(found) == ["conv2d", "batch_norm", "relu", "roll", "add", "mean", "linear"]
    conv, norm, relu = found.calls[:3]
    assert conv.arguments[:2] == (("x",), ("state", "conv.weight"))
    assert norm.arguments[0] == ("result", 0, 0)
    assert found.readers(("result", 0, 0)) == [1]
    assert found.readers(("result", 2, 0)) == [3, 4]  # the residual and its own input
    assert relu.arguments == (("result", 1, 0),)
    assert found.output == ("result", 6, 0)
    assert found.readers(found.output) == [len(found.calls)]


def test_values_are_tracked_through_mutation_and_containers() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            y.add_(1)
            first, second = y.chunk(2, 1)
            return torch.cat([first, second, y], 1)

    found = record(Net(), torch.randn(2, 4, 2, 2))
    assert names(found) == ["mul", "add_", "chunk", "cat"]
    assert found.readers(("result", 0, 0)) == [1, 2, 3]
    assert found.readers(("result", 2, 1)) == [3]


def test_metadata_queries_are_no_calls() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            asked = x.shape[0] == len(x) and x.size(1) == 4 and x.dtype.is_floating_point
            return x.reshape(len(x), -1) if asked and x.dim() == 4 else x

    assert names(record(Net(), torch.randn(2, 4, 2, 2))) == ["reshape"]


def test_models_of_one_architecture_have_equal_traces_and_others_have_not() -> None:
    one, two = tiny_models(2)
    x = torch.randn(2, 3, 8, 8)
    assert record(one, x).calls == record(two, x.clone()).calls

    class Scaled(type(one)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * 2.0)

    assert record(one, x).calls != record(Scaled().eval(), x).calls


def test_a_trace_without_a_call_equals_that_of_a_model_without_the_layer() -> None:
    (model,) = tiny_models(1)
    x = torch.randn(2, 3, 8, 8)
    before = record(model, x)
    model.bn = nn.Identity()
    after = record(model, x)
    assert before.calls != after.calls
    assert renumbered(before, {1: ("result", 0, 0)}).calls == after.calls


def test_calls_of_other_threads_continue_and_are_not_recorded() -> None:
    (model,), x = tiny_models(1), torch.randn(2, 3, 8, 8)
    begun, done = threading.Event(), threading.Event()

    class Waiting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            begun.set()
            assert done.wait(10)
            return functional.relu(x)

    def call() -> None:
        begun.wait(10)
        model(x)
        done.set()

    thread = threading.Thread(target=call)
    thread.start()
    assert names(record(Waiting(), x)) == ["relu"]
    thread.join()
