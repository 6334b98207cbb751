"""The text of a run: the answer, the table, notes and remarks, of timings or a load test."""

from dataclasses import dataclass

from ensemble.bench.report import gpu_remarks, load_table, verdict
from ensemble.bench.report.labels import time_lines
from ensemble.bench.report.table import render_notes, render_table
from ensemble.bench.summary import Run


@dataclass(frozen=True)
class Page:
    """Each text is empty or ends in a line break."""

    legacy_lines: tuple[str, ...]  # those of the original script
    answer: str
    table: str
    notes: str
    remarks: str


def is_load_test(run: Run) -> bool:
    """Is it a load test, without timed pairs?"""
    return run.config.get("scenario") is not None


def page_of(run: Run, *, columns: bool, sentences: bool, color: bool = False) -> Page:
    """The page of a run; with all `columns`, and a sentence per row if `sentences`."""
    results, environment = run.results, run.environment
    if is_load_test(run):
        return Page(
            (),
            load_table.render_answer(results),
            load_table.render_table(results, verbose=columns, color=color),
            render_notes(results),
            load_table.render_remarks(results, verbose=sentences) + gpu_remarks.render(run),
        )
    return Page(
        tuple(time_lines(results)),
        verdict.render_answer(results),
        render_table(
            results,
            verbose=columns,
            color=color,
            flushed_l2=bool(run.config.get("flush_l2")),
        ),
        render_notes(results),
        verdict.render_remarks(results, environment, verbose=sentences) + gpu_remarks.render(run),
    )
