# mypy: ignore-errors
# numba finds the types of these functions, from the arguments of `run`.
"""All models through all steps of a program, on all cores, with no Python in between.

Each model goes through all its steps on one core, so that its activations stay in that core's
cache; models left over when every core has had as many as the others are shared, step by step, by
all cores.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from ensemble import garbage
from ensemble.ops import operation, products, simd, taps, vectors
from ensemble.ops.kernels.kernel import LOCAL, STEP, ceil, jit, jit_within
from ensemble.ops.kernels.registry import KERNELS
from ensemble.ops.simd import fetch_add, give_way, load_shared, relax

SPINS = 512  # of some 40 cycles each, at a barrier before the core is offered to others

# Integers that the threads of a call share: what is told to leave, how many models were begun, and
# each team's arrivals at barriers.
STOP, BEGUN, ARRIVALS = range(3)


def _make_dispatch() -> Any:
    """`dispatch(step, ...)`: the body of the step's kernel, one branch for each."""
    arguments = "step, x, weight, bias, other, out, scratch, part, parts"
    lines, scope = [f"def dispatch({arguments}):"], {}
    for kind, kernel in KERNELS.items():
        scope[f"body_{kind.value}"] = kernel.body
        lines.append(f"    if step.kind == {kind.value}:")
        lines.append(f"        body_{kind.value}({arguments})")
    exec("\n".join(lines), scope)
    return scope["dispatch"]


@jit
def _address(base, stride, model, arena):
    return arena + base if stride == LOCAL else base + stride * model


_dispatch = jit_within(_make_dispatch())


@jit_within
def _execute(step, model, arena, scratch, part, parts):
    """One step of one model, or the share of it that is `part` of `parts`."""
    x = _address(step.x, step.x_stride, model, arena)
    out = _address(step.out, step.out_stride, model, arena)
    other = 0
    if step.other != 0 or step.other_stride == LOCAL:
        other = _address(step.other, step.other_stride, model, arena)
    weight = step.weight + step.weight_stride * model
    bias = step.bias + step.bias_stride * model
    _dispatch(step, x, weight, bias, other, out, scratch, part, parts)


@jit
def _wait(state, counter, arrivals):
    """Arrive, and spin until all have: steps are shorter than it takes to wake a thread.

    One that has no core of its own is let in after some microseconds. False where the call is over
    because one of its parts will not come.
    """
    fetch_add(counter, 1)
    spins = 0
    while load_shared(counter) < arrivals:
        if load_shared(state + 8 * STOP) != 0:
            return False
        spins += 1
        if spins % SPINS == 0:
            give_way()
        else:
            relax()
    return True


# Of a model's time, what a team does not share, and the most threads that still gain something: of
# ResNets, whose steps were timed part by part (tests/schedule.py).
UNSHARED, MOST_THREADS = 0.15, 8


@jit
def team_size(left, parts):
    """Threads for each of `left` models, fewer than threads, by which these take the least time:
    teams of that size take a model each, and then the next ones."""
    best, least = 1, float(left)
    for size in range(1, min(parts, MOST_THREADS) + 1):
        time = ceil(left, parts // size) * (UNSHARED + (1 - UNSHARED) / size)
        if time < least:
            best, least = size, time
    return best


@jit_within
def _take(steps, by_strips, arenas, scratches, state, model, part, size, team, arrivals):
    """One model through all steps, by a team of `size` threads: each step begins when all have
    arrived. By one (team -1) there is nobody to wait for, and its steps are by strips. The
    arrivals, or -1 where the call is over before its time."""
    table = by_strips if team < 0 else steps
    arena, member, members = arenas[part], 0, 1
    if team >= 0:
        arena, member, members = arenas[team * size], part % size, size
    for index in range(len(table)):
        if team >= 0:
            arrivals += size
            if not _wait(state, state + 8 * (ARRIVALS + team), arrivals):
                return -1
        _execute(table[index], model, arena, scratches[part], member, members)
    return arrivals


@jit_within
def _run(steps, by_strips, arenas, scratches, state, part, parts, num_models):
    """Take models through all steps until none is left: first each thread by itself; when fewer
    are left than threads, in teams that use the arena of their first member."""
    alone = num_models // parts * parts
    size = team_size(max(1, num_models - alone), parts)
    teams, team, arrivals = parts // size, part // size, 0
    model = fetch_add(state + 8 * BEGUN, 1)
    together = model >= alone
    if together:
        model = alone + team
    # A thread that no whole team is left for has nothing to share.
    while model < num_models and load_shared(state + 8 * STOP) == 0:
        if together and team >= teams:
            return
        teammates = team if together else -1
        arrivals = _take(
            steps, by_strips, arenas, scratches, state, model, part, size, teammates, arrivals
        )
        if arrivals < 0:
            return
        if together:
            model += teams
        else:
            model = fetch_add(state + 8 * BEGUN, 1)
            if model >= alone:
                model, together = alone + team, True


def _make_run(sources: str) -> Any:
    """`run`, compiled once and kept on disk as long as `sources` stay what they are.

    numba by itself would only ask whether this file has changed; it does ask for what a function
    closes over: a text alone, since a compiled function is another in each process.
    """

    def run(steps, by_strips, arenas, scratches, state, part, parts, num_models):
        """All models through all steps; called once by each of `parts` threads.

        by_strips: the steps for one thread by itself, see `ensemble.ops.strips`. arenas, scratches:
        an address for each part. state: the address of `ARRIVALS + parts` integers that are 0 when
        the first part starts. Once STOP is not 0 every part leaves early.
        """
        sources  # noqa: B018
        _run(steps, by_strips, arenas, scratches, state, part, parts, num_models)

    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(run)
    except RuntimeError:  # no folder that numba could write its cache to
        return njit(**options)(run)


# Every file that the code comes from.
_FILES = [Path(str(module.__file__)) for module in (simd, products, taps, operation, vectors)]
_FILES += sorted(Path(__file__).parent.glob("*.py"))
run = _make_run(hashlib.sha256(b"".join(file.read_bytes() for file in _FILES)).hexdigest())


def load() -> None:
    """Have `run` in this process: compiled, once per installation, or read from the disk."""
    if not run.signatures:
        steps, addresses = np.zeros(0, STEP), np.zeros(1, np.int64)
        state = np.zeros(ARRIVALS + 1, np.int64)
        with garbage.not_collected():
            run(steps, steps, addresses, addresses, state.ctypes.data, 0, 1, 0)  # of no model
