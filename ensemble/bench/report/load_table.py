"""Load tests -> the answer, the table and remarks. Imports no torch."""

from collections.abc import Collection, Sequence

from ensemble.bench.load.record import LoadRun, LoadTest, sustained_interval
from ensemble.bench.report import sweep
from ensemble.bench.report.curves import lowest_latency, reported_run, sustained_qps
from ensemble.bench.report.labels import (
    case_name,
    grid_point_name,
    shared_fields,
    varying_fields,
)
from ensemble.bench.report.table import (
    HELD,
    PER_MODEL,
    UNKNOWN,
    CellText,
    Column,
    case_columns,
    grid,
    non_empty,
    number,
)
from ensemble.bench.summary import Summary
from ensemble.statistics import CONFIDENCE

NO_VALID_RUN = "No valid run."


def render_answer(results: Sequence[Summary]) -> str:
    """A line per grid point: the best strategy, the others, and the lowest latency by rate."""
    varying = varying_fields([row.case for row in results])
    lines = []
    for rows in sweep.by_grid_point(results).values():
        load_tests = [row.load for row in rows if row.load is not None]
        if load_tests:
            lines += _answer(rows, load_tests[0], varying)
    return "\n".join(lines or [NO_VALID_RUN]) + "\n"


def render_table(results: Sequence[Summary], *, verbose: bool = False, color: bool = False) -> str:
    """One table, a row per strategy."""
    every = [*case_columns(results), *COLUMNS]
    rows = [row for row in results if verbose or row.status != "unavailable"]
    columns = [*every, HELD, PER_MODEL] if verbose else non_empty(every, results)
    cases = [row.case for row in results]
    head = f"{shared_fields(cases)}; latencies from the scheduled arrival"
    return "\n".join([head, *grid(rows, columns, color=color)]) + "\n"


def render_remarks(results: Sequence[Summary], *, verbose: bool = False) -> str:
    """Why a row has no valid run, and its refused requests; with `verbose` every run."""
    varying = varying_fields([row.case for row in results])
    lines = []
    for row in results:
        label, run = case_name(row.case, varying), reported_run(row)
        searched = row.load is not None and row.load.estimate is not None
        if row.status == "ok" and run is not None and not run.valid and not searched:
            lines.append(f"{label}: invalid: {run.why_not}")
        if row.load is not None and (unlimited := _unlimited(row.load)):
            lines.append(f"{label}: {unlimited}")
        if run is not None and run.refused:
            lines.append(
                f"{label}: {run.refused} of {run.requests} requests were refused; maximum latency"
                f" of the accepted {_ms(run.longest_s)} ms, maximum queue length {run.most_waiting}"
                f"{_growth(run)}"
            )
        if verbose and row.load is not None:
            lines += [f"{label}: {_describe(run)}" for run in row.load.runs]
    return "".join(f"{line}\n" for line in lines)


def _unlimited(load_test: LoadTest) -> str:
    """Why a search has no estimate; empty where it has one, or where there was none."""
    runs = [run for run in load_test.runs if run.purpose == "search" and run.late is not None]
    rates = [run.offered_qps or 0.0 for run in runs]
    if load_test.estimate is not None or not runs:
        return ""
    if not any(run.late for run in runs):
        return f"no request was late at up to {_rate(max(rates))} requests/s: a lower bound"
    return f"requests were late at every rate from {_rate(min(rates))} requests/s on"


def _answer(rows: Sequence[Summary], load_test: LoadTest, varying: Collection[str]) -> list[str]:
    inputs = rows[0].case.inputs.replace("_", "-")
    label = f"{grid_point_name(rows[0].case, varying)}, {inputs} inputs"
    valid = [row for row in rows if sustained_qps(row) is not None and row.status == "ok"]
    if not valid:
        return [f"{label}: no strategy had a valid run."]
    if load_test.scenario == "single_stream":
        best, *others = sorted(valid, key=_tail_s)
        found = f"has the lowest latency, p{load_test.percentile:g} {_tail(best)} ms"
        rest = [f"{row.case.strategy} {_tail(row)} ms" for row in others]
    else:
        best, *others = sorted(valid, key=lambda row: sustained_qps(row) or 0.0, reverse=True)
        verb = "sustains" if load_test.scenario == "server" else "processes"
        found = f"{verb} {_rate(sustained_qps(best))} requests/s"
        interval = sustained_interval(best.load_tests)
        if interval:
            found += f" ({CONFIDENCE:.0%} CI {_rate(interval[0])}-{_rate(interval[1])})"
        if load_test.bound_s is not None:
            found += f" with p{load_test.percentile:g} <= {_bounds(rows)} ms"
        rest = [f"{row.case.strategy} {_rate(sustained_qps(row))}" for row in others]
    others_text = f"; {', '.join(rest)}" if rest else ""
    lines = [f"{label}: {best.case.strategy} {found}{others_text}."]
    return lines + (_lowest_latency(rows, load_test) if load_test.scenario == "server" else [])


