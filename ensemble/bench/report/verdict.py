"""Results -> the answer in sentences: the fastest strategy, its confidence interval, caveats."""

from collections.abc import Collection, Sequence
from math import exp

from ensemble.bench.environment import Environment
from ensemble.bench.report import sweep
from ensemble.bench.report.labels import case_name, grid_point_name, varying_fields
from ensemble.bench.summary import BUSY, Summary
from ensemble.formatting import count, milliseconds
from ensemble.statistics import CONFIDENCE, MODE_GAP, NOISY, TOO_NOISY, median, modes

# Strategies whose figure the answer always has: functorch's, and what CUDA graphs alone gain.
ALWAYS_TOLD = {
    "vmap": "vmap",
    "cudagraph_loop": "a CUDA graph of the loop alone (cudagraph_loop)",
}
NOTHING_COMPARED = "Nothing was compared with the loop."


def render_answer(results: Sequence[Summary]) -> str:
    """The answer, a line per grid point and dtype: the fastest strategy, its speedup over the
    loop, and that of vmap; of a sweep over N also the break-even of each strategy."""
    varying = varying_fields([row.case for row in results])
    lines = []
    for rows in sweep.by_grid_point(results).values():
        references = [row for row in rows if row.case.is_reference]
        compared = [row for row in rows if row.speedup is not None and not row.case.is_reference]
        compared = [row for row in compared if not row.case.is_self_check]
        for dtype in dict.fromkeys(row.case.dtype for row in compared):
            of_dtype = [row for row in compared if row.case.dtype == dtype]
            lines.append(_fastest(of_dtype, references, varying))
    if len({row.case.num_models for row in results}) > 1:
        lines += [_break_even(rows) for rows in sweep.by_line(results).values()]
    return "\n".join(lines or [NOTHING_COMPARED]) + "\n"


def render_remarks(
    results: Sequence[Summary], environment: Environment, *, verbose: bool = False
) -> str:
    """Caveats: noise, page faults, cold starts; with `verbose` a sentence per row. May be empty."""
    varying = varying_fields([row.case for row in results])
    grid_points, lines = sweep.by_grid_point(results), []
    for index, rows in enumerate(grid_points.values()):
        where = f" with {grid_point_name(rows[0].case, varying)}" if len(grid_points) > 1 else ""
        for row in rows:
            lines += _ranks(row, case_name(row.case, varying), environment)
            if row.speedup is None or row.case.is_reference:
                continue
            lines += [_sentence(row, case_name(row.case, varying))] if verbose else []
            lines += _bimodality(row, case_name(row.case, varying), environment)
            lines += [] if row.inconclusive else _page_faults(row, where, environment)
            lines += _interference(row, case_name(row.case, varying))
        lines += _disorder(rows, varying)
        if index == 0:  # only the first grid point has cold starts
            lines += _cold_start(rows, environment)
    lines += _noise([row for row in results if row.speedup is not None], varying)
    return "".join(f"{line}\n" for line in lines)


def _fastest(
    rows: Sequence[Summary], references: Sequence[Summary], varying: Collection[str]
) -> str:
    """The fastest of the rows of one dtype, its confidence interval, and its cost."""
    label = grid_point_name(rows[0].case, varying)
    lead = sweep.leaders(rows)
    if lead is None or (_inconclusive(rows) and lead.speedup <= 1):
        return f"{label}: inconclusive: {_inconclusive(rows)}.{_beyond_contention(rows)}"
    others = [
        row
        for row in rows
        if (row.case.strategy in ALWAYS_TOLD and row not in lead.rows)
        or (row.inconclusive and (row.speedup or 0) > lead.speedup)
    ]
    rest = "".join(
        f"; {ALWAYS_TOLD.get(row.case.strategy, row.name)} is {_speedup(row)}" for row in others
    )
    low, high = lead.interval
    is_tie = len(lead.rows) > 1
    speedups = [f"{row.speedup:.2f}" for row in (lead.rows[-1], lead.rows[0])]
    at = "-".join(dict.fromkeys(speedups))
    figure = f"{_names(lead.rows)} {'tie at' if is_tie else 'is'} {at}x"
    if lead.is_slower:
        return f"{label}: the loop is the fastest; {figure} ({low:.2f}-{high:.2f}){rest}."
    if not lead.is_faster:
        nothing = "no strategy is significantly faster than the loop"
        return f"{label}: {nothing}; {figure} ({low:.2f}-{high:.2f}){rest}."
    who = f"; {lead.rows[0].name}" if is_tie else " and"
    cost = _cost(lead.rows[0], references, who)
    return (
        f"{label}: {figure} {'the speed of' if is_tie else 'faster than'} the loop"
        f" ({CONFIDENCE:.0%} CI {low:.2f}-{high:.2f}){cost}{rest}."
    )


MAX_NAMES = 3  # of rows that tie, in a sentence


def _names(rows: Sequence[Summary]) -> str:
    """`a`, `a and b`, `a, b and 3 others`."""
    names = [row.name for row in rows]
    if len(names) > MAX_NAMES:
        names[MAX_NAMES - 1 :] = [f"{len(names) - MAX_NAMES + 1} others"]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _inconclusive(rows: Sequence[Summary]) -> str:
    return ", ".join(f"{row.name} ({row.inconclusive})" for row in rows if row.inconclusive)


