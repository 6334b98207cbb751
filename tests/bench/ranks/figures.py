"""Figures of ensemble/bench/executors/ranks/README.md, made of stored files: run as a module."""

from __future__ import annotations

from ensemble.bench.executors.ranks import simulation
from ensemble.bench.executors.ranks.cost_model import Constants, call
from ensemble.bench.measurement import RankTimes
from ensemble.bench.report import exports
from ensemble.bench.summary import Run, Summary
from tests import results

DATA = results.DATA / "distributed"


def read(name: str) -> Run:
    """A stored run over ranks."""
    return exports.read(str(DATA / f"{name}.json"), argument=name)


def constants() -> Constants:
    """What `ensemble.bench.executors.ranks.calibration` printed."""
    return simulation.read(DATA / "constants.json")


def measured(name: str) -> list[str]:
    """A line a row: what its calls consist of, and beside the loop what the model says."""
    run = read(name)
    return [
        "| N | strategy | a call (ms) | efficiency | interference | communication | over one rank"
        " | the model says (ms) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_line(row, run.environment.ranks or 1) for row in run.results),
    ]


def _line(row: Summary, ranks: int) -> str:
    case, times = row.case, row.ranks or RankTimes()
    over_one = times.speedup_over_one_rank
    at = call(constants(), models=case.num_models, ranks=ranks, px=case.image_size)
    cells = [
        f"{case.num_models}",
        f"`{case.strategy}`",
        f"{1e3 * (row.median_s or 0):.0f}",
        *map(_percent, (times.parallel_efficiency, times.interference, times.communication)),
        "" if over_one is None else f"{over_one:.2f}",
        f"{1e3 * at.whole_s:.0f}" if case.is_reference else "",
    ]
    return f"| {' | '.join(cells)} |"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def measured_constants() -> list[str]:
    """A line a constant."""
    found = constants()
    return [
        "| constant | here |",
        "| --- | --- |",
        f"| forward of one model, beside the other rank's | {1e3 * found.model_s:.1f} ms |",
        f"| deviation of its logarithm | {found.spread:.3f} |",
        f"| a message of no size | {1e6 * found.step_s:.0f} µs |",
        f"| one more where many come in at one rank | {1e6 * found.part_s:.0f} µs |",
        f"| bandwidth | {found.bytes_per_s / 1e9:.2f} GB/s |",
    ]


def all_lines() -> list[str]:
    """Every line of every table."""
    return [
        *measured("two_ranks"),
        *measured("two_hosts"),
        *measured("four_ranks"),
        *measured_constants(),
        *simulation.table(constants()).splitlines(),
    ]


if __name__ == "__main__":
    print("\n".join(all_lines()))
