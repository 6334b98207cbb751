"""Results -> text: the table, the verdict, the warnings. Pure functions, no torch."""

import io
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ensemble.results import BUSY, CONFIDENCE, NOISY, SELF_CHECK, TOO_NOISY, Environment, Result

UNKNOWN = ""
WIDEST = 1000  # of a table, in characters: no cell is ever cut
HEADERS = (
    "N",
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
ROOFLINE_HEADERS = ("of the\nlimit", "bound\nby")


def render_table(results: Sequence[Result]) -> str:
    """One table, a row a strategy, as wide as it must be; a cell that is not known is empty.

    Under it, a line for each row that failed or has something to say.
    """
    table = Table(box=SIMPLE_HEAD)
    table.add_column("strategy", no_wrap=True)
    for header in HEADERS + (ROOFLINE_HEADERS if _has_roofline(results) else ()):
        table.add_column(header, justify="right", no_wrap=True)
    for result in results:
        roofline = (_number(result.roofline_share, ".0%"), result.bound or UNKNOWN)
        table.add_row(*_cells(result), *(roofline if _has_roofline(results) else ()))
    text = io.StringIO()
    Console(file=text, width=WIDEST, highlight=False, no_color=True).print(table)
    lines = [line.rstrip() for line in text.getvalue().splitlines() if line.strip()]
    return "\n".join([_title(results), *lines, *reasons(results)]) + "\n"


def _has_roofline(results: Sequence[Result]) -> bool:
    return any(result.least_s is not None for result in results)


def reasons(results: Sequence[Result]) -> list[str]:
    """Why rows have no speedup, and what else there is to say of them."""
    lines = [f"{_name(row)}: {row.status}: {row.error}" for row in results if row.error]
    return lines + [f"{_name(row)}: note: {note}" for row in results for note in row.notes]


def render_verdict(results: Sequence[Result], environment: Environment) -> str:
    """What the run says: for each N the strategies against the reference, named, with direction."""
    lines = []
    for num_models in dict.fromkeys(result.num_models for result in results):
        rows = [result for result in results if result.num_models == num_models]
        compared = [row for row in rows if row.speedup is not None and not row.is_reference]
        for row in compared:
            lines.append(_sentence(row, environment))
            lines += _noise_warning(row)
            lines += [] if row.inconclusive else _fault_sentence(row, environment)
        if num_models == results[0].num_models:  # nothing is cold after the first N
            lines += _cold_sentence(rows, environment)
        if sum(row.strategy != SELF_CHECK for row in compared) > 1:
            lines.append(_fastest(rows))
    return "\n".join(lines or ["Verdict: nothing was compared with the reference."]) + "\n"


def time_lines(results: Sequence[Result]) -> list[str]:
    """The two lines that users of the original know, for each N: medians in seconds.

    Both come from the pairs of the row `vmap`, so that they belong together.
    """
    lines = []
    counts = list(dict.fromkeys(row.num_models for row in results)) or [0]
    for count in counts:
        rows = [row for row in results if row.num_models == count]
        vmapped = next((row for row in rows if row.strategy == "vmap"), None)
        looped = next((row for row in rows if row.is_reference), None)
        without = looped.median_s if looped else None
        if vmapped and vmapped.reference_median_s:
            without = vmapped.reference_median_s
        with_vmap = vmapped.median_s if vmapped else None
        suffix = f" ({count} models)" if len(counts) > 1 else ""
        lines += [
            f"Time taken for prediction without vmap: {_seconds(without)}{suffix}",
            f"Time taken for prediction with vmap: {_seconds(with_vmap)}{suffix}",
        ]
    return lines


def _title(results: Sequence[Result]) -> str:
    if not results:
        return "no results"
    row = results[0]
    return (
        f"{row.inputs.replace('_', '-')} inputs, batch {row.batch_size}, {row.image_size} px,"
        f" {row.dtype}; medians; speedup: reference time / strategy time,"
        " the reference being the float32 loop"
    )


def _cells(row: Result) -> list[str]:
    return [
        row.strategy,
        str(row.num_models),
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


def _sentence(row: Result, environment: Environment) -> str:
    assert row.speedup is not None
    where = f"{row.num_models} models on {environment.device}"
    pairs = f"{len(row.times_s)} pairs"
    interval = row.speedup_interval
    if interval is None:
        return f"Verdict: {row.strategy}, {where}: {pairs} are too few to say; raise --min_pairs."
    if row.inconclusive:
        return (
            f"Verdict: {row.strategy}, {where}: {row.inconclusive} to say: the inter-quartile range"
            f" is {row.noise:.0%} of the median, above {TOO_NOISY:.0%}; close other programs or"
            " raise --min_seconds."
        )
    low, high = interval
    surely = f"{CONFIDENCE:.0%} interval {low:.2f} to {high:.2f}, {pairs}"
    if low <= 1 <= high:
        return (
            f"Verdict: {row.strategy}, {where}: no difference from the reference (the float32 loop)"
            f" that this run can show: {row.speedup:.2f} times ({surely})."
        )
    direction = f"{row.speedup:.2f} times" + (" faster" if row.speedup > 1 else ": slower")
    return (
        f"Verdict: {row.strategy}, {where}: {direction} than the reference (the float32 loop),"
        f" {surely}."
    )


def _noise_warning(row: Result) -> list[str]:
    if row.others_cpu_share is not None and row.others_cpu_share > BUSY:
        return [
            f"Warning: {row.strategy}: other programs took {row.others_cpu_share:.0%} of the CPU"
            " while this was timed, which hits strategies unequally; stop them and run again."
        ]
    if row.noise is None or not NOISY < row.noise <= TOO_NOISY:
        return []
    return [
        f"Warning: {row.strategy}: noisy, the inter-quartile range is {row.noise:.0%} of the"
        " median; for a narrower interval close other programs or raise --min_seconds."
    ]


def _fault_sentence(row: Result, environment: Environment) -> list[str]:
    """Say so where page faults explain at least half of what a strategy loses to the reference."""
    ours, theirs = row.page_faults_per_call, row.reference_page_faults_per_call
    times = row.median_s, row.reference_median_s
    cost = environment.page_fault_s
    if ours is None or theirs is None or cost is None or times[0] is None or times[1] is None:
        return []
    lost, extra = times[0] - times[1], ours - theirs
    # The threads of a parallel kernel fault at the same time, each in its own part of a buffer.
    faulted = extra * cost / environment.threads
    if lost <= 0 or faulted < lost / 2:
        return []
    return [
        f"Page faults explain this: {ours:,.0f} a call against {theirs:,.0f} in the reference, at"
        f" {cost * 1e6:.1f} us each over {environment.threads} threads, are about"
        f" {min(1, faulted / lost):.0%} of the {lost * 1e3:.0f} ms lost."
        " The allocator gives memory back at every call; --allocator retain keeps it."
    ]


def _cold_sentence(rows: Sequence[Result], environment: Environment) -> list[str]:
    """What start-up cost, and what first calls alone would have said of the speedup."""
    loop = next((row for row in rows if row.is_reference and row.first_call_s), None)
    vmap = next((row for row in rows if row.strategy == "vmap" and row.speedup), None)
    if loop is None or vmap is None or not loop.median_s:
        return []
    if not loop.first_call_s or not vmap.first_call_s:
        return []
    took = f"{environment.first_forward_s:.3f} s"
    if loop.batch_size == 1:  # as the very first forward
        steady = loop.median_s / loop.num_models
        took += f", {environment.first_forward_s / steady:.1f} times a steady one"
    return [
        f"Cold starts: the very first forward of this process took {took}."
        f" The first calls after it (loop {loop.first_call_s:.3f} s, vmap"
        f" {vmap.first_call_s:.3f} s) would have said"
        f" {loop.first_call_s / vmap.first_call_s:.2f} times."
    ]


def _fastest(rows: Sequence[Result]) -> str:
    sure = [
        row
        for row in rows
        if row.speedup is not None and not row.inconclusive and row.strategy != SELF_CHECK
    ]
    if not any(not row.is_reference for row in sure):
        return f"Fastest with {rows[0].num_models} models: no strategy's figure is sure enough."
    best = max(sure, key=lambda row: row.speedup or 0)
    if (best.speedup or 0) <= 1:
        return f"Fastest with {best.num_models} models: the reference itself, loop in float32."
    return f"Fastest with {best.num_models} models: {best.strategy}, {best.speedup:.2f} times."


def _name(row: Result) -> str:
    return f"{row.strategy}, {row.num_models} models"


def _seconds(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.6f}"


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return UNKNOWN if value is None else format(value * scale, form)
