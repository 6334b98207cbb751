"""A run on the terminal and in files: the answer, the table, what there is to know beside it."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from ensemble.bench.case import Case
from ensemble.bench.config import OUTPUTS, Config, ReportOptions, grid_path, outputs
from ensemble.bench.environment import Environment
from ensemble.bench.report import comparison, exports
from ensemble.bench.report.page import is_under_load, page_of
from ensemble.bench.report.table import render_strategies
from ensemble.bench.report.words import case_name, varying_fields, wrapped
from ensemble.bench.summary import Run
from ensemble.errors import InputError
from ensemble.files import reason
from ensemble.strategies import HYBRIDS, STRATEGIES

NOT_JUDGED = 3  # the exit code of a gate that could not do its work: neither passed nor failed


def show(run: Run, *, verbose: bool) -> None:
    """Print the two lines that users of the original know, the answer, the table and remarks."""
    page = page_of(run, columns=verbose, sentences=verbose, colour=_may_colour())
    for line in page.known:
        print(line)
    say(page.answer)
    print(page.table, end="")
    say(page.notes)
    say(page.remarks, end="")
    if verbose:
        varying = varying_fields([row.case for row in run.results])
        for row in run.results:
            print(f"{case_name(row.case, varying)}, times in s: {row.times_s}")


def say(text: str, *, end: str = "\n") -> None:
    """Print sentences, as wide as the terminal."""
    print(wrapped(text), end=end)


def show_left(stopped: str, left: Sequence[Case], planned: int) -> None:
    """List on stderr the rows that were not measured, or by fewer processes than requested."""
    if stopped and left:
        names = "; ".join(case_name(case, varying_fields(left)) for case in left)
        finished = f"{planned - len(left)} of {planned} rows are finished"
        few = "not measured, or by fewer processes than requested"
        print(wrapped(f"{stopped}: {finished}; {few}: {names}"), file=sys.stderr)


def list_strategies() -> None:
    """Print what strategies there are."""
    print(render_strategies({**STRATEGIES, **HYBRIDS}), end="")


def compare(config: Config, run: Run, baseline: Run | None) -> int:
    """Print a run beside its baseline; the exit code: 1 where a strategy is surely slower than is
    allowed, `NOT_JUDGED` where none is but that cannot be said of all."""
    if baseline is None:
        return 0
    compared, fail_above = comparison.compare(run, baseline), config.report.fail_above
    asked = () if config.report.from_json else config.plan()
    say(comparison.render(compared, run, baseline, fail_above, asked), end="")
    if fail_above is None:
        return 0
    if any(row.surely_slower(fail_above) for row in compared):
        return 1
    open_cases = comparison.not_judged(compared, run, baseline, fail_above, asked)
    return NOT_JUDGED if open_cases else 0


def check_baseline(
    config: Config, environment: Environment, cases: Collection[Case], baseline: Run | None
) -> None:
    """Raise InputError unless a baseline comes from the machine of the run and has one of its
    cases, timed."""
    if baseline is None:
        return
    path = str(config.report.baseline)
    comparison.check_machine(environment, baseline.environment, argument="baseline", path=path)
    timed = {row.case for row in baseline.results if row.times_s}
    if config.report.fail_above is not None:  # the reference is never judged
        timed = {case for case in timed if not case.is_reference}
    if timed.isdisjoint(cases):
        raise InputError(
            f"expected in {path} a row of this run, found none of the same strategy, N, batch, px,"
            " dtype and inputs: there is nothing to compare",
            argument="baseline",
        )


def has_failed(config: Config, run: Run) -> bool:
    """Did a row fail, or can a strategy that was named not run here?"""
    asked_for_all = set(config.run.strategies) == set(STRATEGIES)
    bad = {"failed"} if asked_for_all or config.report.from_json else {"failed", "unavailable"}
    return any(row.status in bad for row in run.results)


class Files:
    """The files that were asked for, written whole after each row and at the end.

    One that cannot be written costs no result: it is said after these are shown.

    Raises:
        InputError: at a path lies another file than one of these.
    """

    def __init__(self, options: ReportOptions) -> None:
        self._options, self._problems = options, dict[str, str]()
        if not options.overwrite:
            for name in OUTPUTS:
                _check_own(name, getattr(options, name))

    def save(self, run: Run) -> None:
        """Write the run in each format that has a path, unless an earlier try of it has failed."""
        self._try({f"export_{form}": form for form in exports.FORMATS}, run)

    def finish(self, run: Run) -> None:
        """Write everything, pictures too; nothing of a run without rows."""
        if run.results:
            self.save(run)
            self._try({"plot": ""}, run)

    def check(self) -> None:
        """Raise InputError where a file could not be written."""
        if self._problems:
            raise InputError("; ".join(self._problems.values()))

    def _try(self, forms: dict[str, str], run: Run) -> None:
        for name, form in forms.items():
            path = getattr(self._options, name)
            if path is None or name in self._problems:
                continue
            try:
                if not self._options.overwrite:
                    _check_own(name, path)  # another may have been put there meanwhile
                if form:
                    exports.save(run, {form: path})
                else:
                    _draw(run, path)
            except Exception as error:
                self._problems[name] = f"{path} cannot be written: {reason(error)}"


def _check_own(name: str, path: str | None) -> None:
    for written in () if path is None else outputs(name, path):
        try:
            own = not Path(written).exists() or exports.is_own(
                name.removeprefix("export_"), Path(written)
            )
        except OSError:  # one that cannot be read, of somebody else
            own = False
        if not own:
            raise InputError(
                f"expected a new file or an earlier one of this kind, found another at {written};"
                " --overwrite replaces it",
                argument=name,
            )


def _draw(run: Run, path: str) -> None:
    os.environ.pop("MPLBACKEND", None)  # figures need no backend; an unknown one fails the import
    from ensemble.bench.report import load_picture, pictures

    if is_under_load(run):
        load_picture.save(run.results, Path(path))
    else:
        pictures.save(run.results, Path(path), grid_path(path))


def _may_colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
