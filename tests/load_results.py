"""The page of runs under load, tests/data/load/README.md: `python -m tests.load_results`."""

from ensemble.bench.report import exports
from ensemble.bench.report.page import page_of
from ensemble.bench.summary import Run
from tests.results import DATA, machine

FOLDER = DATA / "load"
PAGE = FOLDER / "README.md"

HEAD = """# Under load: stored runs

Every line is made of a stored file by `python -m tests.load_results`, and a test holds the page to
the files. Method: [ensemble/bench/load](../../../ensemble/bench/load/README.md).

{machine}; a shared machine, one process a row. The bound was given, so that all rows have the same.
A full mark in a picture is a run that LoadGen called valid, a dotted line the rate that is held.
"""


def runs() -> dict[str, Run]:
    """The stored runs by name."""
    paths = sorted(FOLDER.glob("*.json"))
    return {path.stem: exports.read(str(path), argument=path.stem) for path in paths}


def section(name: str, run: Run) -> list[str]:
    """What a run says, with its picture."""
    said = page_of(run, columns=False, sentences=False)
    picture = f"{name}.png"
    drawn = [f"![Latency against the offered rate]({picture})", ""]
    return [
        f"## {name.replace('_n', ', N=')}",
        "",
        f"`{' '.join(run.environment.argv)}`",
        "",
        *(drawn if (FOLDER / picture).exists() else []),
        "```",
        said.answer,
        said.table + said.notes + said.remarks + "```",
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
