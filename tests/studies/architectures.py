"""Is `best` the fastest of our own rows, on every family of torchvision's classifiers?

`python -m tests.studies.architectures` measures what tests/data/architectures/cases.jsonl lacks, in
a process per architecture, saves after each case, and writes the page: 40 cases, a quarter of an
hour of a quiet machine with 2 cores. `--only NAME ...` measures these alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.together import timed, times_as_fast

DATA = Path(__file__).parents[1] / "data" / "architectures"
FILE, PAGE = DATA / "cases.jsonl", DATA / "README.md"

ARCHITECTURES = (
    *("alexnet", "vgg11_bn", "squeezenet1_1", "googlenet", "densenet121"),
    *("resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "regnet_x_400mf"),
    *("regnet_y_400mf", "mobilenet_v2", "mobilenet_v3_large", "mnasnet1_0", "shufflenet_v2_x1_0"),
    *("efficientnet_b0", "efficientnet_v2_s", "convnext_tiny", "swin_t", "swin_v2_t"),
)
SIZES, COUNTS = (64, 224), (1, 3)
# Our own that are built in seconds. Those that compile take up to minutes for a shape on a CPU.
ROWS = (
    *("loop", "vmap", "chunked_vmap", "folded_loop", "folded_vmap", "prepacked_loop"),
    *("prepacked_concurrent", "lowered_vmap", "concurrent", "best"),
)
ROUNDS, LEAST_S = 7, 1.0
CLOSE, NEEDED = 0.95, 0.95  # of the fastest; of the cases


@dataclass(frozen=True)
class Case:
    """All rows of one place, timed in rounds: a time of each row in each round."""

    arch: str
    px: int
    num_models: int
    picked: str
    note: str
    tune_s: float
    times_s: Mapping[str, Sequence[float]]
    out: Mapping[str, str]  # why a row is not there

    @property
    def place(self) -> tuple[str, int, int]:
        return self.arch, self.px, self.num_models

    def ratio(self, other: str) -> float:
        """Of the other row's time and `best`'s, in the median of the rounds: above 1 best wins."""
        return times_as_fast(self.times_s, "best", other)

    @property
    def of_the_fastest(self) -> float:
        """How fast `best` is in times of the fastest other row, but the one that it picked: that is
        the same built twice."""
        rivals = self.times_s.keys() - {"best", self.picked}
        return min(map(self.ratio, rivals))

    @property
    def is_close(self) -> bool:
        return self.of_the_fastest >= CLOSE

    @property
    def is_behind_the_loop(self) -> bool:
        return self.picked != "loop" and self.ratio("loop") < 1


def read() -> dict[tuple[str, int, int], Case]:
    """The cases that were measured."""
    lines = FILE.read_text().splitlines() if FILE.exists() else []
    cases = [Case(**json.loads(line)) for line in lines]
    return {case.place: case for case in cases}


def add(case: Case) -> None:
    """A case is a line."""
    DATA.mkdir(exist_ok=True)
    with FILE.open("a") as file:
        file.write(json.dumps(asdict(case)) + "\n")


def places(arch: str, *, every: bool) -> list[tuple[str, int, int]]:
    """Where an architecture is measured: both sizes, with either count at one of them, and with the
    counts changed about for the next architecture."""
    turned = ARCHITECTURES.index(arch) % 2
    return [
        (arch, px, count)
        for row, px in enumerate(SIZES)
        for column, count in enumerate(COUNTS)
        if every or (row + column + turned) % 2 == 0
    ]


def page(cases: Sequence[Case]) -> str:
    """What was picked, in times of the loop, and of the fastest other row."""
    close = sum(case.is_close for case in cases)
    behind = sum(case.is_behind_the_loop for case in cases)
    columns = [(px, count) for px in SIZES for count in COUNTS]
    header = " | ".join(f"{px} px, N={count}" for px, count in columns)
    found = {case.place: case for case in cases}
    lines = [
        "# `best` on torchvision's families",
        "",
        f"`best` was within {1 - CLOSE:.0%} of the fastest of our own rows in {close} of"
        f" {len(cases)} cases, and behind the loop in {behind}. A cell: what it picked, its speed"
        " in times of the loop, and in brackets in times of the fastest other row. Made by"
        " `python -m tests.studies.architectures`; raw times: [cases.jsonl](cases.jsonl).",
        "",
        f"| float32, batch 1 | {header} |",
        "| --- |" + " --- |" * len(columns),
    ]
    for arch in ARCHITECTURES:
        cells = [_cell(found.get((arch, *place))) for place in columns]
        lines.append(f"| {arch} | {' | '.join(cells)} |")
    missed = [case for case in cases if not case.is_close]
    lines += ["", "Further off:", ""] if missed else []
    for case in missed:
        rivals = case.times_s.keys() - {"best", case.picked}
        fastest = min(rivals, key=case.ratio)
        where = f"{case.arch}, {case.px} px, N={case.num_models}"
        lines.append(f"- {where}: {fastest} is {1 / case.ratio(fastest):.2f} times as fast")
    return "\n".join(lines) + "\n"


def _cell(case: Case | None) -> str:
    if case is None:
        return ""
    return f"{case.picked} {case.ratio('loop'):.2f} ({case.of_the_fastest:.2f})"


def measure(arch: str, px: int, num_models: int) -> Case:
    """Build every row, compare it with the loop, and time all of them in rounds."""
    found = timed(ROWS, arch, px, num_models, rounds=ROUNDS, seconds=LEAST_S)
    choice = found.choice
    note = f"picked {choice.name} (tried: {choice.tried})"
    return Case(
        *(arch, px, num_models, choice.name, note, choice.seconds),
        *(found.times_s, found.out),
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--all", action="store_true", help="both counts at both sizes: 80 cases")
    parser.add_argument("--here", action="store_true", help="in this process")
    options = parser.parse_args(argv)
    for arch in options.only:
        missing = [place for place in places(arch, every=options.all) if place not in read()]
        if missing and not options.here:
            command = [
                sys.executable,
                "-m",
                "tests.studies.architectures",
                "--here",
                "--only",
                arch,
            ]
            subprocess.run([*command, *(["--all"] if options.all else [])], check=True)
            continue
        for place in missing:
            begin = time.monotonic()
            case = measure(*place)
            add(case)
            took = time.monotonic() - begin
            print(*place, _cell(case), f"in {took:.0f} s: {case.note}", flush=True)
    if not options.here:
        PAGE.write_text(page(list(read().values())))


if __name__ == "__main__":
    main()
