"""Resume a run where an earlier one ended. Imports no torch."""

from __future__ import annotations

from dataclasses import replace

from ensemble.bench.config import Config
from ensemble.bench.report.comparison import check_machine, differences
from ensemble.bench.summary import Run
from ensemble.errors import InputError


def resume(config: Config, new: Run, earlier: Run | None) -> Run:
    """A new run with what an earlier one has finished; failed rows are measured again.

    Raises:
        InputError: the earlier run comes from another machine, or was made with other settings.
    """
    if earlier is None:
        return new
    path = str(config.measure.resume)
    check_machine(new.environment, earlier.environment, argument="resume", path=path)
    for difference in [*differences(new, earlier), *_other_processes(config, earlier)]:
        message = f"expected the settings of {path}, found {difference}"
        raise InputError(message, argument="resume")
    kept = tuple(row for row in earlier.results if row.status != "failed")
    first = earlier.environment.first_forward_s  # of the process that the kept rows belong to
    return replace(new, environment=replace(new.environment, first_forward_s=first), results=kept)


def _other_processes(config: Config, earlier: Run) -> list[str]:
    """Were rows measured in fresh processes in one run, and in the program's in the other?

    Files of schema 1 come from the time when all were measured in one.
    """
    before = int(earlier.config.get("processes") or 0)
    same = bool(before) == bool(config.measure.processes)
    return [] if same else [f"processes: {config.measure.processes}, was {before}"]
