"""What is said of an exported file: what it holds, and what it keeps of the speed."""

from dataclasses import replace
from pathlib import Path

from ensemble.artifacts.formats import Format
from ensemble.bench.report.exported_file import render
from ensemble.bench.summary import Summary
from ensemble.strategies.exported import ExportReport
from tests.made import LOOP, UNAVAILABLE, VMAP, changed

REPORT = ExportReport(Path("/tmp/winner.pt2"), Format.PT2, 93_700_000, 3.2e-7, (1, 2, 5), 4.0)
TIMES = (0.1,) * 20


def row(strategy: str, speedup: float, **changes: object) -> Summary:
    """A row so many times as fast as the loop."""
    slower = tuple(speedup * time for time in TIMES)
    return changed(VMAP, strategy=strategy, times_s=TIMES, reference_times_s=slower, **changes)


def test_a_file_slower_than_the_winner_says_by_how_much_and_why() -> None:
    best = row("best", 3.0, picked="lowered_vmap")
    rows = [LOOP, row("vmap", 1.2), best, row("exported_pt2", 1.86)]
    assert render(REPORT, 4, "float32", rows) == (
        "/tmp/winner.pt2: 4 models, any batch size, 93.7 MB; run by torch alone it is within 3e-07"
        " of the loop at batch 1, 2 and 5. winner.pt2 runs at 0.62x the speed of best"
        " (lowered_vmap); it has no kernels of this package."
    )


def test_a_file_faster_than_all_other_rows_says_so_of_the_next() -> None:
    text = render(REPORT, 4, "float32", [LOOP, row("vmap", 0.5), row("exported_pt2", 1.5)])
    assert text.endswith("winner.pt2 runs at 1.50x the speed of loop.")


def test_rows_of_another_dtype_are_not_compared() -> None:
    rows = [LOOP, row("exported_pt2", 1.5), row("best", 3.0, dtype="bfloat16")]
    assert render(REPORT, 4, "float32", rows).endswith("1.50x the speed of loop.")
    rows = [LOOP, row("exported_pt2", 1.5), row("best", 3.0, dtype="bfloat16")]
    assert render(REPORT, 4, "bfloat16", rows).endswith("unknown: exported_pt2 was not measured.")


def test_each_batch_size_has_its_ratio() -> None:
    rows = [LOOP, row("exported_pt2", 1.5)]
    rows += [changed(LOOP, batch_size=8), row("exported_pt2", 0.9, batch_size=8)]
    assert render(REPORT, 4, "float32", rows).endswith(
        "winner.pt2 runs at 1.50x the speed of loop at batch 1."
        " winner.pt2 runs at 0.90x the speed of loop at batch 8."
    )


def test_no_ratio_of_what_was_not_measured_or_is_inconclusive() -> None:
    missing = changed(UNAVAILABLE, strategy="exported_pt2")
    assert render(REPORT, 4, "float32", [LOOP, missing]).endswith(
        "Its speed is unknown: exported_pt2 was not measured."
    )
    noisy = row("exported_pt2", 1.5, others_cpu_share=0.5)
    assert render(REPORT, 4, "float32", [LOOP, noisy]).endswith("inconclusive (CPU busy).")


def test_a_triton_model_runs_as_an_onnx_file() -> None:
    report = replace(REPORT, path=Path("r/resnet_x4"), format=Format.TRITON, max_rel_error=None)
    text = render(report, 4, "float32", [LOOP, row("exported_onnx", 1.5)])
    assert "run by ONNX Runtime alone it agrees with the loop" in text
    assert text.endswith("resnet_x4 runs at 1.50x the speed of loop.")
