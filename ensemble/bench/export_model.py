"""`--export_model`: the models of a run as one file, after its rows were measured."""

from __future__ import annotations

import sys
from collections.abc import Callable

from ensemble.bench.config import Config
from ensemble.bench.models_in_place import models_in_place
from ensemble.bench.report import exported_file
from ensemble.bench.summary import Run
from ensemble.bench.workload import Workload
from ensemble.errors import UnavailableError, drop_frames, interrupt_behind
from ensemble.machine import memory
from ensemble.machine.dtypes import numeric_format
from ensemble.machine.precision import float32_precision
from ensemble.strategies.exported import export


def export_model(
    config: Config, workload: Workload, run: Run, *, say: Callable[[str], None]
) -> int:
    """Write the file of `--export_model`, in the first dtype, for the device that was measured, and
    say what it keeps of the speed of the fastest row; returns the exit code.

    Raises:
        InputError: the file cannot be written, or memory does not suffice.
    """
    path, case = config.report.export_model, config.plan()[0]
    assert path is not None
    numbers = numeric_format(config.run.dtype[0])
    with memory.out_of_memory_as_input_error("the models are exported", argument="export_model"):
        models, example = models_in_place(workload, case, numbers.dtype)
        try:
            with float32_precision(numbers.float32_precision):
                report = export(models, example, path, overwrite=config.report.overwrite)
        except UnavailableError as error:
            if interrupt := interrupt_behind(error):  # compilers replace it by an error of theirs
                raise interrupt from None
            drop_frames(error)
            print(f"error: --export_model: {error}", file=sys.stderr)
            return 1
    say(exported_file.render(report, len(models), config.run.dtype[0], run.results))
    return 0
