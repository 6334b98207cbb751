"""Results -> sentences: what a run says, how surely, and where not. Pure functions, no torch."""

from collections.abc import Collection, Sequence

from ensemble import sweep
from ensemble.report import name, varying_columns
from ensemble.results import BUSY, CONFIDENCE, NOISY, SELF_CHECK, TOO_NOISY, Environment, Result


def render_verdict(results: Sequence[Result], environment: Environment) -> str:
    """What the run says: in each cell the strategies against the reference, with direction; of a
    sweep over N, from where on each of them wins."""
    lines = []
    varying = varying_columns(results)
    for index, rows in enumerate(sweep.cells(results).values()):
        compared = [row for row in rows if row.speedup is not None and not row.is_reference]
        for row in compared:
            lines.append(_sentence(row, name(row, varying), environment))
            lines += _noise_warning(row)
            lines += [] if row.inconclusive else _fault_sentence(row, environment)
        if index == 0:  # nothing is cold after the first cell
            lines += _cold_sentence(rows, environment)
        for dtype in dict.fromkeys(row.dtype for row in compared):
            own = [row for row in compared if row.dtype == dtype and row.strategy != SELF_CHECK]
            if len(own) > 1:
                lines.append(_fastest(own, [row for row in rows if row.is_reference], varying))
    if len({row.num_models for row in results}) > 1:
        lines += [_break_even(rows) for rows in sweep.lines(results).values()]
    return "\n".join(lines or ["Verdict: nothing was compared with the reference."]) + "\n"


def _sentence(row: Result, who: str, environment: Environment) -> str:
    assert row.speedup is not None
    who = f"{who} on {environment.device}"
    pairs = f"{len(row.times_s)} pairs"
    interval = row.speedup_interval
    if interval is None:
        return f"Verdict: {who}: {pairs} are too few to say; raise --min_pairs."
    if row.inconclusive:
        return (
            f"Verdict: {who}: {row.inconclusive} to say: the inter-quartile range"
            f" is {row.noise:.0%} of the median, above {TOO_NOISY:.0%}; close other programs or"
            " raise --min_seconds."
        )
    low, high = interval
    surely = f"{CONFIDENCE:.0%} interval {low:.2f} to {high:.2f}, {pairs}"
    if low <= 1 <= high:
        return (
            f"Verdict: {who}: no difference from the reference (the float32 loop)"
            f" that this run can show: {row.speedup:.2f} times ({surely})."
        )
    direction = f"{row.speedup:.2f} times" + (" faster" if row.speedup > 1 else ": slower")
    return f"Verdict: {who}: {direction} than the reference (the float32 loop), {surely}."


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


def _fastest(rows: Sequence[Result], references: Sequence[Result], varying: Collection[str]) -> str:
    """Which of the rows, all of one dtype, is the fastest, and what it costs."""
    where = name(rows[0], varying).partition(", ")[2]
    best = sweep.fastest([*references, *rows])
    unsure = [row.strategy for row in rows if row.inconclusive]
    if best is None or (unsure and (best.speedup or 0) <= 1):
        return f"Fastest with {where}: not sure enough to say, because of {', '.join(unsure)}."
    if (best.speedup or 0) <= 1:
        return f"Fastest with {where}: the reference itself, loop in float32."
    sentence = f"Fastest with {where}: {best.strategy}, {best.speedup:.2f} times"
    for reference in references:
        calls, extra = sweep.calls_to_pay_back(best, reference), sweep.extra_memory(best, reference)
        if calls is not None:
            sentence += f"; its build is paid back after {calls:,.0f} calls"
        if extra is not None:
            more = "more" if extra >= 0 else "less"
            sentence += f"; it held {abs(extra) / 1e6:,.0f} MB {more} than the loop"
    return f"{sentence}.{_shorter_calls(best, rows)}"


def _shorter_calls(best: Result, rows: Sequence[Result]) -> str:
    """Say so where the speedup and the time of a call name different rows: the loop has drifted."""
    quiet = [row for row in rows if row.median_s and not row.inconclusive]
    shortest = min(quiet, key=lambda row: row.median_s or 0.0, default=best)
    if not best.median_s or (shortest.median_s or 0.0) > (1 - NOISY) * best.median_s:
        return ""
    return (
        f" But {shortest.strategy} had the shorter calls, {1e3 * (shortest.median_s or 0):.3g}"
        f" ms against {1e3 * best.median_s:.3g} ms: the loop ran faster beside it."
    )


def _break_even(rows: Sequence[Result]) -> str:
    found = sweep.break_even(rows)
    strategy, dtype, batch, px = found.line
    who = f"Break-even: {strategy}, {dtype}, batch {batch}, {px} px"
    but = ""
    if found.unsure:
        counts = ", ".join(map(str, found.unsure))
        but = f" (nothing sure can be said of {counts} models)"
    if found.num_models is None:
        return f"{who}: nowhere surely faster up to {found.largest} models, the most measured{but}."
    fewest = ", the fewest measured" if found.num_models == rows[0].num_models else ""
    return f"{who}: surely faster from {found.num_models} models on{fewest}{but}."
