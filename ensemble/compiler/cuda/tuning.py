"""The autotuner of tiles: each candidate is timed on the device, and the choice kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ensemble.compiler.cuda.problem import ConvProblem
from ensemble.compiler.cuda.tiles import Tile, candidate_tiles
from ensemble.errors import first_line
from ensemble.files import write_atomically
from ensemble.machine import cuda_graphs

# Launches in a graph, which Python's cost of a launch does not slow; the fastest replay counts.
LAUNCHES, REPLAYS = 10, 3

Run = Callable[[Tile], Tensor]  # the convolution of one problem


class TileTuner:
    """Selects the tile of each problem: from the disk, by timing, or the default.

    Without a CUDA device, and once the budget is exhausted, it is the default tile.
    """

    def __init__(
        self,
        seconds: float,
        *,
        folder: Path | None = None,
        clock: Callable[[], float] = time.perf_counter,
        time_tile: Callable[[Run, Tile], float] | None = None,
    ) -> None:
        """seconds: autotuning budget; folder: of the choices on disk, by default the user's cache;
        time_tile: the seconds of a launch, by default on the current CUDA device."""
        self._clock, self._deadline = clock, clock() + seconds
        self._folder = folder or default_folder()
        self._time_tile = time_tile
        self.skipped = 0  # problems that took the default, for lack of time
        self.errors: list[str] = []  # of tiles that do not run

    def select(self, problem: ConvProblem, device: torch.device, run: Run) -> Tile:
        """The tile of a problem.

        Raises:
            Exception: no tile runs; the error of the default one.
        """
        from ensemble.compiler.cuda import launch  # Triton may not be installed

        tiles = candidate_tiles(problem, launch.limits_of(device))
        time_tile = self._time_tile or (seconds_per_launch if device.type == "cuda" else None)
        if time_tile is None or len(tiles) == 1:
            return tiles[0]
        path = self._folder / f"{_key(problem, device)}.json"
        if (known := _read(path)) in tiles:
            return known
        if self._clock() > self._deadline:
            self.skipped += 1
            return tiles[0]
        times: dict[Tile, float] = {}
        failures: list[Exception] = []
        for tile in tiles:
            try:
                times[tile] = time_tile(run, tile)
            except Exception as error:  # too large for this device after all
                failures.append(error)
        if not times:
            raise failures[0]
        self.errors += map(first_line, failures)
        best = min(times, key=times.__getitem__)
        _write(path, best)
        return best


def default_folder() -> Path:
    """Where choices are kept: the user's cache, see the XDG base directory specification."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "resnet-vmap" / "tiles"


def seconds_per_launch(run: Run, tile: Tile) -> float:
    """The time of a launch on the current CUDA device: the fastest replay of a graph of several."""

    def launches() -> None:
        for _ in range(LAUNCHES):
            run(tile)

    device = torch.device("cuda", torch.cuda.current_device())
    graph, _ = cuda_graphs.capture(launches, device, warmup=1)
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / LAUNCHES)
    return min(times)


def _key(problem: ConvProblem, device: torch.device) -> str:
    """What a choice depends on: the problem, the device, and the compiler."""
    import triton  # may not be installed, or by a package of another name

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    content = repr((problem, name, triton.__version__, torch.version.cuda))
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _read(path: Path) -> Tile | None:
    """The tile in a file, None if there is none that can be read."""
    try:
        values: Any = json.loads(path.read_text())
        return Tile(**values)
    except (OSError, ValueError, TypeError):
        return None


def _write(path: Path, tile: Tile) -> None:
    """Keep a tile. If the disk cannot be written, every start tunes again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(tile)))
