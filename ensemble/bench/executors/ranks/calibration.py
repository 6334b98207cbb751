"""Measure the constants of the cost model between two ranks; prints one line of JSON.

`torchrun --nproc_per_node 2 -m ensemble.bench.executors.ranks.calibration`
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from ensemble.bench.cli import parse
from ensemble.bench.executors.ranks import group, placement
from ensemble.bench.executors.ranks.cost_model import (
    CHANNELS,
    FLOAT_BYTES,
    PX,
    Constants,
)
from ensemble.bench.executors.ranks.group import Group
from ensemble.machine import launch
from ensemble.models import weights

REPEATS = 200  # of a round trip
MODELS, FORWARDS = 4, 25  # more weights than any cache holds; forwards per model
LARGE_BYTES = 8 * CHANNELS * PX * PX * FLOAT_BYTES  # a batch of 8
MANY = 64  # messages in flight at once, as at the end of a gather
TIMEOUT_S = 60.0


def main() -> None:
    """Measure, and print the constants on rank 0."""
    config = parse([])
    joined = group.init_group(timeout_s=TIMEOUT_S)
    place = placement.resolve(
        config.run, local_rank=launch.local_rank(), local_ranks=launch.local_world_size()
    )
    placement.pin(place)
    torch.set_num_threads(place.threads)
    constants = measure(joined)
    if joined.rank == 0:
        print(json.dumps(asdict(constants)))
    group.destroy_group()


def measure(joined: Group) -> Constants:
    """From round trips between ranks 0 and 1 (ping-pong), as Hockney does."""
    forwards = _forwards(joined)
    zeros = partial(torch.zeros, device="cpu", dtype=torch.float32)
    empty, large = zeros(1), zeros(LARGE_BYTES // FLOAT_BYTES)
    small_s, large_s = (_median(joined, _ping_pong(joined, [x])) / 2 for x in (empty, large))
    many_s = _median(joined, _ping_pong(joined, list(zeros(MANY, 1)))) / 2
    return Constants(
        model_s=statistics.median(forwards),
        spread=statistics.stdev(map(math.log, forwards)),
        step_s=small_s,
        part_s=(many_s - small_s) / (MANY - 1),
        bytes_per_s=LARGE_BYTES / (large_s - small_s),
    )


def _forwards(joined: Group) -> list[float]:
    """Seconds of forwards of several ResNet-18 at 224 px, on both ranks at the same time."""
    models = weights.random_models(MODELS, arch="resnet18", device=torch.device("cpu"), seed=0)
    x = torch.zeros(1, CHANNELS, PX, PX, device="cpu", dtype=torch.float32)
    with torch.inference_mode():
        for model in models:
            model(x)
        joined.barrier()
        return [_seconds(partial(model, x)) for _ in range(FORWARDS) for model in models]


def _ping_pong(joined: Group, contents: Sequence[Tensor]) -> Callable[[], None]:
    def step() -> None:
        if joined.rank == 0:
            joined.send(contents, 1)
            joined.receive(contents, 1)
        else:
            joined.receive(contents, 0)
            joined.send(contents, 0)

    return step


def _median(joined: Group, step: Callable[[], None]) -> float:
    """The median over many round trips, each after a barrier."""
    times = []
    for _ in range(REPEATS):
        joined.barrier()
        times.append(_seconds(step))
    return statistics.median(times)


def _seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
