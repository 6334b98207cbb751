"""Results under load -> sentences and the table. Pure functions, no torch."""

from collections.abc import Collection, Sequence

from ensemble.bench.records import Load, LoadRun, Result
from ensemble.bench.report import sweep
from ensemble.bench.report.curves import changes
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

NOTHING = "Nothing was held."


def render_answer(results: Sequence[Result]) -> str:
    """A line for each cell: what to serve with, what the others hold, where the answer changes."""
    varying = varying_fields([row.case for row in results])
    lines = []
    for rows in sweep.cells(results).values():
        loads = [row.load for row in rows if row.load is not None]
        if loads:
            lines += _of_cell(rows, loads[0], varying)
    return "\n".join(lines or [NOTHING]) + "\n"


def render_table(results: Sequence[Result], *, verbose: bool = False, colour: bool = False) -> str:
    """One table, a row a strategy."""
    every = [*place_columns(results), *COLUMNS]
    shown = [row for row in results if verbose or row.status != "unavailable"]
    columns = every if verbose else that_say_something(every, results)
    cases = [row.case for row in results]
    head = f"{title_of(cases)}; latencies from the scheduled arrival"
    return "\n".join([head, *grid(shown, columns, colour=colour)]) + "\n"


def render_remarks(results: Sequence[Result], *, verbose: bool = False) -> str:
    """Why a row holds nothing; with `verbose` each run."""
    varying = varying_fields([row.case for row in results])
    lines = []
    for row in results:
        who, run = case_name(row.case, varying), row.load_run
        if row.status == "ok" and run is not None and not run.valid:
            lines.append(f"{who}: not valid: {run.why_not}")
        if run is not None and run.refused:
            lines.append(
                f"{who}: {run.refused} of {run.requests} requests were refused; of the accepted the"
                f" slowest took {_ms(run.longest_s)} ms, at most {run.most_waiting} waited"
                f"{_growth(run)}"
            )
        if verbose and row.load is not None:
            lines += [f"{who}: {_one(played)}" for played in row.load.runs]
    return "".join(f"{line}\n" for line in lines)


def _of_cell(rows: Sequence[Result], load: Load, varying: Collection[str]) -> list[str]:
    case = rows[0].case
    kind = "an ensemble of" if case.inputs == "shared" else "tenants of"
    where = f"To serve {kind} {place_name(case, varying)}"
    held = sorted(
        (row for row in rows if row.held_qps is not None and row.status == "ok"),
        key=lambda row: row.held_qps or 0.0,
        reverse=True,
    )
    if not held:
        return [f"{where}: no strategy gave a valid run."]
    best, others = held[0], held[1:]
    if load.scenario == "single_stream":
        held.sort(key=lambda row: (row.load_run and row.load_run.tail_s) or 0.0)
        best, others = held[0], held[1:]
        does = f"answers one request after another within {_tail(best)} ms"
        rest = [f"{row.case.strategy} {_tail(row)}" for row in others]
    else:
        does = f"{_verb(best)} {_rate(best.held_qps)} requests per second"
        rest = [f"{row.case.strategy} {_rate(row.held_qps)}" for row in others]
    within = ""
    if load.scenario == "single_stream":
        within = f" ({load.percentile:g} % of them)"
    elif load.bound_s is not None:
        within = f" with {load.percentile:g} % of them within {_ms(load.bound_s)} ms"
    beside = f"; {', '.join(rest)}" if rest else ""
    lines = [f"{where}: {best.case.strategy} {does}{within}{beside}."]
    return lines + (_changes(rows, load) if load.scenario == "server" else [])


def _verb(row: Result) -> str:
    return "holds" if row.scenario == "server" else "does"


def _changes(rows: Sequence[Result], load: Load) -> list[str]:
    """Which strategy answers soonest, from the least load on."""
    parts = changes(rows)
    if not parts:
        return []
    first, *later = parts
    if not later:
        return [f"At every load {first.strategy} answers soonest ({load.percentile:g} %)."]
    told = [f"{first.strategy} up to {_rate(later[0].from_qps)} per second"]
    told += [f"{part.strategy} from {_rate(part.from_qps)}" for part in later]
    return [
        f"The answer changes with the load; soonest for {load.percentile:g} %: {', '.join(told)}."
    ]


def _one(run: LoadRun) -> str:
    rate = "" if run.offered_qps is None else f" at {_rate(run.offered_qps)} per second"
    tails = ", ".join(f"{_ms(latency) or '-'}" for latency in (run.p50_s, run.p90_s, run.p99_s))
    verdict = "valid" if run.valid else run.why_not
    return f"{run.purpose}{rate}: {run.requests} requests, p50, p90, p99 {tails} ms: {verdict}"


def _growth(run: LoadRun) -> str:
    if run.memory_growth_bytes is None:
        return ""
    return f"; memory grew by {run.memory_growth_bytes / 1e6:.1f} MB in {run.seconds:.0f} s"


def _ms(seconds: float | None) -> str:
    return (
        "" if seconds is None else f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"
    )


def _tail(row: Result) -> str:
    return _ms(row.load_run.tail_s) if row.load_run else ""


def _rate(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"


def _held(row: Result) -> str:
    if row.held_qps is None:
        return row.status if row.error else "none"
    between = row.held_range
    spread = ""
    if between and len(row.processes) > 1:
        spread = f" [{_rate(between[0])}, {_rate(between[1])}]"
    return f"{_rate(row.held_qps)}{spread}"


def _of_run(field: str, form: str, scale: float = 1.0) -> Cell:
    """A cell of the run that the row shows."""

    def cell(row: Result) -> str:
        run = row.load_run
        return UNKNOWN if run is None else number(getattr(run, field), form, scale)

    return cell


COLUMNS = (
    Column("held\nper s", _held),
    Column("p50\n(ms)", _of_run("p50_s", ".1f", 1e3)),
    Column("p90\n(ms)", _of_run("p90_s", ".1f", 1e3)),
    Column("p99\n(ms)", _of_run("p99_s", ".1f", 1e3)),
    Column("mean\nbatch", _of_run("mean_batch", ".2f")),
    Column("wasted\nslots", _of_run("wasted_share", ".0%"), always=False, silent="0%"),
    Column("CPU per\nrequest (ms)", _of_run("cpu_s_per_request", ".1f", 1e3)),
    Column("overhead\n(ms)", _of_run("overhead_s", ".2f", 1e3)),
    Column("\nrefused", _of_run("refused", ".0f"), always=False, silent="0"),
    Column("start\n(s)", lambda row: number(row.start_s, ".1f")),
    Column("memory\n(MB)", lambda row: number(row.peak_memory_bytes, ".0f", 1e-6)),
)
