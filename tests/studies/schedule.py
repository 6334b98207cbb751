"""How `lowered_vmap` would run on more cores than there are here: a simulation of its schedule.

`python -m tests.studies.schedule --measure` times, on one core of this machine, the part of every
step that a worker of a team of each size has, and writes tests/data/schedule/steps.json; without it
the figures are printed from that file. It simulates `ensemble.compiler.runtime.work_stealing`: how
models are distributed to cores, which of them are shared, and the barrier after each shared step.
It ignores that cores share memory and caches, so the times are those of a machine whose memory is
as fast for each core as it is here for one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

FILE = Path(__file__).parents[1] / "data" / "schedule" / "steps.json"
NETS = (("resnet18", 224), ("resnet18", 64), ("resnet50", 224))
MODELS, REPEATS = 4, 3  # more than one, so that no weights are left in a cache from the last time
SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)
BARRIER_S = 2e-6  # some 40 threads that spin on one line of the cache, by its transfers

TeamSize = Callable[[int, int], int]  # models left, cores -> threads for each


@dataclass(frozen=True)
class Measured:
    """Seconds of one model's steps: of a thread that has them alone, or of the slowest of a team.

    `team_s[size]` is the sum over the steps.
    """

    arch: str
    px: int
    steps: int
    team_s: dict[int, float]

    def seconds(self, size: int) -> float:
        """One model by a team; sizes in between as the next smaller one that was measured."""
        known = max(team for team in self.team_s if team <= size)
        return self.team_s[known] + (self.steps * BARRIER_S if size > 1 else 0.0)


def simulate(measured: Measured, num_models: int, cores: int, team_size: TeamSize) -> float:
    """Seconds of a call: whole rounds of a model a core, then teams, in rounds as well."""
    rounds, left = divmod(num_models, cores)
    total = rounds * measured.seconds(1)
    if left:
        size = team_size(left, cores)
        total += -(-left // (cores // size)) * measured.seconds(size)
    return total


def least(measured: Measured, num_models: int, cores: int) -> float:
    """The least that any dealing in rounds of equal teams takes, tried all the way."""
    best = [0.0]
    for count in range(1, num_models + 1):
        options = (
            best[max(0, count - cores // size)] + measured.seconds(size)
            for size in range(1, cores + 1)
        )
        best.append(min(options))
    return best[num_models]


def use(measured: Measured, num_models: int, cores: int, seconds: float) -> float:
    """The share of the cores' time that is spent as one core would spend it."""
    return num_models * measured.seconds(1) / (cores * seconds)


def read() -> list[Measured]:
    """What was measured."""
    return [
        Measured(**net | {"team_s": {int(size): s for size, s in net["team_s"].items()}})
        for net in json.loads(FILE.read_text())["nets"]
    ]


def page(nets: Sequence[Measured], team_size: TeamSize) -> str:
    """A table a net: milliseconds of a call, and the use of the cores, by N and C."""
    counts, cores = (1, 4, 6, 16), (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    lines = []
    for net in nets:
        lines.append(f"{net.arch}, {net.px} px: ms a call (use of the cores) on C cores")
        lines.append("   N" + "".join(f"{number:>13}" for number in cores))
        for count in counts:
            cells = []
            for number in cores:
                seconds = simulate(net, count, number, team_size)
                cells.append(f"{1e3 * seconds:.2f} ({use(net, count, number, seconds):.0%})")
            lines.append(f"{count:>4}" + "".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)


def measure(arch: str, px: int) -> Measured:
    """Time the first share of each step, which is the largest, as a thread of a team runs them."""
    import torch
    import torchvision
    from numba import njit

    from ensemble.compiler.pipeline import compile_vmapped
    from ensemble.compiler.runtime.program import Program
    from ensemble.compiler.runtime.work_stealing import execute as execute_one

    @njit(nogil=True, error_model="numpy")
    def execute(steps: Any, index: Any, model: Any, arena: Any, scratch: Any, parts: Any) -> None:
        execute_one(steps[index], model, arena, scratch, 0, parts)

    torch.manual_seed(0)
    torch.set_num_threads(1)
    models = [torchvision.models.get_model(arch).eval() for _ in range(MODELS)]
    x = torch.randn(1, 3, px, px)
    with torch.inference_mode():
        module = compile_vmapped(models, x, threads=1).forward
        (program,) = (part for part in module.modules() if isinstance(part, Program))
        module(x)
    steps = program._table.copy()
    (value,) = program.inputs
    held = program._bind_input(steps, value, x)
    results = [torch.empty(MODELS, *step.geometry.out_shape) for step in program._output_steps]
    for number, result in zip(program.outputs, results, strict=True):
        program._bind(steps, number, result, shared=False)
    team_s = {}
    for size in SIZES:
        totals = []
        for repeat in range(REPEATS * MODELS):
            total = 0
            for index in range(len(steps)):
                begin = time.perf_counter_ns()
                execute(
                    steps,
                    index,
                    repeat % MODELS,
                    program._arenas[0],
                    program._scratches[0],
                    size,
                )
                total += time.perf_counter_ns() - begin
            totals.append(total)
        team_s[size] = median(totals[MODELS:]) / 1e9  # the first calls compile and warm up
    del held
    return Measured(arch, px, len(steps), team_s)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help="time the shares on this machine")
    if parser.parse_args(argv).measure:
        nets = [measure(*net) for net in NETS]
        content: dict[str, Any] = {"made_with": "python -m tests.studies.schedule --measure"}
        content["nets"] = [asdict(net) for net in nets]
        FILE.write_text(json.dumps(content, indent=1) + "\n")
    from ensemble.compiler.runtime.work_stealing import team_size

    print(page(read(), team_size.py_func))


if __name__ == "__main__":
    main()
