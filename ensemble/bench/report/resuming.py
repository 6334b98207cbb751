"""Resume an earlier run. Imports no torch."""

from __future__ import annotations

from dataclasses import replace

from ensemble.bench.config import Config
from ensemble.bench.report.comparison import check_machine, differences
from ensemble.bench.summary import Run
from ensemble.errors import InputError


def resume(config: Config, new: Run, earlier: Run | None) -> Run:
    """A new run with the finished rows of an earlier one; failed rows are measured again.

    Raises:
        InputError: the earlier run has another machine or other settings.
    """
    if earlier is None:
        return new
    path = str(config.measure.resume)
    check_machine(new.environment, earlier.environment, argument="resume", path=path)
    for difference in [*differences(new, earlier), *_process_difference(config, earlier)]:
        message = f"expected the settings of {path}, got {difference}"
        raise InputError(message, argument="resume")
    finished = tuple(row for row in earlier.results if row.status != "failed")
    first_forward_s = earlier.environment.first_forward_s  # of the process of the finished rows
    return replace(
        new, environment=replace(new.environment, first_forward_s=first_forward_s), results=finished
    )


def _process_difference(config: Config, earlier: Run) -> list[str]:
    """The difference if one run measured in fresh processes and the other in its own.

    Files of schema 1 have no such option: their runs measured in their own process.
    """
    before = int(earlier.config.get("processes") or 0)
    same = bool(before) == bool(config.measure.processes)
    return [] if same else [f"processes: {config.measure.processes}, was {before}"]