def _beyond_contention(rows: Sequence[Summary]) -> str:
    """Which rows differ from the loop by more than other processes explain."""
    return "".join(
        f" Still, {row.name} is {row.beyond_contention} than the loop: its fastest call took"
        f" {milliseconds(min(row.times_s))}, the loop's {milliseconds(min(row.reference_times_s))}."
        for row in rows
        if row.beyond_contention
    )


def _speedup(row: Summary) -> str:
    """`0.98x (0.83-1.10)`, or why there is none."""
    interval = row.speedup_interval
    if row.inconclusive or interval is None or row.speedup is None:
        return f"inconclusive ({row.inconclusive or row.status})"
    return f"{row.speedup:.2f}x ({interval[0]:.2f}-{interval[1]:.2f})"


def _cost(best: Summary, references: Sequence[Summary], who: str) -> str:
    """After how many calls the fastest strategy breaks even, and its extra memory."""
    text = ""
    for reference in references:
        calls = sweep.break_even_calls(best, reference)
        extra = sweep.extra_memory(best, reference)
        if calls is not None:
            text += f"{who} breaks even after {count(round(calls), 'call')}"
        if extra is not None:
            more = "more" if extra >= 0 else "less"
            text += f", with {abs(extra) / 1e6:,.0f} MB {more} memory"
    return text


def _disorder(rows: Sequence[Summary], varying: Collection[str]) -> list[str]:
    """A note on rows whose order by speedup is not that by time."""
    return [
        f"Note: {case_name(other.case, varying)} had shorter calls"
        f" ({milliseconds(other.median_s or 0.0)}) than {row.name}"
        f" ({milliseconds(row.median_s or 0.0)}) at a smaller speedup: the loop was faster too in"
        " its processes."
        for row, other in sweep.disordered(rows)
    ]


def _break_even(rows: Sequence[Summary]) -> str:
    result = sweep.break_even(rows)
    strategy, dtype, batch, px = result.line
    label = f"Break-even of {strategy} ({dtype}, batch {batch}, {px} px)"
    caveat = ""
    if result.inconclusive:
        caveat = f" (inconclusive: {', '.join(map(str, result.inconclusive))})"
    if result.num_models is None:
        return f"{label}: none up to {count(result.largest, 'model')}{caveat}."
    fewest = ", the fewest measured" if result.num_models == rows[0].case.num_models else ""
    return f"{label}: {count(result.num_models, 'model')}{fewest}{caveat}."


def _sentence(row: Summary, label: str) -> str:
    pairs = count(len(row.times_s), "pair")
    if len(row.processes) > 1:
        pairs += f" in {len(row.processes)} processes"
    interval = row.speedup_interval
    if interval is None:
        return f"{label}: too few pairs ({pairs}); raise --min_pairs."
    if row.inconclusive:
        return f"{label}: inconclusive ({row.inconclusive}), {pairs}."
    different = "" if interval[1] < 1 or interval[0] > 1 else "not significantly different, "
    return f"{label}: {different}{_speedup(row)}, {pairs}."


def _ranks(row: Summary, label: str, environment: Environment) -> list[str]:
    """The parts of a call over ranks, and its speedup over one rank."""
    if row.ranks is None:
        return []
    shares = {
        "parallel efficiency": row.ranks.parallel_efficiency,
        "interference": row.ranks.interference,
        "communication": row.ranks.communication,
    }
    if None in shares.values():
        return []
    parts = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    one = row.ranks.speedup_over_one_rank
    over_one = "" if one is None else f"; {one:.2f}x over one rank with all models"
    return [f"{label}, {count(environment.ranks or 1, 'rank')}: {parts}{over_one}."]


def _bimodality(row: Summary, label: str, environment: Environment) -> list[str]:
    """A bimodal speedup: two groups of processes disagree."""
    measured = [one for one in row.measurements if one.times_s]
    on_cpu = _is_cpu(environment)  # elsewhere page faults of the host explain no time
    faults = [one.page_faults_per_call if on_cpu else None for one in measured]
    groups = modes(row.process_speedups)
    if len(groups) < 2:
        groups = _by_page_faults(row.process_speedups, faults)
    if len(groups) < 2:
        return []
    parts = []
    for group in groups:
        speedups = sorted(row.process_speedups[index] for index in group)
        low, high = f"{speedups[0]:.2f}", f"{speedups[-1]:.2f}"
        found = low if low == high else f"{low}-{high}"
        known = [number for i in group if (number := faults[i]) is not None]
        typical = median(known)
        counted = "" if typical is None else f" ({typical:,.0f} page faults per call)"
        parts.append(f"{found} in {len(group)} of {len(measured)} processes{counted}")
    advice = ""
    if _page_faults_differ([faults[group[0]] for group in groups]):
        advice = " The allocator behaves differently per process; use --allocator retain."
    return [f"Bimodal: {label}: {' and '.join(parts)}.{advice}"]


