"""A strategy of the user's own, `PATH.py:FUNCTION`: `function(models, example)` gives `forward(x)`.

It is built, checked and timed like any other. `models` are N models in eval mode, `example` is
`(B, 3, H, W)` or, with per-model inputs, `(N, B, 3, H, W)`; `forward(x)` returns the logits
`(N, B, classes)` as a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ensemble import user_functions
from ensemble.strategies import TUNE_SECONDS, Strategy

if TYPE_CHECKING:
    from ensemble.strategies.build_result import Builder

ARGUMENT = "strategies"


@dataclass(frozen=True)
class UserStrategy(Strategy):
    """`module` is the path of the file."""

    def builder(self, *, tune_seconds: float = TUNE_SECONDS) -> Builder:
        from ensemble.strategies.build_result import BuildResult

        function = load(self.module, self.function)

        def build(models: Any, example: Any) -> BuildResult:
            forward = function(models, example)
            if not callable(forward):
                raise ValueError(
                    f"expected {self.function} to return a callable, got {type(forward).__name__}"
                )
            return BuildResult(forward)

        return build


def is_user_strategy(name: str) -> bool:
    """Does a name of a strategy have the form `PATH.py` or `PATH.py:FUNCTION`?"""
    return user_functions.names_file(name)


def user_strategy(name: str) -> UserStrategy:
    """The strategy of a name.

    Raises:
        InputError: it names no function.
    """
    path, function = user_functions.split_file(name, argument=ARGUMENT)
    return UserStrategy(path, function, f"build of {path}")


def load(path: str, function: str) -> Callable[..., Any]:
    """A function of a file, which is executed once. It can import modules of its folder.

    Raises:
        InputError: no such file; it raises; it has no such function.
    """
    return user_functions.from_file(path, function, argument=ARGUMENT)
