"""A strategy of the user's own, `PATH.py:FUNCTION`: `function(models, example)` gives `forward(x)`.

It is built, checked and timed like any other. `models` are N models in eval mode, `example` is
`(B, 3, H, W)` or, with per-model inputs, `(N, B, 3, H, W)`; `forward(x)` returns the logits
`(N, B, classes)` as a tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble.errors import InputError, first_line
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
    return ".py:" in name or name.endswith(".py")


def user_strategy(name: str) -> UserStrategy:
    """The strategy of a name.

    Raises:
        InputError: it names no function.
    """
    path, _, function = name.rpartition(":") if ".py:" in name else (name, "", "")
    if not function:
        raise InputError(f"expected PATH.py:FUNCTION, got {name}", argument=ARGUMENT)
    return UserStrategy(path, function, f"build of {path}")


def load(path: str, function: str) -> Callable[..., Any]:
    """A function of a file, which is executed once. It can import modules of its folder.

    Raises:
        InputError: no such file; it raises; it has no such function.
    """
    file = Path(path).absolute()
    module = sys.modules.get(name := f"resnet_vmap strategy {file}")
    if module is None:
        if not file.is_file():
            raise InputError(f"expected a file at {path}, got none", argument=ARGUMENT)
        spec = spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        if str(file.parent) not in sys.path:
            sys.path.append(str(file.parent))
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise InputError(f"{path} cannot be imported: {reason}", argument=ARGUMENT) from error
        sys.modules[name] = module
    found = getattr(module, function, None)
    if not callable(found):
        got = "none" if found is None else type(found).__name__
        message = f"expected a function {function} in {path}, got {got}"
        raise InputError(message, argument=ARGUMENT)
    return found  # type: ignore[no-any-return]
