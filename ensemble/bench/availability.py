"""What is known before a run starts: cases that cannot run here, and those that will be slow."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ensemble.bench.case import Case
from ensemble.bench.config import Config
from ensemble.bench.measurement import UNAVAILABLE, Measurement
from ensemble.machine import dtypes
from ensemble.machine.dtypes import numeric_format
from ensemble.strategies import STRATEGIES, find, peers

CUDA = "CUDA"  # as `Strategy.requires` has it


def unavailable(cases: Sequence[Case], config: Config, device: torch.device) -> list[Measurement]:
    """The cases that cannot run here, or cannot win, as is known without a process.

    A strategy that was named is measured, however slow; `--strategies all` alone does not measure
    one whose dtype the CPU emulates.
    """
    every = set(config.run.strategies) == set(STRATEGIES)
    found = []
    for case in cases:
        reason = _why_not(case, device) or (_why_slow(case, device) if every else "")
        found += [Measurement(case, UNAVAILABLE, reason)] if reason else []
    return found


def warnings(cases: Sequence[Case], device: torch.device) -> list[str]:
    """Which of the cases will take long, and why: a sentence each."""
    lines = []
    for name in dict.fromkeys(case.dtype for case in cases if _is_slow(case, device)):
        ratio = dtypes.slowdown(numeric_format(name).dtype)
        lines.append(
            f"Warning: this CPU emulates {name}: a convolution took {ratio:.1f} times as long as in"
            " float32; best and lowered_vmap compute in float32"
        )
    return lines


def _why_not(case: Case, device: torch.device) -> str:
    strategy = find(case.strategy)
    if strategy is not None and strategy.requires == CUDA and device.type != "cuda":
        return f"CUDA graphs require a CUDA device, got {device}"
    numbers = numeric_format(case.dtype)
    return numbers.why_not(device.type) or peers.why_not(case.strategy, numbers.dtype, device)


def _why_slow(case: Case, device: torch.device) -> str:
    if not _is_slow(case, device):
        return ""
    return f"the CPU emulates {case.dtype}: it cannot win; --strategies {case.strategy} measures it"


def _is_slow(case: Case, device: torch.device) -> bool:
    """Does a strategy compute in a dtype that the CPU emulates? Our kernels, and so `best`, do not:
    they compute in float32."""
    strategy = find(case.strategy)
    has_kernels = strategy is not None and strategy.has_kernels
    return not has_kernels and dtypes.is_emulated(numeric_format(case.dtype).dtype, device)
