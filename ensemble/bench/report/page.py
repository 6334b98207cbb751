"""What a run says, whole: the answer, the table, the remarks. One place knows which kind it is."""

from dataclasses import dataclass

from ensemble.bench.report import load_table, verdict
from ensemble.bench.report.table import render_notes, render_table
from ensemble.bench.report.words import time_lines
from ensemble.bench.summary import Run


@dataclass(frozen=True)
class Page:
    """Texts that end in a line break, where they are not empty."""

    known: tuple[str, ...]  # the lines that users of the original know
    answer: str
    table: str
    notes: str
    remarks: str


def is_under_load(run: Run) -> bool:
    """Was it requests that were played, and not pairs that were timed?"""
    return run.config.get("scenario") is not None


def page_of(run: Run, *, columns: bool, sentences: bool, colour: bool = False) -> Page:
    """The page of a run: with all `columns`, with `sentences` on each row."""
    results, environment = run.results, run.environment
    if is_under_load(run):
        return Page(
            (),
            load_table.render_answer(results),
            load_table.render_table(results, verbose=columns, colour=colour),
            render_notes(results),
            load_table.render_remarks(results, verbose=sentences),
        )
    return Page(
        tuple(time_lines(results)),
        verdict.render_answer(results),
        render_table(results, verbose=columns, colour=colour),
        render_notes(results),
        verdict.render_remarks(results, environment, verbose=sentences),
    )
