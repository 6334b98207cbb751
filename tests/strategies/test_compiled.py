"""Errors of `torch.compile`."""

import pytest
import torch
from torch import Tensor

from ensemble.errors import UnavailableError
from ensemble.strategies import compiled


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
