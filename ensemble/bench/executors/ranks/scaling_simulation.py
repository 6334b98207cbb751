"""Simulated scaling over ranks, from the cost model of a call; labeled as simulated.

`python -m ensemble.bench.executors.ranks.scaling_simulation CONSTANTS.json PICTURE.png` draws the
picture and prints the table; the constants are the output of `calibration.py`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ensemble.bench.executors.ranks.cost_model import (
    Constants,
    call_cost,
    ranks_at_share,
)
from ensemble.bench.report.pictures import (
    COLORS,
    DASHES,
    DPI,
    MARKS,
    STYLE,
)

RANKS = tuple(2**power for power in range(11))  # 1 to 1,024
MODELS_PER_RANK = (1, 4, 16)
COMMUNICATION_SHARE = 0.1
LABEL = "simulated by a cost model, not measured"


def read(path: Path) -> Constants:
    """The stored output of `calibration.py`."""
    return Constants(**json.loads(path.read_text()))


def table(constants: Constants) -> str:
    """In Markdown: at how many ranks and models communication takes 10 % of a call."""
    lines = [
        "| models per rank | ranks | models | call (ms) | broadcast (ms) | gather (ms) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for each in MODELS_PER_RANK:
        ranks = ranks_at_share(constants, share=COMMUNICATION_SHARE, models_per_rank=each)
        if ranks is None:
            lines.append(f"| {each} | never | | | | |")
            continue
        cost = call_cost(constants, models=each * ranks, ranks=ranks)
        times = (cost.whole_s, cost.broadcast_s, cost.gather_s)
        cells = [f"{each}", f"{ranks:,}", f"{each * ranks:,}"]
        cells += [f"{1e3 * seconds:.1f}" for seconds in times]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(constants: Constants, path: Path) -> None:
    """Forwards per second and the share of communication by ranks; a line per shard size."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.6, 4.4), layout="constrained")
        speed, share = figure.subplots(1, 2)
        for each, *look in zip(MODELS_PER_RANK, COLORS, MARKS, DASHES, strict=False):
            name = f"{each} model{'s' if each > 1 else ''} per rank"
            costs = [call_cost(constants, models=each * ranks, ranks=ranks) for ranks in RANKS]
            rates = [each * ranks / cost.whole_s for ranks, cost in zip(RANKS, costs, strict=True)]
            _line(speed, RANKS, rates, name, look)
            _line(
                share, RANKS[1:], [100 * cost.communication_share for cost in costs[1:]], name, look
            )
        share.axhline(100 * COMMUNICATION_SHARE, color="black", linewidth=0.8)
        speed.set_ylabel("model forwards per second")
        share.set_ylabel("communication, % of a call")
        for axes in (speed, share):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(RANKS[::2], [f"{ranks:,}" for ranks in RANKS[::2]])
            axes.set_xlabel("ranks")
            axes.grid(axis="y", linewidth=0.4, alpha=0.5)
            axes.legend(frameon=False, fontsize=8)
        figure.suptitle(LABEL, fontsize=10)
        figure.savefig(path, dpi=DPI)


def _line(
    axes: Axes, ranks: Sequence[int], values: Sequence[float], name: str, look: Sequence[str]
) -> None:
    color, mark, dash = look
    axes.plot(ranks, values, label=name, color=color, marker=mark, linestyle=dash, markersize=4)


if __name__ == "__main__":
    measured = read(Path(sys.argv[1]))
    draw(measured, Path(sys.argv[2]))
    print(table(measured), end="")
