"""Is `best` the fastest on timm's convolutional networks, and what do they leave to torch?

`python -m tests.studies.timm_table` runs the command for each of 20 networks that
tests/data/timm/cases.jsonl lacks, saves after each, and writes the page. `--only NAME ...` measures
these alone; `--page` writes the page from the file.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import geometric_mean

from ensemble.bench import result_file
from ensemble.bench.measurement import OK
from ensemble.bench.summary import Run, Summary

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "timm"
FILE, PAGE = DATA / "cases.jsonl", DATA / "README.md"

NETWORKS = (
    *("resnet50d", "resnet26t", "seresnet50", "ecaresnet50t", "resnetv2_50"),
    *("resnext50_32x4d", "wide_resnet50_2", "resnetrs50", "gernet_s", "regnety_016"),
    *("efficientnet_b0", "mobilenetv3_large_100", "convnext_tiny", "repvgg_a2", "hrnet_w18_small"),
    *("densenet121", "dla34", "vgg11_bn", "mobileone_s0", "tf_efficientnetv2_b0"),
)
PEERS = "openvino", "onnxruntime"
# The candidates of `best` on a CPU but the slowest, which it times itself, and the peers.
ROWS = ("loop", "prepacked_concurrent", "lowered_vmap", "best", *PEERS)
NUM_MODELS = 4
OPTIONS = ("--image_size", "224", "--processes", "1")
CLOSE, CLOSE_NEEDED = 0.95, 19  # of the fastest row; so many of the networks


@dataclass(frozen=True)
class Case:
    """The rows of one network.

    times_s: the median time of a call, by strategy. speedups: over the loop, in the median of the
    pairs, which rows are compared by. by_torch: what `lowered_vmap` leaves to torch's operators;
    None where it could not be built. out: why other rows are not there.
    """

    network: str
    picked: str
    times_s: Mapping[str, float]
    speedups: Mapping[str, float]
    by_torch: str | None
    out: Mapping[str, str]

    @property
    def fastest_other(self) -> str:
        """Of our own rows, but the one that `best` picked: that is the same built twice."""
        return self._fastest(self.speedups.keys() - {"best", self.picked, *PEERS})

    @property
    def fastest_peer(self) -> str | None:
        measured = self.speedups.keys() & {*PEERS}
        return self._fastest(measured) if measured else None

    @property
    def of_the_fastest(self) -> float:
        """How fast `best` is in times of the fastest other row: above 1 it wins."""
        return self.speedups["best"] / self.speedups[self.fastest_other]

    @property
    def of_the_peer(self) -> float | None:
        peer = self.fastest_peer
        return None if peer is None else self.speedups["best"] / self.speedups[peer]

    @property
    def is_close(self) -> bool:
        return self.of_the_fastest >= CLOSE

    @property
    def is_behind_the_loop(self) -> bool:
        return self.picked != "loop" and self.speedups["best"] < 1

    def _fastest(self, names: set[str]) -> str:
        return max(sorted(names), key=self.speedups.__getitem__)


def case_of(network: str, run: Run) -> Case:
    """The rows of a run of one network.

    Raises:
        ValueError: `best` failed.
    """
    rows = {row.case.strategy: row for row in run.results}
    measured = {name: row for name, row in rows.items() if row.status == OK}
    if "best" not in measured:
        raise ValueError(f"{network}: best failed: {rows['best'].error if 'best' in rows else ''}")
    lowered = measured.get("lowered_vmap")
    return Case(
        network,
        str(measured["best"].picked),
        {name: _known(row.median_s) for name, row in measured.items()},
        {name: 1.0 if name == "loop" else _known(row.speedup) for name, row in measured.items()},
        None if lowered is None else _left_to_torch(lowered),
        {name: str(row.error) for name, row in rows.items() if row.status != OK},
    )


def _known(value: float | None) -> float:
    if value is None:
        raise ValueError("expected a measured row, got one without times")
    return value


def _left_to_torch(row: Summary) -> str:
    """What a row's notes say after `by torch:`; empty for nothing."""
    found = re.search(r"by torch: ([^;]*)", "; ".join(row.notes))
    return found.group(1) if found else ""