def _bounds(rows: Sequence[Summary]) -> str:
    """The latency bound; the least and the greatest where each row derived one from the loop."""
    bounds = [row.load.bound_s for row in rows if row.load and row.load.bound_s is not None]
    return "-".join(dict.fromkeys(_ms(bound_s) for bound_s in (min(bounds), max(bounds))))


def _lowest_latency(rows: Sequence[Summary], load_test: LoadTest) -> list[str]:
    """The strategy with the lowest latency, by rate."""
    segments = lowest_latency(rows)
    if not segments:
        return []
    first, *later = segments
    if not later:
        return [f"Lowest p{load_test.percentile:g} at every rate: {first.strategy}."]
    by_rate = [f"{first.strategy} up to {_rate(later[0].from_qps)} requests/s"]
    by_rate += [f"{segment.strategy} from {_rate(segment.from_qps)}" for segment in later]
    return [f"Lowest p{load_test.percentile:g} by rate: {', '.join(by_rate)}."]


def _describe(run: LoadRun) -> str:
    rate = "" if run.offered_qps is None else f" at {_rate(run.offered_qps)} per second"
    tails = ", ".join(f"{_ms(latency) or '-'}" for latency in (run.p50_s, run.p90_s, run.p99_s))
    verdict = "valid" if run.valid else run.why_not
    return f"{run.purpose}{rate}: {run.requests} requests, p50, p90, p99 {tails} ms: {verdict}"


def _growth(run: LoadRun) -> str:
    if run.memory_growth_bytes is None:
        return ""
    return f"; memory growth {run.memory_growth_bytes / 1e6:.1f} MB in {run.seconds:.0f} s"


def _ms(seconds: float | None) -> str:
    return (
        "" if seconds is None else f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"
    )


def _tail_s(row: Summary) -> float:
    run = reported_run(row)
    return (run and run.tail_s) or 0.0


def _tail(row: Summary) -> str:
    run = reported_run(row)
    return _ms(run.tail_s) if run else ""


def _rate(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"


def _sustained(row: Summary) -> str:
    if sustained_qps(row) is None:
        return row.status if row.error else "none"
    interval = sustained_interval(row.load_tests)
    spread = f" [{_rate(interval[0])}, {_rate(interval[1])}]" if interval else ""
    return f"{_rate(sustained_qps(row))}{spread}"


def _run_field(field: str, form: str, scale: float = 1.0) -> CellText:
    """The text of a field of the reported run."""

    def cell(row: Summary) -> str:
        run = reported_run(row)
        return UNKNOWN if run is None else number(getattr(run, field), form, scale)

    return cell


COLUMNS = (
    Column(f"sustained per s\n[{CONFIDENCE:.0%} CI]", _sustained),
    Column("p50\n(ms)", _run_field("p50_s", ".1f", 1e3)),
    Column("p90\n(ms)", _run_field("p90_s", ".1f", 1e3)),
    Column("p99\n(ms)", _run_field("p99_s", ".1f", 1e3)),
    Column("mean\nbatch", _run_field("mean_batch", ".2f")),
    Column("\npadding", _run_field("wasted_share", ".0%"), always=False, default="0%"),
    Column("CPU per\nrequest (ms)", _run_field("cpu_s_per_request", ".1f", 1e3)),
    Column("overhead\n(ms)", _run_field("overhead_s", ".2f", 1e3)),
    Column("\nrefused", _run_field("refused", ".0f"), always=False, default="0"),
    Column("start\n(s)", lambda row: number(row.start_s, ".1f")),
    Column("memory\n(MB)", lambda row: number(row.peak_memory_bytes, ".0f", 1e-6)),
)
