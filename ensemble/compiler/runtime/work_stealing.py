# mypy: ignore-errors
# numba infers the types of these functions from the arguments of `run`.
"""The scheduler: all steps of all models on all cores, by work stealing, with no Python in between.

Each worker takes models one by one and runs all steps of a model on its core, so that activations
stay in that core's cache. A worker that finds no model left becomes a thief: it joins the model of
a worker that is still busy, a victim that a slower core or another program has delayed. Models left
over after whole rounds are shared by teams from their first step on. A step of a shared model is
split into parts, which the team's workers claim one by one; nobody waits for a worker that has
claimed none, since its core may be busy with another program.
"""

from typing import Any

import numpy as np

from ensemble.compiler.codegen.simd import fetch_add, fetch_or, load_shared, relax, yield_core
from ensemble.compiler.kernels.kernel import IN_ARENA, ceil, jit, jit_inline
from ensemble.compiler.kernels.registry import KERNELS

SPINS = 512  # of some 40 cycles each, before a waiting worker yields its core

# The shared state of a call, in int64: whether to stop, and how many models have been taken;
STOP, TAKEN, _WORKERS = range(3)
# per worker, how many thieves have joined, from CLOSED on if it is too late to join, and what the
# victim has published for them;
_THIEVES, _PUBLISHED, _PER_WORKER = range(3)
# per shared model, how many workers have arrived, whose arena it uses, how many parts are done, and
# for each step a bit mask of the parts that are claimed. At most one model per worker is stolen
# from, and fewer models than workers are left over.
_ARRIVED, _LEADER, _DONE, _CLAIMED = range(4)
_CLOSED = 1 << 32


def new_state(workers: int, steps: int) -> np.ndarray:
    """The shared state before a call, of a program of at most so many steps."""
    return np.zeros(_WORKERS + workers * (_PER_WORKER + 2 * (_CLAIMED + steps)), np.int64)


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
    return arena + base if stride == IN_ARENA else base + stride * model


_dispatch = jit_inline(_make_dispatch())


@jit_inline
def execute(step, model, arena, scratch, part, parts):
    """One part of `parts` of a step of one model."""
    x = _address(step.x, step.x_stride, model, arena)
    out = _address(step.out, step.out_stride, model, arena)
    other = 0
    if step.other != 0 or step.other_stride == IN_ARENA:
        other = _address(step.other, step.other_stride, model, arena)
    weight = step.weight + step.weight_stride * model
    bias = step.bias + step.bias_stride * model
    _dispatch(step, x, weight, bias, other, out, scratch, part, parts)


@jit
def _worker_state(state, worker):
    """The address of a worker's integers."""
    return state + 8 * (_WORKERS + _PER_WORKER * worker)


@jit
def _shared_model_state(state, workers, steps, number):
    """The address of a shared model's integers: first those stolen from each worker, then those
    left over."""
    return state + 8 * (_WORKERS + _PER_WORKER * workers + (_CLAIMED + steps) * number)


@jit
def _spin_until(state, counter, count):
    """Spin until a counter reaches a count: a step takes less time than waking a thread.

    A worker yields its core now and then. False if the call has stopped.
    """
    spins = 0
    while load_shared(counter) < count:
        if load_shared(state + 8 * STOP) != 0:
            return False
        spins += 1
        if spins % SPINS == 0:
            yield_core()
        else:
            relax()
    return True


# The serial fraction of a model's time, and the largest team that still gains: for ResNets, whose
# steps were timed part by part (tests/studies/schedule.py).
SERIAL_FRACTION, MAX_TEAM = 0.15, 8
_SIZES = MAX_TEAM + 1  # the number of team sizes, with 0