def _by_page_faults(speedups: Sequence[float], faults: Sequence[float | None]) -> list[list[int]]:
    """The process indices of two modes that page faults explain, the larger mode first.

    With a cause that is known, one process is a mode.
    """
    known = [number for number in faults if number is not None]
    everything = [list(range(len(speedups)))]
    if len(known) < len(speedups) or not _page_faults_differ(known):
        return everything
    middle = (min(known) + max(known)) / 2
    few = [index for index, number in enumerate(known) if number <= middle]
    many = [index for index, number in enumerate(known) if number > middle]
    slow, fast = sorted([few, many], key=lambda group: speedups[group[0]])
    gap = min(speedups[index] for index in fast) / max(speedups[index] for index in slow) - 1
    return sorted([few, many], key=len, reverse=True) if gap > MODE_GAP else everything


def _interference(row: Summary, label: str) -> list[str]:
    """A remark if the loop is slower in turns with a strategy than alone."""
    slowdown = row.slowdown_of_reference
    if slowdown is None or not row.is_over_reference_alone:
        return []
    return [
        f"Note: {label}: in turns with it the loop takes {exp(slowdown.mean):.2f}x as long as"
        " alone, before it was built; the speedup is over the loop alone."
    ]


def _is_cpu(environment: Environment) -> bool:
    return environment.device.partition(":")[0] == "cpu"


def _page_faults_differ(faults: Sequence[float | None]) -> bool:
    known = [number for number in faults if number is not None]
    return len(known) > 1 and max(known) > 2 * min(known) + 1000


def _noise(results: Sequence[Summary], varying: Collection[str]) -> list[str]:
    """Noise warnings: a line per kind of noise, with its rows."""
    kinds: dict[str, list[str]] = {}
    for row in results:
        found = None if row.case.is_reference else _kind_of_noise(row)
        if found:
            kind, figure = found
            kinds.setdefault(kind, []).append(f"{case_name(row.case, varying)} ({figure})")
    return [f"{kind}: {'; '.join(rows)}." for kind, rows in kinds.items()]


def _kind_of_noise(row: Summary) -> tuple[str, str] | None:
    """The kind of noise of a row, as a text shared by all rows of the kind, and its figure."""
    others = row.others_cpu_share
    if others is not None and others > BUSY:
        effect = "no speedup is reported" if row.inconclusive else "results may be biased"
        return f"Warning: other processes used the CPU, {effect}", f"{others:.0%}"
    within, between = row.within_processes, row.between_processes
    if between is not None and within is not None:
        if between <= max(within, NOISY / 2):
            return None
        figure = f"within-process CI +-{within:.0%}, between-process spread +-{between:.0%}"
        if row.inconclusive:
            return "Warning: processes differ too much to report a speedup", figure
        return "The interval reflects the spread between processes", figure
    if row.noise is None or row.noise <= NOISY:
        return None
    what, figure = "Warning: noisy times (interquartile range / median)", f"{row.noise:.0%}"
    if row.noise > TOO_NOISY:
        return f"{what}, above {TOO_NOISY:.0%}: no speedup is reported", figure
    return f"{what}; close other programs or raise --min_seconds", figure


def _page_faults(row: Summary, where: str, environment: Environment) -> list[str]:
    """A remark if page faults explain at least half of a slowdown."""
    ours, theirs = row.page_faults_per_call, row.reference_page_faults_per_call
    times = row.median_s, row.reference_median_s
    cost = environment.page_fault_s if _is_cpu(environment) else None
    if ours is None or theirs is None or cost is None or times[0] is None or times[1] is None:
        return []
    lost, extra = times[0] - times[1], ours - theirs
    # The threads of a parallel kernel fault at the same time, each in its own part of a buffer.
    faulted = extra * cost / environment.threads
    if lost <= 0 or faulted < lost / 2:
        return []
    return [
        f"Page faults cause about {min(1, faulted / lost):.0%} of the {lost * 1e3:.0f} ms that"
        f" {row.case.strategy}{where} loses to the loop: {ours:,.0f} per call ({theirs:,.0f} in the"
        f" loop) at {cost * 1e6:.1f} us over {count(environment.threads, 'thread')}."
        " --allocator retain avoids them."
    ]


def _cold_start(rows: Sequence[Summary], environment: Environment) -> list[str]:
    """The cost of the first calls, and the speedup that they alone would suggest."""
    loop = next((row for row in rows if row.case.is_reference and row.first_call_s), None)
    vmap = next((row for row in rows if row.case.strategy == "vmap" and row.speedup), None)
    if loop is None or vmap is None or not loop.median_s:
        return []
    if not loop.first_call_s or not vmap.first_call_s:
        return []
    took = f"{environment.first_forward_s:.3f} s"
    if loop.case.batch_size == 1:  # as the very first forward
        steady = loop.median_s / loop.case.num_models
        took += f", {environment.first_forward_s / steady:.1f}x a steady one"
    return [
        f"Cold start: the first forward took {took}; by first calls alone vmap would be"
        f" {loop.first_call_s / vmap.first_call_s:.2f}x, not {vmap.speedup:.2f}x."
    ]
