"""Results -> sentences: what a run says, how surely, and where not. Pure functions, no torch."""

from collections.abc import Collection, Sequence

from ensemble.bench.records import BUSY, Environment, Result
from ensemble.bench.report import sweep
from ensemble.bench.report.words import case_name, place_name, varying_fields
from ensemble.formatting import count, milliseconds
from ensemble.statistics import (
    CONFIDENCE,
    NOISY,
    TOO_NOISY,
    median,
    modes,
)

NOTHING = "Nothing was compared with the loop."


def render_answer(results: Sequence[Result]) -> str:
    """The answer, a line each: in every cell the fastest strategy, how much faster than the loop it
    is and what plain vmap did; of a sweep over N, from where on each strategy wins."""
    varying = varying_fields([row.case for row in results])
    lines = []
    for rows in sweep.cells(results).values():
        references = [row for row in rows if row.case.is_reference]
        compared = [row for row in rows if row.speedup is not None and not row.case.is_reference]
        compared = [row for row in compared if not row.case.is_self_check]
        for dtype in dict.fromkeys(row.case.dtype for row in compared):
            of_dtype = [row for row in compared if row.case.dtype == dtype]
            lines.append(_fastest(of_dtype, references, varying))
    if len({row.case.num_models for row in results}) > 1:
        lines += [_break_even(rows) for rows in sweep.lines(results).values()]
    return "\n".join(lines or [NOTHING]) + "\n"


def render_remarks(
    results: Sequence[Result], environment: Environment, *, verbose: bool = False
) -> str:
    """What a reader must know beside the table: noise, page faults, cold starts; with `verbose`
    each row in words. Empty where there is nothing."""
    varying = varying_fields([row.case for row in results])
    grid, lines = sweep.cells(results), []
    for index, rows in enumerate(grid.values()):
        where = f" with {place_name(rows[0].case, varying)}" if len(grid) > 1 else ""
        for row in rows:
            lines += _ranks(row, case_name(row.case, varying), environment)
            if row.speedup is None or row.case.is_reference:
                continue
            lines += [_sentence(row, case_name(row.case, varying))] if verbose else []
            lines += _two_modes(row, case_name(row.case, varying))
            lines += [] if row.inconclusive else _page_faults(row, where, environment)
        if index == 0:  # nothing is cold after the first cell
            lines += _cold_start(rows, environment)
    lines += _noise([row for row in results if row.speedup is not None], varying)
    return "".join(f"{line}\n" for line in lines)


def _fastest(rows: Sequence[Result], references: Sequence[Result], varying: Collection[str]) -> str:
    """Which of the rows, all of one dtype, is the fastest, how surely, and what it costs."""
    where = f"Fastest with {place_name(rows[0].case, varying)}"
    best = sweep.fastest([*references, *rows])
    unsure = [f"{row.name} ({row.inconclusive})" for row in rows if row.inconclusive]
    if best is None or (unsure and (best.speedup or 0) <= 1):
        return f"{where}: inconclusive, because of {', '.join(unsure)}.{_all_the_same(rows)}"
    plain = next((row for row in rows if row.case.strategy == "vmap" and row is not best), None)
    beside = f"; plain vmap {_times(plain)}" if plain else ""
    if (best.speedup or 0) <= 1:
        nothing = "" if plain else f"; nothing else was faster than {_most(rows):.2f} times"
        return f"{where}: the loop itself{beside}{nothing}."
    if not sweep.surely_faster(best):
        most = f"{best.name} {_times(best)}"
        return f"{where}: no strategy is surely faster than the loop; {most}{beside}."
    faster = [row for row in rows if row is not plain and (row.speedup or 0) > (best.speedup or 0)]
    untold = "".join(f"; {row.name} {_times(row)}" for row in faster)
    sentence = f"{where}: {best.name}, {_times(best)}{beside}{untold}."
    return f"{sentence}{_price(best, references)}{_shorter_calls(best, rows)}"


def _all_the_same(rows: Sequence[Result]) -> str:
    """Which rows differ from the loop by more than a busy machine explains."""
    return "".join(
        f" {row.name} was {row.beyond_disturbance} than the loop all the same: its fastest call"
        f" took {milliseconds(min(row.times_s))}, the loop's"
        f" {milliseconds(min(row.reference_times_s))}."
        for row in rows
        if row.beyond_disturbance
    )


