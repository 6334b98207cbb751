"""The constants of `model`, measured between the ranks of this machine, a line of JSON.

`torchrun --nproc_per_node 2 -m ensemble.distributed.constants`; with 4 ranks too, what each further
part of a gather costs is a half of the difference.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable

import torch

from ensemble.distributed import group, placing
from ensemble.distributed.group import Group
from ensemble.machine import launch
from ensemble.models import weights
from ensemble.options import parse

REPEATS, FORWARDS = 60, 30
LARGE_BYTES = 8 * 3 * 224 * 224 * 4  # a batch of 8
TIMEOUT_S = 60.0


def main() -> None:
    """Measure, and let rank 0 say what it found."""
    config = parse([])
    place = placing.find(config, local_rank=launch.local_rank(), local_ranks=launch.local_ranks())
    placing.pin(place)
    torch.set_num_threads(place.threads)
    joined = group.join(timeout_s=TIMEOUT_S)
    forwards = _forwards()
    step_s, large_s = (_broadcast(joined, size) for size in (1, LARGE_BYTES))
    found = {
        "ranks": joined.ranks,
        "model_s": statistics.median(forwards),
        "spread": statistics.stdev(map(math.log, forwards)),
        "step_s": step_s,
        "gather_s": _gather(joined),
        "bytes_per_s": LARGE_BYTES / (large_s - step_s),
    }
    joined.meet()
    if joined.rank == 0:
        print(json.dumps(found))
    group.leave()


def _forwards() -> list[float]:
    """Seconds of forwards of one ResNet-18 at 224 px, on all ranks at the same time."""
    (model,) = weights.random_models(1, arch="resnet18", device=torch.device("cpu"), seed=0)
    x = torch.zeros(1, 3, 224, 224)
    with torch.inference_mode():
        model(x)
        return [_seconds(lambda: model(x)) for _ in range(FORWARDS)]


def _broadcast(joined: Group, size: int) -> float:
    """From rank 0 until the last rank has said that it has all: a message of no size more."""
    content, answer = torch.zeros(size, dtype=torch.uint8), torch.zeros(1)

    def there_and_back() -> None:
        joined.broadcast(content)
        joined.add(answer)

    both, back = _median(joined, there_and_back), _median(joined, lambda: joined.add(answer))
    return max(both - back, 1e-7)


def _gather(joined: Group) -> float:
    own = torch.zeros(1)
    parts = list(torch.zeros(joined.ranks, 1)) if joined.rank == 0 else None
    return _median(joined, lambda: joined.gather(own, parts))


def _median(joined: Group, step: Callable[[], None]) -> float:
    """Of many, each of which begins when all are there."""
    times = []
    for _ in range(REPEATS):
        joined.meet()
        times.append(_seconds(step))
    return statistics.median(times)


def _seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
