"""A sweep over ranks that nobody has run: drawn from the model, and labelled so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from ensemble.distributed.model import Constants, call
from ensemble.report.pictures import COLOURS, DASHES, DPI, MARKS, STYLE

RANKS = tuple(2**power for power in range(11))  # 1 to 1,024
LABEL = "simulated: a model of the time of a call, not measured"


def draw(constants: Constants, models_per_rank: Sequence[int], path: Path) -> None:
    """Models per second, and the share of communication, against ranks; one line a shard size."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.6, 4.4), layout="constrained")
        speed, share = figure.subplots(1, 2)
        looks = zip(COLOURS, MARKS, DASHES, strict=False)
        for own, (colour, mark, dash) in zip(models_per_rank, looks, strict=False):
            calls = [call(constants, models=own * ranks, ranks=ranks) for ranks in RANKS]
            name = f"{own} model{'s' if own > 1 else ''} a rank"
            rates = [own * ranks / at.whole_s for ranks, at in zip(RANKS, calls, strict=True)]
            look = {"color": colour, "marker": mark, "linestyle": dash, "markersize": 4}
            speed.plot(RANKS, rates, label=name, **look)  # type: ignore[arg-type]
            shares = [100 * at.communication for at in calls]
            share.plot(RANKS[1:], shares[1:], label=name, **look)  # type: ignore[arg-type]
        share.axhline(10, color="black", linewidth=0.8)
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
