"""Is `best` ahead of the runtimes that people would use instead?

`python -m tests.studies.peers` times `best`, the loop, OpenVINO and ONNX Runtime in turns, so that
drift of the machine affects all of them, in fresh processes for each (architecture, N, dtype), and
saves after each in tests/data/peers/processes.jsonl, with the page beside it: 40 minutes of a quiet
machine with 2 cores. What is there already is not measured again; `--only NAME ...` measures these
architectures alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import geometric_mean, median

import torch

from tests.together import Times, timed, times_as_fast

DATA = Path(__file__).parents[1] / "data" / "peers"
FILE, PAGE = DATA / "processes.jsonl", DATA / "README.md"
RESNETS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2"),
    "resnext50_32x4d",
)
OTHERS = (
    *("mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "regnet_y_400mf", "densenet121"),
    *("googlenet", "squeezenet1_1", "shufflenet_v2_x1_0"),
)
PEERS = ("openvino", "onnxruntime")
PX = 224
ROUNDS, LEAST_S = 9, 2.0


@dataclass(frozen=True)
class Place:
    """What is run: so many models of an architecture, all in a dtype."""

    arch: str
    num_models: int = 4
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.arch}, N={self.num_models}"


OF_RESNETS, OF_OTHERS = tuple(map(Place, RESNETS)), tuple(map(Place, OTHERS))
IN_BFLOAT16 = tuple(Place("resnet18", number, "bfloat16") for number in (4, 6, 16))
PROCESSES = {**dict.fromkeys((*OF_RESNETS, *IN_BFLOAT16), 3), **dict.fromkeys(OF_OTHERS, 2)}


@dataclass(frozen=True)
class Process:
    """What one process found: a time of each strategy in each round."""

    arch: str
    picked: str
    times_s: Times
    out: dict[str, str]  # why a strategy is not there
    num_models: int = 4
    dtype: str = "float32"

    @property
    def place(self) -> Place:
        return Place(self.arch, self.num_models, self.dtype)

    @property
    def lead(self) -> float:
        """How fast `best` is in times of the faster peer."""
        return min(
            times_as_fast(self.times_s, "best", peer) for peer in PEERS if peer in self.times_s
        )


def read() -> list[Process]:
    """The processes that were measured."""
    lines = FILE.read_text().splitlines() if FILE.exists() else []
    return [Process(**json.loads(line)) for line in lines]


def leads(processes: Sequence[Process], places: Sequence[Place]) -> dict[Place, list[float]]:
    """What each process of each place found, of those that were measured."""
    found = {place: [p.lead for p in processes if p.place == place] for place in places}
    return {place: each for place, each in found.items() if each}


def table(processes: Sequence[Process], places: Sequence[Place]) -> list[str]:
    """Times per call, and the lead, of each place; its range over the processes."""
    names = ("loop", *PEERS, "best")
    lines = [
        f"| {' | '.join(('ms per call', *names))} | best, in times of the faster runtime |",
        "| --- |" + " --- |" * (len(names) + 1),
    ]
    found = leads(processes, places)
    if not found:
        return ["Not measured yet."]
    for place, each in found.items():
        of_place = [process for process in processes if process.place == place]
        cells = " | ".join(_per_call(of_place, name) for name in names)
        lead = f"{median(each):.2f} ({min(each):.2f} to {max(each):.2f})"
        lines.append(f"| {place} | {cells} | {lead} |")
    mean = geometric_mean(map(median, found.values()))
    return [*lines, "", f"Geometric mean of the last column: {mean:.2f}."]


def _per_call(processes: Sequence[Process], name: str) -> str:
    medians = [median(p.times_s[name]) for p in processes if name in p.times_s]
    return f"{1e3 * median(medians):.1f}" if medians else "not available"


def page(processes: Sequence[Process]) -> str:
    """All tables."""
    return "\n".join(
        [
            "# `best` beside the runtimes that people would use instead",
            "",
            "All run in one process, in turns, each in its fastest setting; a table shows the"
            " median over the processes, and in brackets the least and the most that one of them"
            f" found. Random weights, one image of {PX} px for all models. Made by"
            " `python -m tests.studies.peers` on a 2-core AMD EPYC (AVX-512 with bfloat16, no AMX);"
            " raw times: [processes.jsonl](processes.jsonl).",
            "",
            "## Every ResNet, float32",
            "",
            *table(processes, OF_RESNETS),
            "",
            "## Other families, float32",
            "",
            *table(processes, OF_OTHERS),
            "",
            "## bfloat16",
            "",
            "ONNX Runtime has no convolution in bfloat16 here. The loop is in bfloat16 too.",
            "",
            *table(processes, IN_BFLOAT16),
            "",
        ]
    )


def measure(place: Place) -> Process:
    """Build all, compare them with the loop, and time them in rounds."""
    found = timed(
        *(("loop", "best", *PEERS), place.arch, PX, place.num_models),
        dtype=getattr(torch, place.dtype),
        rounds=ROUNDS,
        seconds=LEAST_S,
    )
    what = place.arch, found.choice.name, found.times_s, dict(found.out)
    return Process(*what, place.num_models, place.dtype)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    archs = (*RESNETS, *OTHERS)
    parser.add_argument("--only", nargs="+", choices=archs, default=archs)
    parser.add_argument("--here", nargs=3, metavar=("ARCH", "N", "DTYPE"), help="in this process")
    options = parser.parse_args(argv)
    if options.here:
        arch, number, dtype = options.here
        process = measure(Place(arch, int(number), dtype))
        DATA.mkdir(exist_ok=True)
        with FILE.open("a") as file:
            file.write(json.dumps(asdict(process)) + "\n")
        print(*table([process], [process.place])[2:3], flush=True)
        return
    for index in range(max(PROCESSES.values())):  # spread over the run's time
        for place, wanted in PROCESSES.items():
            done = sum(process.place == place for process in read())
            if place.arch in options.only and done <= index < wanted:
                where = (place.arch, str(place.num_models), place.dtype)
                command = [sys.executable, "-m", "tests.studies.peers", "--here", *where]
                subprocess.run(command, check=True)
    PAGE.write_text(page(read()))


if __name__ == "__main__":
    main()
