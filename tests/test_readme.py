"""The documentation is true: its figures are those of stored files, and what it names is there."""

import re
from pathlib import Path

import pytest

from ensemble.strategies import STRATEGIES
from tests.studies import load_results, rank_tables, results

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("[a-z]*/**/README.md"))]


def test_the_results_page_is_what_the_stored_files_say() -> None:
    assert results.PAGE.read_text() == results.page()
    assert load_results.PAGE.read_text() == load_results.page()


def test_every_stored_run_has_its_figures_on_the_results_page() -> None:
    shown = {*results.SETTINGS, "sweep", "cuda_sweep"}
    assert {path.stem for path in results.DATA.glob("*.json")} == shown


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_is_short_and_every_file_that_it_links_to_is_there(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 150
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_every_file_that_a_page_names_is_there() -> None:
    pages = "".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"`((?:ensemble|tests|\.ci)/[\w./]+)`", pages))
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_strategy_is_named_in_the_readme() -> None:
    assert [name for name in STRATEGIES if f"`{name}`" not in README] == []


def test_the_table_of_the_first_screen_is_that_of_stored_runs() -> None:
    assert results.readme() == README


def test_the_figures_of_the_page_on_ranks_are_those_of_stored_runs() -> None:
    page = (
        (ROOT / "ensemble" / "bench" / "executors" / "ranks" / "README.md").read_text().splitlines()
    )
    assert [line for line in rank_tables.all_lines() if line not in page] == []
