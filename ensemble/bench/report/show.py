"""Show a run on the terminal, write its files, and compare it with its baseline."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from ensemble.bench.case import Case
from ensemble.bench.config import OUTPUTS, Config, ReportOptions, grid_path, outputs
from ensemble.bench.environment import Environment
from ensemble.bench.report import comparison, exports
from ensemble.bench.report.labels import case_name, varying_fields, wrapped
from ensemble.bench.report.page import is_load_test, page_of
from ensemble.bench.report.table import render_strategies
from ensemble.bench.summary import Run
from ensemble.errors import InputError
from ensemble.files import is_write_protected, reason
from ensemble.strategies import HYBRIDS, STRATEGIES

INCONCLUSIVE = 3  # exit code of a gate that neither passed nor failed


def show(run: Run, *, verbose: bool) -> None:
    """Print the two lines of the original script, the answer, the table and remarks."""
    page = page_of(run, columns=verbose, sentences=verbose, color=_may_color())
    for line in page.legacy_lines:
        print(line)
    print_wrapped(page.answer)
    print(page.table, end="")
    print_wrapped(page.notes)
    print_wrapped(page.remarks, end="")
    if verbose:
        varying = varying_fields([row.case for row in run.results])
        for row in run.results:
            print(f"{case_name(row.case, varying)}, times in s: {row.times_s}")


def print_wrapped(text: str, *, end: str = "\n") -> None:
    """Print text wrapped to the width of the terminal."""
    print(wrapped(text), end=end)


def show_missing(stopped: str, missing: Sequence[Case], planned: int) -> None:
    """List on stderr the rows without their requested number of processes."""
    if stopped and missing:
        names = "; ".join(case_name(case, varying_fields(missing)) for case in missing)
        finished = f"{planned - len(missing)} of {planned} rows are finished"
        few = "not measured, or by fewer processes than requested"
        print(wrapped(f"{stopped}: {finished}; {few}: {names}"), file=sys.stderr)


def list_strategies() -> None:
    """Print all strategies."""
    print(render_strategies({**STRATEGIES, **HYBRIDS}), end="")


def compare(config: Config, run: Run, baseline: Run | None) -> int:
    """Print the comparison with the baseline; returns the exit code of the regression gate.

    1 if a strategy is significantly slower than allowed, else `INCONCLUSIVE` if a row is.
    """
    if baseline is None:
        return 0
    compared, fail_above = comparison.compare(run, baseline), config.report.fail_above
    planned = () if config.report.from_json else config.plan()
    print_wrapped(comparison.render(compared, run, baseline, fail_above, planned), end="")
    if fail_above is None:
        return 0
    if any(row.is_significantly_slower(fail_above) for row in compared):
        return 1
    inconclusive = comparison.inconclusive_cases(compared, run, baseline, fail_above, planned)
    return INCONCLUSIVE if inconclusive else 0


def check_baseline(
    config: Config, environment: Environment, cases: Collection[Case], baseline: Run | None
) -> None:
    """Raise InputError unless the baseline comes from this machine and timed a case of the run."""
    if baseline is None:
        return
    path = str(config.report.baseline)
    comparison.check_machine(environment, baseline.environment, argument="baseline", path=path)
    timed = {row.case for row in baseline.results if row.times_s}
    if config.report.fail_above is not None:  # the reference is not gated
        timed = {case for case in timed if not case.is_reference}
    if timed.isdisjoint(cases):
        raise InputError(
            f"expected a row of this run in {path}, got none with the same strategy, N, batch,"
            " px, dtype and inputs: there is nothing to compare",
            argument="baseline",
        )


def has_failed(config: Config, run: Run) -> bool:
    """Did a row fail, or is a requested strategy unavailable?"""
    all_requested = set(config.run.strategies) == set(STRATEGIES)
    bad = {"failed"} if all_requested or config.report.from_json else {"failed", "unavailable"}
    return any(row.status in bad for row in run.results)


class Files:
    """The requested output files, rewritten atomically after each row and at the end.

    One that cannot be written costs no result: each save tries it again, the first failure is a
    warning on stderr, and `check` raises an error for those that failed at the end.

    Raises:
        InputError: a path holds a file that this program did not write.
    """

    def __init__(self, options: ReportOptions) -> None:
        self._options, self._problems = options, dict[str, str]()
        self._warned = set[str]()
        if not options.overwrite:
            for name in OUTPUTS:
                _check_own(name, getattr(options, name))

    def save(self, run: Run) -> None:
        """Write the run in each format that has a path."""
        before = set(self._problems)
        self._try_exports(run)
        for name in self._problems.keys() - before - self._warned:
            self._warned.add(name)
            text = f"Warning: {self._problems[name]}; each later save tries again"
            with contextlib.suppress(OSError):  # stderr may be on the same full disk
                print(text, file=sys.stderr, flush=True)

    def finish(self, run: Run) -> None:
        """Write all files, including pictures, unless the run has no rows."""
        if run.results:
            self._try_exports(run)
            self._try({"plot": ""}, run)

    def check(self) -> None:
        """Raise InputError for the files whose last write failed."""
        if self._problems:
            raise InputError("; ".join(self._problems.values()))

    def _try_exports(self, run: Run) -> None:
        self._try({f"export_{form}": form for form in exports.FORMATS}, run)

    def _try(self, forms: dict[str, str], run: Run) -> None:
        for name, form in forms.items():
            path = getattr(self._options, name)
            if path is None:
                continue
            try:
                if not self._options.overwrite:
                    _check_own(name, path)  # it may have appeared meanwhile
                if form:
                    exports.save(run, {form: path})
                else:
                    _draw(run, path)
                self._problems.pop(name, None)
            except Exception as error:
                why = error.message if isinstance(error, InputError) else reason(error)
                self._problems[name] = f"{path} cannot be written: {why}"


def _check_own(name: str, path: str | None) -> None:
    for written in () if path is None else outputs(name, path):
        try:
            own = not Path(written).exists() or exports.is_own(
                name.removeprefix("export_"), Path(written)
            )
        except OSError:  # unreadable: not ours
            own = False
        if not own:
            raise InputError(
                f"expected no file or an earlier output at {written}, got another file;"
                " --overwrite replaces it",
                argument=name,
            )
        if Path(written).exists() and is_write_protected(written):
            raise InputError(
                f"expected a writable file at {written}, got a write-protected one;"
                " --overwrite replaces it",
                argument=name,
            )


def _draw(run: Run, path: str) -> None:
    os.environ.pop("MPLBACKEND", None)  # figures need no backend; an unknown one fails the import
    from ensemble.bench.report import load_picture, pictures

    if is_load_test(run):
        load_picture.save(run.results, Path(path))
    else:
        pictures.save(run.results, Path(path), grid_path(path))


def _may_color() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
