"""Strategies of one process on one of torchvision's architectures, timed in rounds."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from ensemble import strategies
from ensemble.machine.timing import interleaved
from ensemble.models import stacking
from ensemble.models.vision import torchvision
from ensemble.strategies.agreement import TOLERANCES, check
from ensemble.strategies.build_result import BuildResult, Choice

Times = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Timed:
    """A time of each strategy in each round, why others are not there, and what `best` picked."""

    times_s: Times
    out: Mapping[str, str]
    choice: Choice


def timed(
    names: Sequence[str],
    arch: str,
    px: int,
    num_models: int,
    *,
    rounds: int,
    seconds: float,
    dtype: torch.dtype = torch.float32,
) -> Timed:
    """Build each of `names` (`best` among them), compare it with the loop in float32, and time all
    in rounds: at least so many, and for so long. Models are drawn at random, the image is one for
    all."""
    torch.manual_seed(0)
    models = [
        torchvision.models.get_model(arch, weights=None).eval().requires_grad_(False)
        for _ in range(num_models)
    ]
    x = torch.randn(1, 3, px, px)
    reference = strategies.build_unverified("loop", models, x).forward(x)
    if dtype != x.dtype:
        models, x = stacking.cast(models, dtype), x.to(dtype)
    rows: dict[str, BuildResult] = {}
    out: dict[str, str] = {}
    for name in names:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of vmap without a rule, of compilers
                built = strategies.build_unverified(name, models, x)
                logits = built.forward(x)
            problem = check(logits, reference, tolerance=TOLERANCES[x.dtype]).problem
        except Exception as error:
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        if problem:
            out[name] = problem
        else:
            rows[name] = built
    choice = rows["best"].choice
    assert choice is not None
    samples = interleaved(
        [partial(built.forward, x) for built in rows.values()],
        warmup=1,
        min_rounds=rounds,
        min_seconds=seconds,
        synchronize=lambda: None,
    )
    taken = [[sample.seconds for sample in each] for each in samples]
    return Timed(dict(zip(rows, map(list, zip(*taken, strict=True)), strict=True)), out, choice)


def times_as_fast(times_s: Times, name: str, other: str) -> float:
    """How fast `name` is in times of `other`: the median of the rounds."""
    pairs = zip(times_s[other], times_s[name], strict=True)
    return median(theirs / ours for theirs, ours in pairs)
