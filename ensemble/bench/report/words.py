"""Cases, times and counts in words; each said in one way everywhere. No torch."""

import shutil
from collections.abc import Collection, Sequence
from textwrap import fill

from ensemble.bench.case import Case
from ensemble.bench.report.sweep import cells
from ensemble.bench.summary import Summary
from ensemble.formatting import count

COLUMNS = 100  # of what is printed where there is no terminal
_NARROWEST = 40


def wrapped(text: str, width: int | None = None) -> str:
    """Text with each line that is longer than `width` broken between words.

    width: by default that of the terminal, or of the variable COLUMNS, or the constant.
    """
    if width is None:
        width = max(_NARROWEST, shutil.get_terminal_size((COLUMNS, 0)).columns)
    return "\n".join(
        line if len(line) <= width else _broken(line, width) for line in text.split("\n")
    )


def _broken(line: str, width: int) -> str:
    """Its further lines stand two characters to the right; what has no space, a path, is whole."""
    own = " " * (len(line) - len(line.lstrip()))
    return fill(
        line.strip(),
        width,
        initial_indent=own,
        subsequent_indent=f"{own}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def varying_fields(cases: Sequence[Case]) -> dict[str, str]:
    """Headers and fields of what is not the same in all cases, beside N."""
    fields = {"batch": "batch_size", "px": "image_size", "dtype": "dtype"}
    return {
        header: field
        for header, field in fields.items()
        if len({getattr(case, field) for case in cases}) > 1
    }


def case_name(case: Case, varying: Collection[str] = ()) -> str:
    """A case in words: its strategy, N, and what of batch, px and dtype varies in the run."""
    return f"{case.strategy}, {place_name(case, varying)}"


def place_name(case: Case, varying: Collection[str] = ()) -> str:
    """Where a case stands, without its strategy."""
    parts = [text for header, text in _place(case).items() if header in varying]
    return ", ".join([count(case.num_models, "model"), *parts])


def title(cases: Sequence[Case]) -> str:
    """What all cases share, above their table."""
    return f"{title_of(cases)}; medians; speedup over the float32 loop" if cases else "no results"


def title_of(cases: Sequence[Case]) -> str:
    """What all cases share."""
    if not cases:
        return "no results"
    case, varying = cases[0], varying_fields(cases)
    parts = [text for header, text in _place(case).items() if header not in varying]
    inputs = f"{case.inputs.replace('_', '-')} inputs"
    return ", ".join([inputs, *parts])


def time_lines(results: Sequence[Summary]) -> list[str]:
    """The two lines that users of the original know, for each cell: medians in seconds.

    Both come from the pairs of the row `vmap`, so that they belong together. A dtype other than
    float32 is named; the paired loop is always in float32.
    """
    lines = []
    grid = cells(results)
    varying = varying_fields([row.case for row in results]).keys() - {"dtype"}
    for rows in grid.values() or [[]]:
        by_dtype = sorted(rows, key=lambda row: row.case.dtype != "float32")
        vmapped = next((row for row in by_dtype if row.case.strategy == "vmap"), None)
        looped = next((row for row in by_dtype if row.case.strategy == "loop"), None)
        shown = vmapped or looped
        parts = [place_name(rows[0].case, varying)] if len(grid) > 1 else []
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


def _place(case: Case) -> dict[str, str]:
    """What may vary beside N, in words, by the headers of `varying_fields`."""
    return {
        "batch": f"batch {case.batch_size}",
        "px": f"{case.image_size} px",
        "dtype": case.dtype,
    }


def _seconds(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.6f}"
