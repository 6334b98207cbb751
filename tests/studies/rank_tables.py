"""Tables of ensemble/bench/executors/ranks/README.md from stored files: run as a module."""

from __future__ import annotations

from ensemble.bench.executors.ranks import scaling_simulation
from ensemble.bench.executors.ranks.cost_model import Constants, call_cost
from ensemble.bench.measurement import RankTimes
from ensemble.bench.report import exports
from ensemble.bench.summary import Run, Summary
from tests.studies import results

DATA = results.DATA / "distributed"


def read(name: str) -> Run:
    """A stored run over ranks."""
    return exports.read(str(DATA / f"{name}.json"), argument=name)


def constants() -> Constants:
    """The stored output of `ensemble.bench.executors.ranks.calibration`."""
    return scaling_simulation.read(DATA / "constants.json")


def measured(name: str) -> list[str]:
    """A line per row: the parts of its calls, and for the loop the prediction of the cost model."""
    run = read(name)
    return [
        "| N | strategy | call (ms) | efficiency | interference | communication | over one rank"
        " | predicted (ms) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_line(row, run.environment.ranks or 1) for row in run.results),
    ]


def _line(row: Summary, ranks: int) -> str:
    case, times = row.case, row.ranks or RankTimes()
    over_one = times.speedup_over_one_rank
    cost = call_cost(constants(), models=case.num_models, ranks=ranks, px=case.image_size)
    cells = [
        f"{case.num_models}",
        f"`{case.strategy}`",
        f"{1e3 * (row.median_s or 0):.0f}",
        *map(_percent, (times.parallel_efficiency, times.interference, times.communication)),
        "" if over_one is None else f"{over_one:.2f}",
        f"{1e3 * cost.whole_s:.0f}" if case.is_reference else "",
    ]
    return f"| {' | '.join(cells)} |"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def measured_constants() -> list[str]:
    """A line per constant."""
    measured_here = constants()
    return [
        "| constant | measured |",
        "| --- | --- |",
        f"| forward of one model, both ranks busy | {1e3 * measured_here.model_s:.1f} ms |",
        f"| standard deviation of its log | {measured_here.spread:.3f} |",
        f"| latency of an empty message | {1e6 * measured_here.step_s:.0f} µs |",
        f"| each further message to the same rank | {1e6 * measured_here.part_s:.0f} µs |",
        f"| bandwidth | {measured_here.bytes_per_s / 1e9:.2f} GB/s |",
    ]


def all_lines() -> list[str]:
    """Every line of every table."""
    return [
        *measured("two_ranks"),
        *measured("two_hosts"),
        *measured("four_ranks"),
        *measured_constants(),
        *scaling_simulation.table(constants()).splitlines(),
    ]


if __name__ == "__main__":
    print("\n".join(all_lines()))
