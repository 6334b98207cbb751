# mypy: ignore-errors
# numba finds the types of these functions, from the arguments of `run`.
"""All models through all steps of a program, on all cores, with no Python in between.

Each model goes through all its steps on one core, so that its activations stay in that core's
cache. A thread that finds no model left helps one that is still at its own, which a slower core
or another program has held up. Models left over when every core has had as many as the others are
shared so from their first step on. Who is there takes the next share of a step, and nobody waits
for a thread that has taken none: its core may be another program's.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from ensemble import gc_pause
from ensemble.compiler.codegen import depthwise, gemm, simd
from ensemble.compiler.codegen.simd import (
    fetch_add,
    fetch_or,
    give_way,
    load_shared,
    relax,
)
from ensemble.compiler.kernels.bounds import mark
from ensemble.compiler.kernels.kernel import (
    LOCAL,
    STEP,
    ceil,
    jit,
    jit_within,
)
from ensemble.compiler.kernels.registry import KERNELS
from ensemble.compiler.planning import operation, vector_layout

SPINS = 512  # of some 40 cycles each, before a thread that waits offers its core to others

# Integers that the threads of a call share: what is told to leave, how many models were begun;
STOP, BEGUN, _THREADS = range(3)
# of each thread how many have asked to help it, or CLOSED and more where it is too late, and what
# it has told them;
_ASKED, _TOLD, _OF_THREAD = range(3)
# of each model that several share how many have come, whose arena it lies in, how many shares of
# its steps are done, and which of each step are taken, a bit for each. At most one model of each
# thread is helped, and fewer models than threads are left over.
_CAME, _LEADER, _DONE, _TAKEN = range(4)
_CLOSED = 1 << 32


def new_state(parts: int, steps: int) -> np.ndarray:
    """What the threads of a call share, before it; of a program of at most so many steps."""
    return np.zeros(_THREADS + parts * (_OF_THREAD + 2 * (_TAKEN + steps)), np.int64)


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
def _of_thread(state, part):
    """Where a thread's integers begin."""
    return state + 8 * (_THREADS + _OF_THREAD * part)


@jit
def _of_shared(state, parts, steps, number):
    """Where the integers of a shared model begin: first of those of each thread, then of others."""
    return state + 8 * (_THREADS + _OF_THREAD * parts + (_TAKEN + steps) * number)


@jit
def _until(state, counter, count):
    """Spin until a counter has come so far: steps are shorter than it takes to wake a thread.

    One that has no core of its own is let in after some microseconds. False where the call is over
    because one of its parts will not come.
    """
    spins = 0
    while load_shared(counter) < count:
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
_SIZES = MOST_THREADS + 1  # how many can share a model, of none to all of these


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


@jit
def _deal(num_models, parts):
    """How many models are taken by one thread each, and how many threads share each of the rest."""
    alone = num_models // parts * parts
    size = team_size(max(1, num_models - alone), parts)
    return (num_models if size == 1 else alone), size


@jit
def _is_asked(state, part):
    """Has another thread asked to help this one?"""
    return load_shared(_of_thread(state, part) + 8 * _ASKED) != 0


@jit
def _close(state, part, steps, model, index):
    """Let nobody ask this thread for help any more, and tell those who have at which model, and
    from which step on, they can: behind the last one where it is too late. How many share it."""
    integers = _of_thread(state, part)
    asked = fetch_add(integers + 8 * _ASKED, _CLOSED)
    if not 0 < asked < _CLOSED:
        return 1
    size = min(asked + 1, MOST_THREADS)
    fetch_add(integers + 8 * _TOLD, (model * (steps + 1) + index) * _SIZES + size)
    return size


@jit
def _help(state, owner, steps):
    """Ask a thread whether it can be helped, and wait for what it tells: at which model, from which
    step on, how many share it, and which share is this one's; it is too late where that is 0."""
    integers, mine = _of_thread(state, owner), 0
    if load_shared(integers + 8 * _ASKED) < MOST_THREADS - 1:
        mine = fetch_add(integers + 8 * _ASKED, 1) + 1
    if not 0 < mine < _CLOSED or not _until(state, integers + 8 * _TOLD, 1):
        return 0, 0, 1, 0
    place, size = divmod(load_shared(integers + 8 * _TOLD), _SIZES)
    model, index = divmod(place, steps + 1)
    return model, index, size, (mine if index < steps and mine < size else 0)


@jit
def _come(state, shared, part):
    """Share a model from its first step on: in whose arena it lies, that of the one who came first,
    and which share is this one's. None is where the call is over."""
    mine = fetch_add(shared + 8 * _CAME, 1)
    if mine == 0:
        fetch_add(shared + 8 * _LEADER, part + 1)
    _until(state, shared + 8 * _LEADER, 1)
    return load_shared(shared + 8 * _LEADER) - 1, mine