def _times(row: Result) -> str:
    """`2.96 times as fast as the loop (95% interval 2.89 to 3.12)`, or why not."""
    interval = row.speedup_interval
    if row.inconclusive or interval is None or row.speedup is None:
        return f"inconclusive ({row.inconclusive or row.status})"
    surely = f"({CONFIDENCE:.0%} interval {interval[0]:.2f} to {interval[1]:.2f})"
    slower = ": slower" if interval[1] < 1 else ""
    return f"{row.speedup:.2f} times as fast as the loop{slower} {surely}"


def _most(rows: Sequence[Result]) -> float:
    return max(row.speedup or 0.0 for row in rows)


def _price(best: Result, references: Sequence[Result]) -> str:
    """What the fastest strategy costs before its steady state, and in memory."""
    text = ""
    for reference in references:
        calls, extra = sweep.calls_to_pay_back(best, reference), sweep.extra_memory(best, reference)
        if calls is not None:
            text += f" Its start is paid back after {count(round(calls), 'call')}"
        if extra is not None:
            more = "more" if extra >= 0 else "less"
            text += f"{';' if text else ''} it held {abs(extra) / 1e6:,.0f} MB {more} than the loop"
    return f"{text}." if text else ""


def _shorter_calls(best: Result, rows: Sequence[Result]) -> str:
    """Say so where the speedup and the time per call name different rows: the loop has drifted."""
    quiet = [row for row in rows if row.median_s and not row.inconclusive]
    shortest = min(quiet, key=lambda row: row.median_s or 0.0, default=best)
    if not best.median_s or (shortest.median_s or 0.0) > (1 - NOISY) * best.median_s:
        return ""
    return (
        f" But {shortest.name} had the shorter calls,"
        f" {milliseconds(shortest.median_s or 0.0)} against {milliseconds(best.median_s)}: the"
        " loop ran faster beside it."
    )


def _break_even(rows: Sequence[Result]) -> str:
    found = sweep.break_even(rows)
    strategy, dtype, batch, px = found.line
    who = f"Break-even: {strategy}, {dtype}, batch {batch}, {px} px"
    but = ""
    if found.unsure:
        counts = ", ".join(map(str, found.unsure))
        but = f" (nothing sure can be said of {counts})"
    if found.num_models is None:
        largest = count(found.largest, "model")
        return f"{who}: nowhere surely faster up to {largest}, the most measured{but}."
    fewest = ", the fewest measured" if found.num_models == rows[0].case.num_models else ""
    return f"{who}: surely faster from {count(found.num_models, 'model')} on{fewest}{but}."


def _sentence(row: Result, who: str) -> str:
    pairs = count(len(row.times_s), "pair")
    if len(row.processes) > 1:
        pairs += f" in {len(row.processes)} processes"
    interval = row.speedup_interval
    if interval is None:
        return f"{who}: {pairs} are too few to say; raise --min_pairs."
    if row.inconclusive:
        return f"{who}: {row.inconclusive} to say, {pairs}."
    low, high = interval
    if low <= 1 <= high:
        return (
            f"{who}: no difference from the loop that this run can show: {row.speedup:.2f} times"
            f" ({CONFIDENCE:.0%} interval {low:.2f} to {high:.2f}, {pairs})."
        )
    return f"{who}: {_times(row)}, {pairs}."


def _ranks(row: Result, who: str, environment: Environment) -> list[str]:
    """What a call over ranks consists of, and what it is worth against one rank."""
    shares = {
        "parallel efficiency": row.parallel_efficiency,
        "interference": row.interference,
        "communication": row.communication,
    }
    if None in shares.values():
        return []
    parts = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    one = row.speedup_over_one_rank
    beside = "" if one is None else f"; {one:.2f} times as fast as one rank with all models"
    return [f"{who}, {count(environment.ranks or 1, 'rank')}: {parts} of a call{beside}."]


