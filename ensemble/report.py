"""Results -> text: the table and the two lines of old. Pure functions, no torch."""

import io
from collections.abc import Callable, Collection, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ensemble.results import CONFIDENCE, Result
from ensemble.sweep import cells

UNKNOWN = ""
WIDEST = 1000  # of a table, in characters: no cell is ever cut
HEADERS = (
    "build\n(s)",
    "first call\n(s)",
    "call\n(ms)",
    "IQR\n(ms)",
    f"speedup\n[{CONFIDENCE:.0%} interval]",
    "max_rel\nerror",
    "top-1\nagrees",
    "memory\n(MB)",
    "page faults\na call",
)


def render_table(results: Sequence[Result]) -> str:
    """One table, a row a strategy, as wide as it must be; a cell that is not known is empty.

    Under it, a line for each row that failed or has something to say.
    """
    table = Table(box=SIMPLE_HEAD)
    table.add_column("strategy", no_wrap=True)
    varying, extra = varying_columns(results), _extra_columns(results)
    headers = ("N", *varying, *HEADERS, *(name for name, _ in extra))
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for result in results:
        place = [str(getattr(result, field)) for field in varying.values()]
        own = [str(result.num_models), *place, *_cells(result)]
        table.add_row(result.strategy, *own, *(cell(result) for _, cell in extra))
    text = io.StringIO()
    Console(file=text, width=WIDEST, highlight=False, no_color=True).print(table)
    lines = [line.rstrip() for line in text.getvalue().splitlines() if line.strip()]
    return "\n".join([_title(results), *lines, *reasons(results)]) + "\n"


def varying_columns(results: Sequence[Result]) -> dict[str, str]:
    """Headers and fields of what is not the same in all rows, beside N."""
    fields = {"batch": "batch_size", "px": "image_size", "dtype": "dtype"}
    return {
        header: field
        for header, field in fields.items()
        if len({getattr(row, field) for row in results}) > 1
    }


def _extra_columns(results: Sequence[Result]) -> list[tuple[str, Callable[[Result], str]]]:
    """Headers and cells of the columns that some of the rows have something for."""
    columns: list[tuple[str, Callable[[Result], str]]] = []
    if any(result.error_float64 is not None for result in results):
        columns.append(("error to\nfloat64", lambda row: _number(row.error_float64, ".1e")))
    if any(result.least_s is not None for result in results):
        columns.append(("of the\nlimit", lambda row: _number(row.roofline_share, ".0%")))
        columns.append(("bound\nby", lambda row: row.bound or UNKNOWN))
    return columns


def reasons(results: Sequence[Result]) -> list[str]:
    """Why rows have no speedup, and what else there is to say of them."""
    varying = varying_columns(results)
    lines = [f"{name(row, varying)}: {row.status}: {row.error}" for row in results if row.error]
    notes = [(name(row, varying), note) for row in results for note in row.notes]
    return lines + [f"{who}: note: {note}" for who, note in notes]


def name(row: Result, varying: Collection[str]) -> str:
    """The row in words: its strategy, N, and what of batch, px and dtype varies in the run."""
    parts = [text for header, text in _place(row).items() if header in varying]
    return ", ".join([row.strategy, f"{row.num_models} models", *parts])


def _place(row: Result) -> dict[str, str]:
    """What may vary beside N, in words, by the headers of `varying_columns`."""
    return {
        "batch": f"batch {row.batch_size}",
        "px": f"{row.image_size} px",
        "dtype": row.dtype,
    }


def time_lines(results: Sequence[Result]) -> list[str]:
    """The two lines that users of the original know, for each cell: medians in seconds.

    Both come from the pairs of the row `vmap`, so that they belong together.
    """
    lines = []
    grid = cells([row for row in results if row.dtype == "float32"])
    varying = varying_columns(results).keys() - {"dtype"}
    for rows in grid.values() or [[]]:
        where = name(rows[0], varying).partition(", ")[2] if len(grid) > 1 else ""
        vmapped = next((row for row in rows if row.strategy == "vmap"), None)
        looped = next((row for row in rows if row.is_reference), None)
        without = looped.median_s if looped else None
        if vmapped and vmapped.reference_median_s:
            without = vmapped.reference_median_s
        with_vmap = vmapped.median_s if vmapped else None
        suffix = f" ({where})" if where else ""
        lines += [
            f"Time taken for prediction without vmap: {_seconds(without)}{suffix}",
            f"Time taken for prediction with vmap: {_seconds(with_vmap)}{suffix}",
        ]
    return lines


def _title(results: Sequence[Result]) -> str:
    if not results:
        return "no results"
    row, varying = results[0], varying_columns(results)
    parts = [text for header, text in _place(row).items() if header not in varying]
    inputs = f"{row.inputs.replace('_', '-')} inputs"
    return (
        f"{', '.join([inputs, *parts])}; medians; speedup: reference time / strategy time,"
        " the reference being the float32 loop"
    )


def _cells(row: Result) -> list[str]:
    return [
        _number(row.build_s, ".2f"),
        _number(row.first_call_s, ".3f"),
        _number(row.median_s, ".2f", 1e3),
        _number(row.iqr_s, ".2f", 1e3),
        _speedup_cell(row),
        _number(row.max_rel_error, ".1e"),
        _number(row.top1_agreement, ".1%"),
        _number(row.peak_memory_bytes, ".0f", 1e-6),
        _number(row.page_faults_per_call, ",.0f"),
    ]


def _speedup_cell(row: Result) -> str:
    if row.speedup is None:
        return row.status if row.error else UNKNOWN
    if row.is_reference:
        return "1 (reference)"
    if row.inconclusive:
        return row.inconclusive
    interval = row.speedup_interval
    return f"{row.speedup:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def _seconds(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.6f}"


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return UNKNOWN if value is None else format(value * scale, form)