@jit
def team_size(left, workers):
    """The team size by which `left` models, fewer than workers, take the least time (Amdahl's law).

    Each team takes a model, then the next one.
    """
    best, least = 1, float(left)
    for size in range(1, min(workers, MAX_TEAM) + 1):
        time = ceil(left, workers // size) * (SERIAL_FRACTION + (1 - SERIAL_FRACTION) / size)
        if time < least:
            best, least = size, time
    return best


@jit
def _distribute(num_models, workers):
    """How many models run on one worker each, and the team size for the models left over."""
    alone = num_models // workers * workers
    size = team_size(max(1, num_models - alone), workers)
    return (num_models if size == 1 else alone), size


@jit
def _has_thieves(state, worker):
    """Has a thief joined this worker?"""
    return load_shared(_worker_state(state, worker) + 8 * _THIEVES) != 0


@jit
def _publish(state, worker, steps, model, index):
    """Close this worker to further thieves, and publish to those that have joined the model and the
    step to start from; `steps` if it is too late. Returns the team size."""
    own = _worker_state(state, worker)
    thieves = fetch_add(own + 8 * _THIEVES, _CLOSED)
    if not 0 < thieves < _CLOSED:
        return 1
    size = min(thieves + 1, MAX_TEAM)
    fetch_add(own + 8 * _PUBLISHED, (model * (steps + 1) + index) * _SIZES + size)
    return size


@jit
def _steal(state, victim, steps):
    """Join a victim and wait for what it publishes: the model, the step to start from, the team
    size, and the part that this thief prefers; that is 0 if it is too late."""
    theirs, preferred = _worker_state(state, victim), 0
    if load_shared(theirs + 8 * _THIEVES) < MAX_TEAM - 1:
        preferred = fetch_add(theirs + 8 * _THIEVES, 1) + 1
    if not 0 < preferred < _CLOSED or not _spin_until(state, theirs + 8 * _PUBLISHED, 1):
        return 0, 0, 1, 0
    place, size = divmod(load_shared(theirs + 8 * _PUBLISHED), _SIZES)
    model, index = divmod(place, steps + 1)
    return model, index, size, (preferred if index < steps and preferred < size else 0)


@jit
def _join_team(state, shared, worker):
    """Share a model from its first step on: the worker whose arena it uses, which is the first to
    arrive, and the part that this worker prefers. The leader is -1 if the call has stopped."""
    preferred = fetch_add(shared + 8 * _ARRIVED, 1)
    if preferred == 0:
        fetch_add(shared + 8 * _LEADER, worker + 1)
    _spin_until(state, shared + 8 * _LEADER, 1)
    return load_shared(shared + 8 * _LEADER) - 1, preferred


@jit
def _claim_part(claimed, preferred, size):
    """Claim a part of a step, the preferred one first, whose data is in this core's cache; `size`
    if all are claimed."""
    for distance in range(size):
        part = (preferred + distance) % size
        bit = 1 << part
        if load_shared(claimed) & bit == 0 and fetch_or(claimed, bit) & bit == 0:
            return part
    return size


@jit_inline
def _run_model(table, first, model, arena, scratch, state, shared, worker, preferred, size):
    """A model from a step on. In a team of `size` workers each claims parts of a step, and the next
    step starts when all parts are done; a worker alone runs whole steps until thieves join. False
    if the call has stopped."""
    index, part = first, 0
    while index < len(table):
        if size == 1 and _has_thieves(state, worker):
            first, size = index, _publish(state, worker, len(table), model, index)
        if size > 1:
            part = _claim_part(shared + 8 * (_CLAIMED + index), preferred, size)
            if part == size:
                index += 1
                if not _spin_until(state, shared + 8 * _DONE, (index - first) * size):
                    return False
                continue
        execute(table[index], model, arena, scratch, part, size)
        if size > 1:
            fetch_add(shared + 8 * _DONE, 1)
        else:
            index += 1
    return True


# The phases of a worker: its own models, then stealing, then teams for the models left over.
_ALONE, _STEALING, _IN_TEAM = range(3)


@jit_inline
def work(table, tiled_table, arenas, scratches, state, worker, workers, num_models):
    """Run models until none is left; see the module.

    A task is a model from its step `first` on, in the arena of the worker `leader`, by a team of
    `size` workers, of which this one claims the part `preferred` before others.
    """
    alone, members = _distribute(num_models, workers)
    teams, team = workers // members, worker // members
    phase, victim, rounds = _ALONE, worker, 0
    while load_shared(state + 8 * STOP) == 0:
        steps, first, size, preferred, leader, number = tiled_table, 0, 1, 0, worker, worker
        if phase == _ALONE:
            model = fetch_add(state + 8 * TAKEN, 1)
            if model >= alone:
                _publish(state, worker, len(steps), 0, len(steps))
                phase = _STEALING if alone > 0 else _IN_TEAM
                continue
        elif phase == _STEALING:
            leader = number = victim = (victim + 1) % workers
            if victim == worker:
                phase = _IN_TEAM
                continue
            model, first, size, preferred = _steal(state, victim, len(steps))
            if preferred == 0:
                continue
        else:
            left, rounds = team + teams * rounds, rounds + 1
            steps, size, model, number = table, members, alone + left, workers + left
            if team >= teams or model >= num_models:
                return
        shared = _shared_model_state(state, workers, len(tiled_table), number)
        if phase == _IN_TEAM:
            leader, preferred = _join_team(state, shared, worker)
            if leader < 0:
                return
        arena, scratch = arenas[leader], scratches[worker]
        if not _run_model(
            steps, first, model, arena, scratch, state, shared, worker, preferred, size
        ):
            return
