"""Results of load tests -> sentences and the table. Imports no torch."""

from collections.abc import Collection, Sequence

from ensemble.bench.load.record import LoadRun, LoadTest, held_range
from ensemble.bench.report import sweep
from ensemble.bench.report.curves import changes, held_qps, shown
from ensemble.bench.report.table import (
    UNKNOWN,
    Cell,
    Column,
    grid,
    number,
    place_columns,
    that_say_something,
)
from ensemble.bench.report.words import (
    case_name,
    place_name,
    title_of,
    varying_fields,
)
from ensemble.bench.summary import Summary

NOTHING = "No valid run."


def render_answer(results: Sequence[Summary]) -> str:
    """A line for each cell: the best strategy, the others, and where the best one changes."""
    varying = varying_fields([row.case for row in results])
    lines = []
    for rows in sweep.cells(results).values():
        loads = [row.load for row in rows if row.load is not None]
        if loads:
            lines += _of_cell(rows, loads[0], varying)
    return "\n".join(lines or [NOTHING]) + "\n"


def render_table(results: Sequence[Summary], *, verbose: bool = False, colour: bool = False) -> str:
    """One table, a row a strategy."""
    every = [*place_columns(results), *COLUMNS]
    rows = [row for row in results if verbose or row.status != "unavailable"]
    columns = every if verbose else that_say_something(every, results)
    cases = [row.case for row in results]
    head = f"{title_of(cases)}; latencies from the scheduled arrival"
    return "\n".join([head, *grid(rows, columns, colour=colour)]) + "\n"


def render_remarks(results: Sequence[Summary], *, verbose: bool = False) -> str:
    """Why a row has no valid run, and refused requests; with `verbose` each run."""
    varying = varying_fields([row.case for row in results])
    lines = []
    for row in results:
        who, run = case_name(row.case, varying), shown(row)
        if row.status == "ok" and run is not None and not run.valid:
            lines.append(f"{who}: not valid: {run.why_not}")
        if run is not None and run.refused:
            lines.append(
                f"{who}: {run.refused} of {run.requests} requests were refused; maximum latency of"
                f" the accepted {_ms(run.longest_s)} ms, maximum queue length {run.most_waiting}"
                f"{_growth(run)}"
            )
        if verbose and row.load is not None:
            lines += [f"{who}: {_one(played)}" for played in row.load.runs]
    return "".join(f"{line}\n" for line in lines)


def _of_cell(rows: Sequence[Summary], load: LoadTest, varying: Collection[str]) -> list[str]:
    inputs = rows[0].case.inputs.replace("_", "-")
    where = f"{place_name(rows[0].case, varying)}, {inputs} inputs"
    valid = [row for row in rows if held_qps(row) is not None and row.status == "ok"]
    if not valid:
        return [f"{where}: no strategy had a valid run."]
    if load.scenario == "single_stream":
        best, *others = sorted(valid, key=_tail_s)
        found = f"has the lowest latency, p{load.percentile:g} {_tail(best)} ms"
        rest = [f"{row.case.strategy} {_tail(row)} ms" for row in others]
    else:
        best, *others = sorted(valid, key=lambda row: held_qps(row) or 0.0, reverse=True)
        verb = "sustains" if load.scenario == "server" else "processes"
        found = f"{verb} {_rate(held_qps(best))} requests/s"
        if load.bound_s is not None:
            found += f" with p{load.percentile:g} <= {_ms(load.bound_s)} ms"
        rest = [f"{row.case.strategy} {_rate(held_qps(row))}" for row in others]
    others_too = f"; {', '.join(rest)}" if rest else ""
    lines = [f"{where}: {best.case.strategy} {found}{others_too}."]
    return lines + (_changes(rows, load) if load.scenario == "server" else [])


def _changes(rows: Sequence[Summary], load: LoadTest) -> list[str]:
    """Which strategy has the lowest latency, from the lowest rate on."""
    parts = changes(rows)
    if not parts:
        return []
    first, *later = parts
    if not later:
        return [f"Lowest p{load.percentile:g} at every rate: {first.strategy}."]
    by_rate = [f"{first.strategy} up to {_rate(later[0].from_qps)} requests/s"]
    by_rate += [f"{part.strategy} from {_rate(part.from_qps)}" for part in later]
    return [f"Lowest p{load.percentile:g} by rate: {', '.join(by_rate)}."]


def _one(run: LoadRun) -> str:
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
    run = shown(row)
    return (run and run.tail_s) or 0.0


def _tail(row: Summary) -> str:
    run = shown(row)
    return _ms(run.tail_s) if run else ""


def _rate(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"


def _held(row: Summary) -> str:
    if held_qps(row) is None:
        return row.status if row.error else "none"
    between = held_range(row.load_tests)
    spread = ""
    if between and len(row.processes) > 1:
        spread = f" [{_rate(between[0])}, {_rate(between[1])}]"
    return f"{_rate(held_qps(row))}{spread}"


def _of_run(field: str, form: str, scale: float = 1.0) -> Cell:
    """A cell of the run that the row shows."""

    def cell(row: Summary) -> str:
        run = shown(row)
        return UNKNOWN if run is None else number(getattr(run, field), form, scale)

    return cell


COLUMNS = (
    Column("sustained\nper s", _held),
    Column("p50\n(ms)", _of_run("p50_s", ".1f", 1e3)),
    Column("p90\n(ms)", _of_run("p90_s", ".1f", 1e3)),
    Column("p99\n(ms)", _of_run("p99_s", ".1f", 1e3)),
    Column("mean\nbatch", _of_run("mean_batch", ".2f")),
    Column("\npadding", _of_run("wasted_share", ".0%"), always=False, silent="0%"),
    Column("CPU per\nrequest (ms)", _of_run("cpu_s_per_request", ".1f", 1e3)),
    Column("overhead\n(ms)", _of_run("overhead_s", ".2f", 1e3)),
    Column("\nrefused", _of_run("refused", ".0f"), always=False, silent="0"),
    Column("start\n(s)", lambda row: number(row.start_s, ".1f")),
    Column("memory\n(MB)", lambda row: number(row.peak_memory_bytes, ".0f", 1e-6)),
)
