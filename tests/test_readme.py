"""The README's figures are those of the stored result files."""

from pathlib import Path

import pytest

from ensemble import exports
from ensemble.report import render_table
from ensemble.verdict import render_verdict

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
STORED = sorted((ROOT / "tests" / "data").glob("*.json"))


def test_the_table_of_every_strategy_is_the_one_that_its_file_gives():
    run = exports.read(str(ROOT / "tests" / "data" / "float32_n4.json"), flag="")
    assert render_table(run.results).rstrip("\n") in README


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_every_stored_file_is_shown_with_its_own_figures(path: Path):
    run = exports.read(str(path), flag="")
    if path.stem.endswith("sweep"):
        assert path.with_suffix(".png").exists()
        assert f"tests/data/{path.stem}.png" in README
        said = render_verdict(run.results, run.environment).splitlines()
        said = [line for line in said if line.startswith(("Fastest", "Break-even"))]
        assert said
        assert [line for line in said if line not in README] == []
        return
    shown = [
        f"{row.speedup:.2f} [{row.speedup_interval[0]:.2f}, {row.speedup_interval[1]:.2f}]"
        for row in run.results
        if row.strategy in {"winograd_vmap", "packed_concurrent"}
        and row.speedup_interval
        and not row.inconclusive
    ]
    assert shown
    assert [figure for figure in shown if figure not in README] == []


@pytest.mark.parametrize(
    "path", sorted((ROOT / "tests/data/allocator").glob("*.json")), ids=lambda path: path.stem
)
def test_the_table_of_page_faults_is_that_of_its_files(path: Path):
    results = exports.read(str(path), flag="").results
    (vmap,) = (row for row in results if row.strategy == "vmap")
    low, high = vmap.speedup_interval or (0, 0)
    figure = f"{vmap.speedup:.2f} [{low:.2f}, {high:.2f}], {vmap.page_faults_per_call:,.0f} faults"
    assert figure in README