def _two_modes(row: Result, who: str) -> list[str]:
    """Say so where some processes met another speedup than others, and what tells them apart."""
    groups = modes(row.process_speedups)
    if len(groups) < 2:
        return []
    total = len(row.process_speedups)
    told = []
    for group in groups:
        speedups = sorted(row.process_speedups[index] for index in group)
        low, high = f"{speedups[0]:.2f}", f"{speedups[-1]:.2f}"
        found = low if low == high else f"{low} to {high}"
        faults = median(
            [number for i in group if (number := row.processes[i].page_faults_per_call) is not None]
        )
        counted = "" if faults is None else f" ({faults:,.0f} page faults per call)"
        told.append(f"{found} in {len(group)} of {total} processes{counted}")
    advice = ""
    if _differ([row.processes[group[0]].page_faults_per_call for group in groups]):
        advice = " The allocator decides, in each process anew; --allocator retain settles it."
    return [f"Two modes: {who}: {' and '.join(told)}.{advice}"]


def _differ(faults: Sequence[float | None]) -> bool:
    known = [number for number in faults if number is not None]
    return len(known) > 1 and max(known) > 2 * min(known) + 1000


def _noise(results: Sequence[Result], varying: Collection[str]) -> list[str]:
    """What was noisy: a line for each kind of noise, that names its rows."""
    kinds: dict[str, list[str]] = {}
    for row in results:
        found = None if row.case.is_reference else _kind_of_noise(row)
        if found:
            kind, figure = found
            kinds.setdefault(kind, []).append(f"{case_name(row.case, varying)} ({figure})")
    return [f"{kind}: {'; '.join(rows)}." for kind, rows in kinds.items()]


def _kind_of_noise(row: Result) -> tuple[str, str] | None:
    """What there is to say of a row's noise, the same for all rows of a kind, and its figure."""
    others = row.others_cpu_share
    if others is not None and others > BUSY:
        says = "no speedup is claimed" if row.inconclusive else "they slow strategies unequally"
        what = "Warning: other programs took a part of the CPU meanwhile"
        return f"{what}, {says}; stop them and run again", f"{others:.0%}"
    within, between = row.within_processes, row.between_processes
    if between is not None and within is not None:
        if between <= max(within, NOISY / 2):
            return None
        figure = f"+-{between:.0%} against +-{within:.0%}"
        if row.inconclusive:
            return "Warning: processes differ too much to claim a speedup; close programs", figure
        return (
            "Processes differ by more than their own confidence intervals; the interval shown"
            " covers both",
            figure,
        )
    if row.noise is None or row.noise <= NOISY:
        return None
    what, figure = "Warning: the inter-quartile range of the times is wide", f"{row.noise:.0%}"
    if row.noise > TOO_NOISY:
        return f"{what}, above {TOO_NOISY:.0%} of the median: no speedup is claimed", figure
    return f"{what}; for a narrower one close programs or raise --min_seconds", figure


def _page_faults(row: Result, where: str, environment: Environment) -> list[str]:
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
        f"Page faults explain this loss of {row.case.strategy}{where}: {ours:,.0f} per call against"
        f" {theirs:,.0f} of the loop, at {cost * 1e6:.1f} us each over {environment.threads}"
        f" threads, are about {min(1, faulted / lost):.0%} of the {lost * 1e3:.0f} ms lost."
        " The allocator gives memory back at every call; --allocator retain keeps it."
    ]


def _cold_start(rows: Sequence[Result], environment: Environment) -> list[str]:
    """What start-up cost, and what first calls alone would have said of the speedup."""
    loop = next((row for row in rows if row.case.is_reference and row.first_call_s), None)
    vmap = next((row for row in rows if row.case.strategy == "vmap" and row.speedup), None)
    if loop is None or vmap is None or not loop.median_s:
        return []
    if not loop.first_call_s or not vmap.first_call_s:
        return []
    took = f"{environment.first_forward_s:.3f} s"
    if loop.case.batch_size == 1:  # as the very first forward
        steady = loop.median_s / loop.case.num_models
        took += f", {environment.first_forward_s / steady:.1f} times a steady one"
    return [
        f"Cold starts: the very first forward of this process took {took}."
        f" The first calls after it (loop {loop.first_call_s:.3f} s, vmap"
        f" {vmap.first_call_s:.3f} s) would have said"
        f" {loop.first_call_s / vmap.first_call_s:.2f} times."
    ]
