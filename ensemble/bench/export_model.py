"""`--export_model`: the models of a run as one file, after its rows were measured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ensemble.bench.case import Case
from ensemble.bench.config import Config
from ensemble.bench.report import exported_file
from ensemble.bench.setup import make_example
from ensemble.bench.summary import Run
from ensemble.bench.workload import Workload
from ensemble.errors import UnavailableError, drop_frames, interrupt_behind
from ensemble.machine import memory
from ensemble.machine.dtypes import numeric_format
from ensemble.machine.precision import float32_precision
from ensemble.models import stacking
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
        models, example = _in_place(workload, case, numbers.dtype)
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


def _in_place(
    workload: Workload, case: Case, dtype: torch.dtype
) -> tuple[Sequence[nn.Module], Tensor]:
    """The models and the example of a case, on the device that is measured, in a dtype."""
    models, device = workload.models[: case.num_models], workload.device
    example = make_example(workload.images(case.image_size), case).to(device, dtype)
    if dtype == torch.float32 and workload.images(case.image_size).device == device:
        return models, example
    state = {
        name: stack.to(device, dtype if stack.is_floating_point() else stack.dtype)
        for name, stack in stacking.stacked_state(models).items()
    }
    return stacking.from_stack(stacking.skeleton(models[0]), state), example