@jit
def _next_share(taken, mine, size):
    """Take a share that nobody has, its own one first, whose data lies in its cache; `size` where
    there is none."""
    for distance in range(size):
        share = (mine + distance) % size
        bit = 1 << share
        if load_shared(taken) & bit == 0 and fetch_or(taken, bit) & bit == 0:
            return share
    return size


@jit_within
def _take(table, first, model, arena, scratch, state, shared, part, mine, size):
    """A model through the steps from the first on. By `size` threads each takes shares of a step,
    which begins when all shares of the one before are done; one by itself takes whole steps, till
    others ask to help. False where the call is over before its time."""
    index, share = first, 0
    while index < len(table):
        if size == 1 and _is_asked(state, part):
            first, size = index, _close(state, part, len(table), model, index)
        if size > 1:
            share = _next_share(shared + 8 * (_TAKEN + index), mine, size)
            if share == size:
                index += 1
                if not _until(state, shared + 8 * _DONE, (index - first) * size):
                    return False
                continue
        _execute(table[index], model, arena, scratch, share, size)
        if size > 1:
            fetch_add(shared + 8 * _DONE, 1)
        else:
            index += 1
    return True


# What a thread does: models by itself, then a part of others' models, then of those left over.
_ALONE, _HELPING, _TOGETHER = range(3)


@jit_within
def _run(steps, by_strips, arenas, scratches, state, part, parts, num_models):
    """Take models through all steps until none is left; see the module.

    A task is a model from its step `first` on, of which `size` threads take shares, this one its
    own share, `mine`, before others; in the arena of one of them, `leader`.
    """
    alone, members = _deal(num_models, parts)
    teams, team = parts // members, part // members
    doing, other, rounds = _ALONE, part, 0
    while load_shared(state + 8 * STOP) == 0:
        table, first, size, mine, leader, number = by_strips, 0, 1, 0, part, part
        if doing == _ALONE:
            model = fetch_add(state + 8 * BEGUN, 1)
            if model >= alone:
                _close(state, part, len(table), 0, len(table))
                doing = _HELPING if alone > 0 else _TOGETHER
                continue
        elif doing == _HELPING:
            leader = number = other = (other + 1) % parts
            if other == part:
                doing = _TOGETHER
                continue
            model, first, size, mine = _help(state, other, len(table))
            if mine == 0:
                continue
        else:
            left, rounds = team + teams * rounds, rounds + 1
            table, size, model, number = steps, members, alone + left, parts + left
            if team >= teams or model >= num_models:
                return
        shared = _of_shared(state, parts, len(by_strips), number)
        if doing == _TOGETHER:
            leader, mine = _come(state, shared, part)
            if leader < 0:
                return
        arena, scratch = arenas[leader], scratches[part]
        if not _take(table, first, model, arena, scratch, state, shared, part, mine, size):
            return


def _make_run(sources: str) -> Any:
    """`run`, compiled once and kept on disk as long as `sources` stay what they are.

    numba by itself would only ask whether this file has changed; it does ask for what a function
    closes over: a text alone, since a compiled function is another in each process.
    """

    def run(steps, by_strips, arenas, scratches, state, part, parts, num_models):
        """All models through all steps; called once by each of `parts` threads.

        by_strips: the steps for one thread by itself, see `planning.row_tiling`. arenas, scratches:
        an address for each part. state: the address of `new_state`; once STOP is not 0 in it every
        part leaves early.
        """
        sources  # noqa: B018
        _run(steps, by_strips, arenas, scratches, state, part, parts, num_models)

    return _on_disk(run)


def _make_mark_large(sources: str) -> Any:
    """`mark_large`, kept as `run` is: see `bounds.mark`."""

    def mark_large(values, images, pixels, channels, real, marks):
        sources  # noqa: B018
        mark(values, images, pixels, channels, real, marks)

    return _on_disk(mark_large)


def _on_disk(function: Any) -> Any:
    """Compiled by numba, and kept on disk."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder that numba could write its cache to
        return njit(**options)(function)


# Every file that the code comes from.
_FILES = [
    Path(str(module.__file__)) for module in (simd, gemm, depthwise, operation, vector_layout)
]
_FILES += sorted(Path(__file__).parent.glob("*.py"))
_SOURCES = hashlib.sha256(b"".join(file.read_bytes() for file in _FILES)).hexdigest()
run, mark_large = _make_run(_SOURCES), _make_mark_large(_SOURCES)


def load() -> None:
    """Have both in this process: compiled, once per installation, or read from the disk."""
    if not run.signatures:
        steps, addresses, state = np.zeros(0, STEP), np.zeros(1, np.int64), new_state(1, 0)
        with gc_pause.paused():
            run(steps, steps, addresses, addresses, state.ctypes.data, 0, 1, 0)  # of no model
            mark_large(0, 0, 0, 0, 0, np.zeros(0, np.uint8))
