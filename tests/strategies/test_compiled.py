"""Errors and notes of `torch.compile`."""

import pytest
import torch
from torch import Tensor, nn

from ensemble.errors import UnavailableError
from ensemble.machine.memory import is_out_of_memory
from ensemble.strategies import build_unverified, compiled
from tests.tiny import independent


def test_a_backend_failure_is_unavailable_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(graph: torch.fx.GraphModule, example: list[Tensor]) -> None:
        raise NotImplementedError("no such operator\nand much more")

    compile_by = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_by(f, backend=fail))
    forward = compiled.as_one_graph(lambda x: x + 1)
    with pytest.raises(UnavailableError, match=r"cannot compile this model: no such operator$"):
        forward(torch.ones(2))


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory")],
)
def test_a_backend_without_memory_is_out_of_memory_and_not_unavailable(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(graph: torch.fx.GraphModule, example: list[Tensor]) -> None:
        raise error

    compile_by = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_by(f, backend=fail))
    forward = compiled.as_one_graph(lambda x: x + 2)
    with pytest.raises(type(error), match="out of memory") as caught:
        forward(torch.ones(2))
    assert not isinstance(caught.value, UnavailableError)
    assert is_out_of_memory(caught.value)


def test_operators_that_a_compiled_vmap_loops_over_are_noted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Renormalized(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return torch.renorm(self[0](x), 2, 0, 1.0).flatten(1)

    compile_by = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compile_by(f, backend="aot_eager", **options)
    )
    models = [Renormalized(nn.Conv2d(3, 4, 3)).eval().requires_grad_(False) for _ in range(2)]
    x = torch.randn(1, 3, 8, 8)
    built = build_unverified("compiled_vmap", models, x)
    assert built.deferred_note() == ""
    for _ in range(2):
        torch.testing.assert_close(built.forward(x), independent(models, x), rtol=1e-4, atol=1e-5)
        assert built.deferred_note() == (
            "vmap has no batching rule for aten::renorm: a loop over the models"
        )


def test_a_compiled_vmap_does_not_loop_over_the_models_to_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch's adaptive pooling of channels-last images has no batching rule."""
    monkeypatch.setattr(compiled, "as_one_graph", lambda function: function)
    models = [
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
        for _ in range(2)
    ]
    x = torch.randn(2, 3, 8, 8)
    built = build_unverified("compiled_vmap", models, x)
    torch.testing.assert_close(built.forward(x), independent(models, x), rtol=1e-4, atol=1e-5)
    assert built.deferred_note() == ""
