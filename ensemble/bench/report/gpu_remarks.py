"""Warnings about the GPU: other processes on it, and lowered clocks. Imports no torch."""

from collections.abc import Callable, Sequence

from ensemble.bench.environment import Environment
from ensemble.bench.report.labels import case_name, varying_fields
from ensemble.bench.summary import Run, Summary
from ensemble.machine.gpu_state import GpuState, describe_load


def warnings_before(environment: Environment) -> list[str]:
    """Warnings on the state of the GPU before the run, a line each."""
    state, lines = environment.gpu, list[str]()
    if state is None:
        return []
    if state.is_busy:
        lines.append(
            f"Warning: {environment.device} was busy before the run ({describe_load(state)}): times"
            " may be biased"
        )
    if state.slowed_by:
        lines.append(
            f"Warning: {environment.device} was throttled before the run ({_throttling(state)})"
        )
    return lines


def render(run: Run) -> str:
    """All warnings: before the run, and at the end of the measurements of each row."""
    lines = [f"{line}." for line in warnings_before(run.environment)]
    device = run.environment.device
    lines += _of_rows(
        f"Warning: other processes held memory of {device}",
        run.results,
        lambda state: _load_of_others(state) if state.is_shared else "",
    )
    lines += _of_rows(f"Warning: {device} was throttled", run.results, _throttling)
    return "".join(f"{line}\n" for line in lines)


def _load_of_others(state: GpuState) -> str:
    """The memory of other processes: the utilization at the end of a measurement is our own."""
    return f"{len(state.other_processes or ())}, {state.others_bytes / 1e9:.1f} GB"


def _of_rows(
    what: str, results: Sequence[Summary], describe: Callable[[GpuState], str]
) -> list[str]:
    """One line with all rows that `describe` has a text for: that of the first such process."""
    varying = varying_fields([row.case for row in results])
    found = []
    for row in results:
        states = [one.gpu for one in row.measurements if one.gpu is not None]
        texts = [text for state in states if (text := describe(state))]
        if texts:
            times = f" in {len(texts)} of {len(states)} processes" if len(states) > 1 else ""
            found.append(f"{case_name(row.case, varying)} ({texts[0]}{times})")
    return [f"{what}: {'; '.join(found)}."] if found else []


def _throttling(state: GpuState) -> str:
    """`SwPowerCap, SM clock 1,410 of 1,980 MHz`; empty if power and temperature lower no clock."""
    if not state.slowed_by:
        return ""
    text = ", ".join(state.slowed_by)
    if state.sm_clock_hz is None or state.max_sm_clock_hz is None:
        return text
    now, most = state.sm_clock_hz / 1e6, state.max_sm_clock_hz / 1e6
    return f"{text}, SM clock {now:,.0f} of {most:,.0f} MHz"
