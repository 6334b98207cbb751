"""What an executor is: it measures cases in this process, in fresh processes, or on ranks."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from ensemble.bench.case import Case, Task
from ensemble.bench.config import Config
from ensemble.bench.measurement import Measurement
from ensemble.bench.workload import Workload

# The task of a case, asked right before it is measured; None where it is no longer needed.
TaskOf = Callable[[Case], Task | None]
OnProgress = Callable[[Case, str, float], None]  # case, stage, share of the stage that is done
# Measures cases, one after another: the measurement of each, and where it was timed in pairs with
# the reference in another process, that of the reference.
Execute = Callable[[Sequence[Case], TaskOf, OnProgress], Generator[Sequence[Measurement]]]


class Executor(Protocol):
    """Opens what measuring needs: a file that workers share, or the steps of other ranks."""

    def __call__(self, config: Config, workload: Workload) -> AbstractContextManager[Execute]: ...
