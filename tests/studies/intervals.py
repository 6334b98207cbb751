"""Simulate runs of known truth, and write what the statistics make of them into intervals.md.

`python -m tests.studies.intervals` takes some minutes. A run is synthetic: a process draws its log
speedup, and pairs around it (`PAIRS` of them, 10 % noise); everything else is the program: how many
processes a row gets, its interval, which strategy wins, and whether the gate fails.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ensemble.bench import schedule
from ensemble.bench.case import Case
from ensemble.bench.cli import parse
from ensemble.bench.config import Config
from ensemble.bench.measurement import Measurement
from ensemble.bench.report import comparison, sweep
from ensemble.bench.summary import Run, Summary, merged
from ensemble.statistics import modes
from tests.made import ENVIRONMENT

PAGE = Path(__file__).with_name("intervals.md")
PAIRS, NOISE = 7, 0.10
LOOP_S = 0.1
RUNS = 1500
SEED = 31

Generator = np.random.Generator
# How processes scatter: (generator, number) -> the log speedups of that many processes, around 0.
Scatter = Callable[[Generator, int], np.ndarray]


def normal(deviation: float) -> Scatter:
    """Independent processes."""
    return lambda generator, count: generator.normal(0, deviation, count)


def drifting(deviation: float, rho: float = 0.8) -> Scatter:
    """A first-order autoregressive process: drift that lasts over several processes of a row."""

    def draw(generator: Generator, count: int) -> np.ndarray:
        steps = generator.normal(0, deviation * (1 - rho**2) ** 0.5, count)
        values = [generator.normal(0, deviation)]
        for step in steps[1:]:
            values.append(rho * values[-1] + step)
        return np.array(values)

    return draw


def bimodal(share: float, gap: float = 0.35, deviation: float = 0.02) -> Scatter:
    """Two modes: a `share` of processes is faster by `gap`."""
    return lambda generator, count: (
        generator.normal(0, deviation, count) + gap * (generator.random(count) < share)
    )


@dataclass(frozen=True)
class Row:
    """A synthetic strategy: its true log speedup, and how its processes scatter."""

    scatter: Scatter
    log_speedup: float = 0.0


def measured(row: Row, config: Config, generator: Generator, name: str = "vmap") -> Summary:
    """A row as the program measures it: as many processes as it would start."""
    draws = row.log_speedup + row.scatter(generator, schedule.MAX_PLANNED)
    case, summary = Case(name, 4, 1, 224, "float32", "shared"), None
    while schedule.wants_more(summary, config):
        level = draws[len(summary.processes) if summary else 0]
        times_s = LOOP_S * np.exp(generator.normal(0, NOISE, PAIRS) - level)
        summary = merged(
            summary,
            Measurement(case, times_s=tuple(times_s), reference_times_s=(LOOP_S,) * PAIRS),
        )
    assert summary is not None
    return summary


def run_of(rows: Sequence[Row], config: Config, generator: Generator) -> Run:
    """A run of these rows, each a strategy of its own."""
    summaries = [
        measured(row, config, generator, f"strategy_{index}") for index, row in enumerate(rows)
    ]
    return Run(ENVIRONMENT, config.plain(), tuple(summaries))


def config_of(*argv: str) -> Config:
    """The configuration of a command line."""
    return parse(list(argv))


@dataclass(frozen=True)
class Coverage:
    """How often the interval of a row contains the truth, and its mean half-width."""

    covered: float
    half_width: float


def coverage(scatter: Scatter, config: Config, runs: int, *, truth: float = 0.0) -> Coverage:
    generator = np.random.default_rng(SEED)
    covered, halves = 0, []
    for _ in range(runs):
        low, high = np.log(measured(Row(scatter), config, generator).speedup_interval or (1, 1))
        covered += low <= truth <= high
        halves.append(high - low)
    return Coverage(covered / runs, float(np.mean(halves)) / 2)


@dataclass(frozen=True)
class Winner:
    """Of strategies that all equal the loop: how often one is called faster, and the bias and the
    coverage of the figure in the answer."""

    called_faster: float
    bias: float
    covered: float


def winner(number: int, scatter: Scatter, config: Config, runs: int) -> Winner:
    generator = np.random.default_rng(SEED)
    faster, biases, covered = 0, [], 0
    for _ in range(runs):
        lead = sweep.leaders(run_of([Row(scatter)] * number, config, generator).results)
        assert lead is not None
        faster += lead.is_faster
        biases.append(lead.speedup - 1)
        covered += lead.interval[0] <= 1 <= lead.interval[1]
    return Winner(faster / runs, float(np.mean(biases)), covered / runs)


@dataclass(frozen=True)
class Gate:
    """How often `--fail_above` fails, and how often it is inconclusive instead."""

    fails: float
    inconclusive: float


def gate(
    scatter: Scatter,
    config: Config,
    runs: int,
    *,
    rows: int = 1,
    slowdown: float = 1.0,
    percent: float = 5.0,
) -> Gate:
    """Gate runs whose first row became slower by a factor against runs of before."""
    generator = np.random.default_rng(SEED)
    failed = inconclusive = 0
    before = [Row(scatter)] * rows
    after = [replace(before[0], log_speedup=-float(np.log(slowdown))), *before[1:]]
    for _ in range(runs):
        compared = comparison.compare(
            run_of(after, config, generator), run_of(before, config, generator)
        )
        if any(row.is_significantly_slower(percent) for row in compared):
            failed += 1
        else:
            inconclusive += not all(row.passes(percent) for row in compared)
    return Gate(failed / runs, inconclusive / runs)


def bimodality(scatter: Scatter, config: Config, runs: int) -> float:
    """The share of rows that are called bimodal."""
    generator = np.random.default_rng(SEED)
    rows = (measured(Row(scatter), config, generator) for _ in range(runs))
    return sum(len(modes(row.process_speedups)) > 1 for row in rows) / runs


def lines(runs: int = RUNS) -> Iterator[str]:
    """The page, line by line."""
    default, few = config_of(), max(2, runs // 5)
    yield "# Statistics under simulation"
    yield ""
    yield (
        f"`python -m tests.studies.intervals` wrote this page: {runs} synthetic runs per figure"
        f" ({few} with 8 or more rows), {PAIRS} pairs per process with {NOISE:.0%} noise, through"
        f" the program's own schedule and statistics; {default.measure.processes} processes per row"
        " unless stated otherwise."
    )
    yield ""
    yield "## Coverage of 95 % intervals"
    yield ""
    yield "| processes scatter by | settings | covered | mean half-width |"
    yield "| --- | --- | --- | --- |"
    scatters = {f"{percent} %": normal(percent / 100) for percent in (1, 3, 8)}
    scatters |= {f"{percent} %, AR(1) 0.8": drifting(percent / 100) for percent in (3, 8)}
    settings = {
        "default": default,
        "--processes 20": config_of("--processes", "20"),
        "--max_ci_percent 5": config_of("--max_ci_percent", "5"),
    }
    for label, scatter in scatters.items():
        for name, config in settings.items():
            found = coverage(scatter, config, runs)
            yield f"| {label} | {name} | {found.covered:.3f} | {found.half_width:.3f} |"
    for share in (0.1, 0.3):
        found = coverage(bimodal(share), default, runs)
        yield (
            f"| two modes, 35 % apart, the faster in {share:.0%} of processes; truth: the other"
            f" | default | {found.covered:.3f} | {found.half_width:.3f} |"
        )
    yield ""
    yield "## Half-width by number of processes, scatter 7 %"
    yield ""
    yield "| processes | mean half-width | over that of 6 |"
    yield "| --- | --- | --- |"
    counts = (3, 4, 5, 6, 10, 20, 30)
    widths = {
        count: coverage(normal(0.07), config_of("--processes", str(count)), runs).half_width
        for count in counts
    }
    for count, width in widths.items():
        yield f"| {count} | {width:.3f} | {width / widths[6]:.2f} |"
    yield ""
    yield "## The winner among strategies that all equal the loop, scatter 3 %"
    yield ""
    yield "| strategies | called faster than the loop | bias of the figure | its interval covers |"
    yield "| --- | --- | --- | --- |"
    for number in (2, 8, 20):
        best = winner(number, normal(0.03), default, runs if number < 8 else few)
        yield f"| {number} | {best.called_faster:.3f} | {best.bias:+.1%} | {best.covered:.3f} |"
    yield ""
    yield "## The regression gate, `--fail_above 5`"
    yield ""
    yield "| rows, scatter | the first row is slower by | settings | fails | inconclusive |"
    yield "| --- | --- | --- | --- | --- |"
    one = config_of("--processes", "1")
    ten = config_of("--processes", "10")
    gates: list[tuple[str, Scatter, int, float, str, Config]] = [
        ("1, 3 %", normal(0.03), 1, 1.0, "default", default),
        ("1, 8 %", normal(0.08), 1, 1.0, "default", default),
        ("20, 3 %", normal(0.03), 20, 1.0, "default", default),
        ("1, two modes", bimodal(0.3), 1, 1.0, "default", default),
        ("1, 8 %", normal(0.08), 1, 1.0, "--processes 1", one),
        ("1, 3 %", normal(0.03), 1, 1.1, "default", default),
        ("1, 3 %", normal(0.03), 1, 1.1, "--processes 10", ten),
        ("1, 3 %", normal(0.03), 1, 1.2, "default", default),
        ("20, 3 %", normal(0.03), 20, 1.2, "default", default),
        ("1, 8 %", normal(0.08), 1, 1.2, "default", default),
        ("1, two modes", bimodal(0.3), 1, 2.0, "default", default),
    ]
    for label, scatter, rows, slowdown, name, config in gates:
        result = gate(scatter, config, runs if rows < 8 else few, rows=rows, slowdown=slowdown)
        yield (
            f"| {label} | {slowdown - 1:.0%} | {name} | {result.fails:.3f}"
            f" | {result.inconclusive:.3f} |"
        )
    yield ""
    yield "## Rows of one mode that are called bimodal"
    yield ""
    yield "| scatter | default | --processes 10 |"
    yield "| --- | --- | --- |"
    for percent in (3, 8, 15):
        cells = [bimodality(normal(percent / 100), config, runs) for config in (default, ten)]
        yield f"| {percent} % | {cells[0]:.3f} | {cells[1]:.3f} |"
    for share in (0.3, 0.5):
        cells = [bimodality(bimodal(share), config, runs) for config in (default, ten)]
        yield f"| two modes, {share:.0%} | {cells[0]:.3f} | {cells[1]:.3f} |"


def main() -> None:
    """Write the page, and show it as it grows."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else RUNS
    text = []
    for line in lines(runs):
        print(line, flush=True)
        text.append(line)
    PAGE.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
