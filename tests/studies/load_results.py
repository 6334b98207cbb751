"""Render tests/data/load/README.md: `python -m tests.studies.load_results`."""

from ensemble.bench.report import exports
from ensemble.bench.report.page import page_of
from ensemble.bench.summary import Run
from tests.studies.results import DATA, machine

FOLDER = DATA / "load"
PAGE = FOLDER / "README.md"

HEAD = """# Load tests: stored runs

`python -m tests.studies.load_results` generates this page from the stored files, and a test keeps
them in sync. Method: [ensemble/bench/load](../../../ensemble/bench/load/README.md).

{machine}; a shared machine, one process per row. The
latency bound of a run is given, so that all its rows have the same. In a picture a filled marker is
a run that LoadGen found valid, an empty one an invalid run. A curve goes through the median of each
rate up to the sustained rate, a dotted line; runs above it were invalid or failed the confirmation.

They were made by an earlier search, which took the highest rate that LoadGen confirmed. Such a rate
has no interval and is too low, for p99 by about a quarter
([simulation](../../studies/load_search.md)).
"""


def runs() -> dict[str, Run]:
    """The stored runs by name."""
    paths = sorted(FOLDER.glob("*.json"))
    return {path.stem: exports.read(str(path), argument=path.stem) for path in paths}


def section(name: str, run: Run) -> list[str]:
    """The section of a run, with its picture."""
    text = page_of(run, columns=False, sentences=False)
    picture = f"{name}.png"
    picture_lines = [f"![Latency against the offered rate]({picture})", ""]
    return [
        f"## {name.replace('_n', ', N=')}",
        "",
        f"`{' '.join(run.environment.argv)}`",
        "",
        *(picture_lines if (FOLDER / picture).exists() else []),
        "```",
        text.answer,
        text.table + text.notes + text.remarks + "```",
        "",
    ]


def page() -> str:
    """The whole page."""
    stored = runs()
    lines = [line for name, run in stored.items() for line in section(name, run)]
    where = machine(next(iter(stored.values())))
    return HEAD.format(machine=where) + "\n" + "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
