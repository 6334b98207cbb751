"""Results -> the table, and what stands under it. Pure functions, no torch."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from ensemble.records import Case, Result
from ensemble.report.words import case_name, title, varying_fields
from ensemble.statistics import CONFIDENCE
from ensemble.strategies import Strategy

UNKNOWN = ""
WIDEST = 1000  # of a table, in characters: no cell is ever cut
STYLES = {"faster": "green", "slower": "red", "failed": "bold red"}

Cell = Callable[[Result], str]


@dataclass(frozen=True)
class Column:
    """A header of two lines, and what a row has under it; `always` or only where it says something.

    A column says something where some row has another cell than nothing and `silent`.
    """

    header: str
    cell: Cell
    always: bool = True
    silent: str = UNKNOWN


def render_table(results: Sequence[Result], *, verbose: bool = False, colour: bool = False) -> str:
    """One table, a row a strategy; with `verbose` all columns and all rows.

    Rows that cannot run here are one line under it, as is each that failed or has a note. Colour is
    by escape sequences, for a terminal.
    """
    shown = [row for row in results if verbose or row.status != "unavailable"]
    columns = _columns(results, verbose=verbose)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold" if colour else "")
    table.add_column("\nstrategy", no_wrap=True)
    for column in columns:
        table.add_column(column.header, justify="right", no_wrap=True)
    for row in shown:
        cells = (column.cell(row) for column in columns)
        table.add_row(row.case.strategy, *cells, style=STYLES.get(_kind(row), ""))
    text = io.StringIO()
    Console(
        file=text,
        width=WIDEST,
        highlight=False,
        force_terminal=colour,
        color_system="standard" if colour else None,
    ).print(table)
    lines = [line.rstrip() for line in text.getvalue().splitlines() if line.strip()]
    return "\n".join([title([row.case for row in results]), *lines, *remarks(results)]) + "\n"


def render_strategies(strategies: Mapping[str, Strategy]) -> str:
    """What each strategy is, needs and costs, by name."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for header in ("strategy", "what it is", "needs", "start"):
        table.add_column(header, no_wrap=True)
    for name, own in strategies.items():
        table.add_row(name, own.summary, own.needs, own.start)
    text = io.StringIO()
    Console(file=text, width=WIDEST, highlight=False, no_color=True).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def remarks(results: Sequence[Result]) -> list[str]:
    """Why rows have no speedup, and what else there is to say of them."""
    varying = varying_fields([row.case for row in results])
    unavailable: dict[str, list[Case]] = {}
    for row in results:
        if row.status == "unavailable":
            unavailable.setdefault(str(row.error), []).append(row.case)
    lines = [
        f"Not available here: {', '.join(_once(cases))}: {reason}"
        for reason, cases in unavailable.items()
    ]
    failed = [row for row in results if row.status == "failed"]
    lines += [f"{case_name(row.case, varying)}: failed: {row.error}" for row in failed]
    notes: dict[str, list[Result]] = {}
    for row in results:
        for note in row.notes:
            notes.setdefault(note, []).append(row)
    for note, rows in notes.items():
        who = "all rows" if len(rows) == len(results) > 1 else None
        names = who or "; ".join(case_name(row.case, varying) for row in rows)
        lines.append(f"{names}: {note}")
    return lines


def _once(cases: Sequence[Case]) -> list[str]:
    return list(dict.fromkeys(case.strategy for case in cases))


def _kind(row: Result) -> str:
    """What a row's colour says."""
    if row.status != "ok":
        return "failed"
    interval = row.speedup_interval
    if row.inconclusive or interval is None or interval[0] <= 1 <= interval[1]:
        return ""
    return "faster" if interval[0] > 1 else "slower"


def _columns(results: Sequence[Result], *, verbose: bool) -> list[Column]:
    varying = varying_fields([row.case for row in results])
    place = [
        Column(f"\n{header}", lambda row, field=field: str(getattr(row.case, field)))  # type: ignore[misc]
        for header, field in varying.items()
    ]
    every = [Column("\nN", lambda row: str(row.case.num_models)), *place, *COLUMNS]
    if verbose:
        return [*every, *VERBOSE_COLUMNS]
    return [column for column in every if column.always or _says_something(column, results)]


def _says_something(column: Column, results: Sequence[Result]) -> bool:
    return any(column.cell(row) not in (UNKNOWN, column.silent) for row in results)


def _per_call(row: Result) -> str:
    if row.median_s is None:
        return UNKNOWN
    spread = "" if row.iqr_s is None else f" ({row.iqr_s * 1e3:.{_digits(row.median_s)}f})"
    return f"{row.median_s * 1e3:.{_digits(row.median_s)}f}{spread}"


def _digits(seconds: float) -> int:
    """Decimal places of milliseconds that show three digits or more."""
    return 1 if seconds >= 0.1 else 2


def _speedup(row: Result) -> str:
    if row.speedup is None:
        return row.status if row.error else UNKNOWN
    if row.case.is_reference:
        return "1 (reference)"
    if row.inconclusive:
        return row.inconclusive
    interval = row.speedup_interval
    return f"{row.speedup:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return UNKNOWN if value is None else format(value * scale, form)


COLUMNS = (
    Column("per call\nms (IQR)", _per_call),
    Column(f"speedup\n[{CONFIDENCE:.0%} interval]", _speedup),
    Column("\nerror", lambda row: _number(row.max_rel_error, ".0e")),
    Column("start\n(s)", lambda row: _number(row.start_s, ".2f")),
    Column("memory\n(MB)", lambda row: _number(row.peak_memory_bytes, ".0f", 1e-6)),
    Column(
        "page\nfaults",
        lambda row: _number(row.page_faults_per_call, ",.0f"),
        always=False,
        silent="0",
    ),
    Column(
        "top-1\nagrees",
        lambda row: _number(row.top1_agreement, ".1%"),
        always=False,
        silent="100.0%",
    ),
    Column(
        "parallel\nefficiency", lambda row: _number(row.parallel_efficiency, ".0%"), always=False
    ),
    Column("of the\nlimit", lambda row: _number(row.roofline_share, ".0%"), always=False),
)
VERBOSE_COLUMNS = (
    Column("build\n(s)", lambda row: _number(row.build_s, ".2f")),
    Column("first call\n(s)", lambda row: _number(row.first_call_s, ".3f")),
    Column("error to\nfloat64", lambda row: _number(row.error_float64, ".0e")),
    Column("bound\nby", lambda row: row.bound or UNKNOWN),
)
