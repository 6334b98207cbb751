"""An exported file -> a paragraph: what it holds, and what it keeps of the speed. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ensemble.artifacts.formats import Format
from ensemble.bench.report.sweep import by_grid_point
from ensemble.bench.summary import Summary
from ensemble.formatting import count

if TYPE_CHECKING:
    from ensemble.strategies.exported import ExportReport

_HOW = {
    Format.PT2: "torch alone",
    Format.AOTI: "torch alone",
    Format.ONNX: "ONNX Runtime alone",
    Format.TRITON: "ONNX Runtime alone",
}


def render(report: ExportReport, num_models: int, dtype: str, results: Sequence[Summary]) -> str:
    """Size and error of a file, and its speed relative to the fastest other row in its dtype."""
    *some, last = map(str, report.batch_sizes)
    error, size = report.max_rel_error, f"{report.bytes / 1e6:,.1f} MB"
    agrees = "agrees with the loop" if error is None else f"is within {error:.0e} of the loop"
    written = (
        f"{report.path}: {count(num_models, 'model')}, any batch size, {size};"
        f" run by {_HOW[report.format]} it {agrees} at batch {', '.join(some)} and {last}."
    )
    return " ".join([written, *_speeds(report, dtype, results)])


def _speeds(report: ExportReport, dtype: str, results: Sequence[Summary]) -> list[str]:
    """A sentence per grid point: `winner.pt2 runs at 0.62x the speed of best (lowered_vmap)`."""
    points, sentences = by_grid_point(results), []
    for rows in points.values():
        of_dtype = [row for row in rows if row.case.dtype == dtype and not row.case.is_self_check]
        where = f" at batch {rows[0].case.batch_size}" if len(points) > 1 else ""
        sentences += _speed(report, of_dtype, where)
    return sentences


def _speed(report: ExportReport, rows: Sequence[Summary], where: str) -> list[str]:
    name, strategy = report.path.name, report.format.strategy
    own = next((row for row in rows if row.case.strategy == strategy), None)
    if own is None or own.speedup is None:
        return [f"Its speed{where} is unknown: {strategy} was not measured."]
    if own.inconclusive:
        return [f"Its speed{where} is inconclusive ({own.inconclusive})."]
    others = [row for row in rows if row is not own and row.speedup and not row.inconclusive]
    if not others:
        return []
    fastest = max(others, key=lambda row: row.speedup or 0.0)
    ratio = own.speedup / (fastest.speedup or 1.0)
    lost = "" if ratio >= 1 else "; it has no kernels of this package" * _is_ours(fastest)
    return [f"{name} runs at {ratio:.2f}x the speed of {fastest.name}{where}{lost}."]


def _is_ours(row: Summary) -> bool:
    """Does a row run kernels of this package, itself or through the strategy that it picked?"""
    return (row.picked or row.case.strategy).startswith("lowered")
