"""Labels of cases, titles, and text wrapped for the terminal. No torch."""

import shutil
from collections.abc import Collection, Sequence
from textwrap import fill

from ensemble.bench.case import Case
from ensemble.bench.report.sweep import by_grid_point
from ensemble.bench.summary import Summary
from ensemble.formatting import count

COLUMNS = 100  # width without a terminal
_MIN_WIDTH = 40


def wrapped(text: str, width: int | None = None) -> str:
    """Wrap each line longer than `width` between words.

    width: by default that of the terminal, of the variable COLUMNS, or the constant.
    """
    if width is None:
        width = max(_MIN_WIDTH, shutil.get_terminal_size((COLUMNS, 0)).columns)
    return "\n".join(
        line if len(line) <= width else _wrap_line(line, width) for line in text.split("\n")
    )


def _wrap_line(line: str, width: int) -> str:
    """Continuation lines are indented by two more spaces; a path is never broken."""
    indent = " " * (len(line) - len(line.lstrip()))
    return fill(
        line.strip(),
        width,
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def varying_fields(cases: Sequence[Case]) -> dict[str, str]:
    """The column headers and fields that vary between the cases, without N."""
    fields = {"batch": "batch_size", "px": "image_size", "dtype": "dtype"}
    return {
        header: field
        for header, field in fields.items()
        if len({getattr(case, field) for case in cases}) > 1
    }


def case_name(case: Case, varying: Collection[str] = ()) -> str:
    """The label of a case: its strategy, N, and the varying fields."""
    return f"{case.strategy}, {grid_point_name(case, varying)}"


def grid_point_name(case: Case, varying: Collection[str] = ()) -> str:
    """The label of a case without its strategy."""
    parts = [text for header, text in _field_labels(case).items() if header in varying]
    return ", ".join([count(case.num_models, "model"), *parts])


def title(cases: Sequence[Case]) -> str:
    """The title of a table: what all cases share."""
    return (
        f"{shared_fields(cases)}; medians; speedup over the float32 loop" if cases else "no results"
    )


def shared_fields(cases: Sequence[Case]) -> str:
    """What all cases share."""
    if not cases:
        return "no results"
    case, varying = cases[0], varying_fields(cases)
    parts = [text for header, text in _field_labels(case).items() if header not in varying]
    inputs = f"{case.inputs.replace('_', '-')} inputs"
    return ", ".join([inputs, *parts])


def time_lines(results: Sequence[Summary]) -> list[str]:
    """The two lines of the original script, per grid point: medians in seconds.

    Both come from the pairs of the row `vmap`. A dtype other than float32 is named; the paired loop
    is always in float32.
    """
    lines = []
    grid_points = by_grid_point(results)
    varying = varying_fields([row.case for row in results]).keys() - {"dtype"}
    for rows in grid_points.values() or [[]]:
        by_dtype = sorted(rows, key=lambda row: row.case.dtype != "float32")
        vmapped = next((row for row in by_dtype if row.case.strategy == "vmap"), None)
        looped = next((row for row in by_dtype if row.case.strategy == "loop"), None)
        shown = vmapped or looped
        parts = [grid_point_name(rows[0].case, varying)] if len(grid_points) > 1 else []
        parts += [shown.case.dtype] if shown and shown.case.dtype != "float32" else []
        suffix = f" ({', '.join(parts)})" if parts else ""
        without = looped.median_s if looped else None
        if vmapped and vmapped.reference_median_s:
            without = vmapped.reference_median_s
        with_vmap = vmapped.median_s if vmapped else None
        lines += [
            f"Time taken for prediction without vmap: {_seconds(without)}{suffix}",
            f"Time taken for prediction with vmap: {_seconds(with_vmap)}{suffix}",
        ]
    return lines


def _field_labels(case: Case) -> dict[str, str]:
    """The labels of all fields but N, by the headers of `varying_fields`."""
    return {
        "batch": f"batch {case.batch_size}",
        "px": f"{case.image_size} px",
        "dtype": case.dtype,
    }


def _seconds(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.6f}"