def read() -> dict[str, Case]:
    """The cases that were measured, by network."""
    lines = FILE.read_text().splitlines() if FILE.exists() else []
    cases = [Case(**json.loads(line)) for line in lines]
    return {case.network: case for case in cases}


def add(case: Case) -> None:
    """A case is a line."""
    DATA.mkdir(exist_ok=True)
    with FILE.open("a") as file:
        file.write(json.dumps(asdict(case)) + "\n")


def page(cases: Sequence[Case]) -> str:
    """All networks, and how many are as they should be."""
    close, behind = sum(c.is_close for c in cases), sum(c.is_behind_the_loop for c in cases)
    leads = [case.of_the_peer for case in cases if case.of_the_peer is not None]
    peers = f" Geometric mean over the fastest peer: {geometric_mean(leads):.2f}." if leads else ""
    lines = [
        "# `best` on timm's convolutional networks",
        "",
        f"`best` was within {1 - CLOSE:.0%} of the fastest other row of ours in {close} of"
        f" {len(cases)} networks, and behind the loop in {behind}.{peers} {NUM_MODELS} models with"
        " random weights, one image of 224 px for all, float32; medians of one process a row."
        " Ratios are of speedups over the loop, in pairs: above 1 `best` is faster. Made by"
        " `python -m tests.studies.timm_table`; [cases.jsonl](cases.jsonl).",
        "",
        "| network | loop, ms | best, ms (its pick) | fastest other row, ms | fastest peer, ms |"
        " best / other | best / peer | left to torch's operators |",
        "| --- |" + " --- |" * 7,
        *map(_line, cases),
    ]
    missing = [
        f"- {case.network}: {name}: {reason}" for case in cases for name, reason in case.out.items()
    ]
    lines += ["", "Not available:", "", *missing] if missing else []
    return "\n".join(lines) + "\n"


def _line(case: Case) -> str:
    def named(name: str) -> str:
        return f"{1e3 * case.times_s[name]:.1f} ({name})"

    peer, lead = case.fastest_peer, case.of_the_peer
    cells = [
        case.network,
        f"{1e3 * case.times_s['loop']:.1f}",
        f"{1e3 * case.times_s['best']:.1f} ({case.picked})",
        named(case.fastest_other),
        named(peer) if peer else "",
        f"{case.of_the_fastest:.2f}",
        f"{lead:.2f}" if lead else "",
        "not built" if case.by_torch is None else case.by_torch or "nothing",
    ]
    return f"| {' | '.join(cells)} |"


def measure(network: str, options: Sequence[str]) -> Case:
    """Run the command for one network, with further options of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        command = [
            *(sys.executable, str(ROOT / "resnet_vmap.py"), "--arch", f"timm/{network}"),
            *("--num_models", str(NUM_MODELS), "--strategies", *ROWS),
            *(*OPTIONS, "--export_json", str(path), *options),
        ]
        done = subprocess.run(command, cwd=ROOT, check=False)
        if not path.exists():  # rows that are not available exit with a code too
            raise RuntimeError(f"{network}: the command wrote no results (exit {done.returncode})")
        return case_of(network, result_file.from_json(path.read_text()))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="All further flags are those of resnet_vmap.py."
    )
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--page", action="store_true", help="measure nothing")
    options, further = parser.parse_known_args(argv)
    for network in () if options.page else options.only:
        if network not in read():
            case = measure(network, further)
            add(case)
            print(_line(case), flush=True)
    found = read()
    DATA.mkdir(exist_ok=True)
    PAGE.write_text(page([found[network] for network in NETWORKS if network in found]))


if __name__ == "__main__":
    main()
