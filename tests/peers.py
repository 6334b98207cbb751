"""Is `best` ahead of the runtimes that people would use instead?

`python -m tests.peers` times `best`, the loop, OpenVINO and ONNX Runtime in turns, so that what the
machine does meets all of them, in fresh processes for each architecture, and saves after each in
tests/data/peers/processes.jsonl: half an hour of a quiet machine with 2 cores. `--only NAME ...`
measures these alone. `python -m tests.results` writes the page.
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

from tests.together import Times, timed, times_as_fast

FILE = Path(__file__).parent / "data" / "peers" / "processes.jsonl"
RESNETS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2"),
    "resnext50_32x4d",
)
OTHERS = (
    *("mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "regnet_y_400mf", "densenet121"),
    *("googlenet", "squeezenet1_1", "shufflenet_v2_x1_0"),
)
PEERS = ("openvino", "onnxruntime")
NUM_MODELS, PX = 4, 224
ROUNDS, LEAST_S = 9, 2.0
PROCESSES = {**dict.fromkeys(RESNETS, 3), **dict.fromkeys(OTHERS, 2)}


@dataclass(frozen=True)
class Process:
    """What one process found: a time of each strategy in each round."""

    arch: str
    picked: str
    times_s: Times
    out: dict[str, str]

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


def table(processes: Sequence[Process], archs: Sequence[str]) -> list[str]:
    """Times per call, and the lead, of each architecture; its range over the processes."""
    names = ("loop", *PEERS, "best")
    lines = [
        f"| {' | '.join(('ms per call', *names))} | best in times of the faster peer |",
        "| --- |" + " --- |" * (len(names) + 1),
    ]
    leads = []
    for arch in archs:
        found = [process for process in processes if process.arch == arch]
        if not found:
            continue
        cells = [_per_call(found, name) for name in names]
        each = [process.lead for process in found]
        leads.append(median(each))
        lines.append(
            f"| {arch} | {' | '.join(cells)} |"
            f" {leads[-1]:.2f} ({min(each):.2f} to {max(each):.2f}) |"
        )
    return [*lines, "", f"Geometric mean of the last column: {geometric_mean(leads):.2f}."]


def _per_call(processes: Sequence[Process], name: str) -> str:
    medians = [median(p.times_s[name]) for p in processes if name in p.times_s]
    return f"{1e3 * median(medians):.1f}" if medians else "not available"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PROCESSES, default=tuple(PROCESSES))
    parser.add_argument("--here", action="store_true", help="one of the processes: this one")
    options = parser.parse_args(argv)
    if options.here:
        for arch in options.only:
            found = timed(
                ("loop", "best", *PEERS), arch, PX, NUM_MODELS, rounds=ROUNDS, seconds=LEAST_S
            )
            process = Process(arch, found.choice.name, found.times_s, dict(found.out))
            FILE.parent.mkdir(exist_ok=True)
            with FILE.open("a") as file:
                file.write(json.dumps(asdict(process)) + "\n")
            print(*table([process], [arch])[2:3], flush=True)
        return
    for index in range(max(PROCESSES.values())):  # spread over the run's time
        for arch in options.only:
            if index < PROCESSES[arch] and sum(p.arch == arch for p in read()) <= index:
                command = [sys.executable, "-m", "tests.peers", "--here", "--only", arch]
                subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
