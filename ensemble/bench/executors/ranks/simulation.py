"""Runs over ranks that nobody has made: drawn from the model of a call, and labelled so.

`python -m ensemble.bench.executors.ranks.simulation CONSTANTS.json PICTURE.png`, where the
constants are what `calibration.py` printed; prints the table of `table`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ensemble.bench.executors.ranks.cost_model import Constants, call, ranks_for
from ensemble.bench.report.pictures import (
    COLOURS,
    DASHES,
    DPI,
    MARKS,
    STYLE,
)

RANKS = tuple(2**power for power in range(11))  # 1 to 1,024
MODELS_PER_RANK = (1, 4, 16)
SHARE = 0.1
LABEL = "simulated: a model of the time of a call, not measured"


def read(path: Path) -> Constants:
    """The constants that were stored as they were printed."""
    return Constants(**json.loads(path.read_text()))


def table(constants: Constants) -> str:
    """In Markdown: at how many ranks and models communication takes a tenth of a call."""
    lines = [
        "| models a rank | ranks | models | a call (ms) | broadcast (ms) | gather (ms) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for each in MODELS_PER_RANK:
        ranks = ranks_for(constants, share=SHARE, models_per_rank=each)
        if ranks is None:
            lines.append(f"| {each} | never | | | | |")
            continue
        at = call(constants, models=each * ranks, ranks=ranks)
        times = (at.whole_s, at.broadcast_s, at.gather_s)
        cells = [f"{each}", f"{ranks:,}", f"{each * ranks:,}"]
        cells += [f"{1e3 * seconds:.1f}" for seconds in times]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(constants: Constants, path: Path) -> None:
    """Models per second, and the share of communication, against ranks; one line a shard size."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.6, 4.4), layout="constrained")
        speed, share = figure.subplots(1, 2)
        for each, *look in zip(MODELS_PER_RANK, COLOURS, MARKS, DASHES, strict=False):
            name = f"{each} model{'s' if each > 1 else ''} a rank"
            calls = [call(constants, models=each * ranks, ranks=ranks) for ranks in RANKS]
            rates = [each * ranks / at.whole_s for ranks, at in zip(RANKS, calls, strict=True)]
            _line(speed, RANKS, rates, name, look)
            _line(share, RANKS[1:], [100 * at.communication for at in calls[1:]], name, look)
        share.axhline(100 * SHARE, color="black", linewidth=0.8)
        speed.set_ylabel("forwards of a model per second")
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
    colour, mark, dash = look
    axes.plot(ranks, values, label=name, color=colour, marker=mark, linestyle=dash, markersize=4)


if __name__ == "__main__":
    measured = read(Path(sys.argv[1]))
    draw(measured, Path(sys.argv[2]))
    print(table(measured), end="")
