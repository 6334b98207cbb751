"""What a run asks for and leaves behind: frozen records. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ensemble.statistics import (
    TOO_NOISY,
    TOO_WIDE,
    bootstrap_interval,
    half_width,
    interval_of_processes,
    iqr,
    median,
)

REFERENCE = "loop"  # in float32
SELF_CHECK = "self_check"  # the reference against itself: the noise floor of this program
# Share of the CPU that other programs may take before a row is warned of, and before its speedup is
# not claimed: threads that wait for each other lose whole time slices to a third. Beside a program
# that kept one of two cores busy, a loop of many short kernels once took 200 times one long call.
BUSY, TOO_BUSY = 0.05, 0.25
# How much the fastest calls of strategy and reference must differ for that to be said all the same.
# Other programs disturb some calls a lot and the fastest ones least: see measure/README.md.
FAR = 5.0
MACHINE_BUSY = "machine busy"


@dataclass(frozen=True)
class Environment:
    """Where and with what the numbers were taken. Unknown is None."""

    date: str
    argv: tuple[str, ...]
    git_commit: str | None
    platform: str
    python: str
    torch: str
    torchvision: str
    device: str
    device_name: str | None
    cpu_capability: str
    cores: int | None
    threads: int
    tf32: bool
    cudnn_benchmark: bool
    allocator: str
    page_fault_s: float | None
    weights: str
    first_forward_s: float  # of one model, the very first forward of the process
    # Of a run over ranks of torchrun, by rank; None in a plain start.
    ranks: int | None = None
    backend: str | None = None  # what moves tensors between them: gloo or nccl
    hosts: tuple[str, ...] | None = None
    rank_devices: tuple[str, ...] | None = None
    usable_cores: float | None = None  # fewer than `cores` by affinity, or by a quota of CPU time


@dataclass(frozen=True)
class Case:
    """What a row measures: one strategy in one place of the grid."""

    strategy: str
    num_models: int
    batch_size: int
    image_size: int
    dtype: str
    inputs: str

    @property
    def cell(self) -> tuple[int, int, int]:
        """Where in the grid: (N, batch, px). Its rows share models, images and reference."""
        return self.num_models, self.batch_size, self.image_size

    @property
    def line(self) -> tuple[str, str, int, int]:
        """The case without its N, (strategy, dtype, batch, px): one line of a picture."""
        return self.strategy, self.dtype, self.batch_size, self.image_size

    @property
    def is_reference(self) -> bool:
        return self.strategy == REFERENCE and self.dtype == "float32"

    @property
    def is_self_check(self) -> bool:
        return self.strategy == SELF_CHECK


@dataclass(frozen=True)
class LoadRun:
    """One run of the referee. Latencies count from the scheduled arrival, of answered requests.

    A percentile that the requests are too few for is None, as is all else that is unknown.
    """

    purpose: str  # search, confirm, curve; asked, where one rate or scenario was
    offered_qps: float | None  # None where the scenario offers no rate
    seed: int
    seconds: float
    requests: int
    answered: int
    refused: int
    failed: int
    p50_s: float | None
    p90_s: float | None
    p99_s: float | None
    tail_s: float | None  # at the percentile that was asked for
    longest_s: float | None
    valid: bool  # by the referee's rules
    why_not: str | None
    problem: str | None = None  # why the row fails: a forward raised, or answers were wrong
    mean_batch: float | None = None
    wasted_share: float | None = None  # of the computed images, those that nobody asked for
    cpu_s_per_request: float | None = None
    overhead_s: float | None = None  # what this program adds to the forwards, for each request
    most_waiting: int | None = None
    memory_growth_bytes: int | None = (
        None  # of this process, while it served: from its first second on
    )
    late_issue_s: float | None = None  # how late the referee told of an arrival, at worst

    @property
    def rate_qps(self) -> float | None:
        """Offered, or else what was done."""
        if self.offered_qps is not None:
            return self.offered_qps
        return self.answered / self.seconds if self.seconds else None


@dataclass(frozen=True)
class Load:
    """What one process found under load. `percentile` is 0 to 100; a bound has the server alone."""

    scenario: str
    percentile: float
    bound_s: float | None
    runs: tuple[LoadRun, ...]

    @property
    def shown(self) -> LoadRun | None:
        """The run that counts: valid and confirmed or asked for; else the last of these."""
        counted = [run for run in self.runs if run.purpose in ("confirm", "asked")] or self.runs
        held = [run for run in counted if run.valid]
        if held:
            return max(held, key=lambda run: run.rate_qps or 0.0)
        return counted[-1] if counted else None

    @property
    def held_qps(self) -> float | None:
        """The rate that is held, or of the other scenarios done; None where no run is valid."""
        shown = self.shown
        return shown.rate_qps if shown is not None and shown.valid else None


@dataclass(frozen=True)
class Process:
    """What one fresh start of the program measured of a case. Unknown is None.

    `times_s` and `reference_times_s` are pairs, in their order; the reference's own row has none.
    The last four are rounds that tell apart what a call over ranks consists of: the whole call, in
    it the forward of the rank that took longest, that of the slowest shard while all others rest,
    and all models on one rank.
    """

    times_s: tuple[float, ...]
    reference_times_s: tuple[float, ...]
    build_s: float | None = None
    first_call_s: float | None = None
    peak_memory_bytes: int | None = None
    tune_s: float | None = None  # of build_s, to choose among strategies; None where nothing was
    page_faults_per_call: float | None = None
    reference_page_faults_per_call: float | None = None
    others_cpu_share: float | None = None
    load: Load | None = None
    whole_s: tuple[float, ...] = ()
    forward_s: tuple[float, ...] = ()
    alone_s: tuple[float, ...] = ()
    one_rank_s: tuple[float, ...] = ()

    @property
    def ratios(self) -> tuple[float, ...]:
        """Reference time / strategy time of each pair."""
        pairs = zip(self.reference_times_s, self.times_s, strict=False)
        return tuple(reference / time for reference, time in pairs)

    @cached_property
    def speedup(self) -> float | None:
        """The median of the ratios."""
        return median(self.ratios)


@dataclass(frozen=True)
class Result:
    """A case with what came of it. Raw times are stored, statistics derived from them.

    `status` is `ok`, `failed` (it broke, or its outputs disagree) or `unavailable` (it cannot run
    on this machine); `error` says why where it is not `ok`.
    """

    case: Case
    status: str = "ok"
    error: str | None = None
    processes: tuple[Process, ...] = ()
    max_rel_error: float | None = None
    error_float64: float | None = None  # as max_rel_error, against the models in float64
    top1: list[list[int]] | None = None
    top1_agreement: float | None = None
    least_s: float | None = None  # the least time that the device's measured limits allow
    bound: str | None = None  # which limit that is: compute or memory
    notes: tuple[str, ...] = ()
    picked: str | None = None  # the strategy that `best` chose in its first process, for all

    @property
    def name(self) -> str:
        """The strategy, and which it picked."""
        return f"{self.case.strategy} ({self.picked})" if self.picked else self.case.strategy

    @cached_property
    def times_s(self) -> tuple[float, ...]:
        return tuple(time for process in self.processes for time in process.times_s)

    @cached_property
    def reference_times_s(self) -> tuple[float, ...]:
        return tuple(time for process in self.processes for time in process.reference_times_s)

    @property
    def whole_s(self) -> tuple[float, ...]:
        return self._all("whole_s")

    @property
    def forward_s(self) -> tuple[float, ...]:
        return self._all("forward_s")

    @property
    def alone_s(self) -> tuple[float, ...]:
        return self._all("alone_s")

    @property
    def one_rank_s(self) -> tuple[float, ...]:
        return self._all("one_rank_s")

    @property
    def parallel_efficiency(self) -> float | None:
        """The slowest shard alone, while the other ranks rest, over the whole call."""
        return _ratio(median(self.alone_s), median(self.whole_s))

    @property
    def interference(self) -> float | None:
        """How much of a call the slowest forward loses to the other ranks' at the same time."""
        return _share(median(self.forward_s), median(self.alone_s), median(self.whole_s))

    @property
    def communication(self) -> float | None:
        """How much of a call is neither: moving input and logits, and waiting for each other."""
        return _share(median(self.whole_s), median(self.forward_s), median(self.whole_s))

    @property
    def speedup_over_one_rank(self) -> float | None:
        """One rank that holds all models over the whole call, by the same strategy."""
        return _ratio(median(self.one_rank_s), median(self.whole_s))

    @property
    def build_s(self) -> float | None:
        """What choosing took where one process did so for all, and what the build took them."""
        known = [process for process in self.processes if process.build_s is not None]
        built = median([(process.build_s or 0.0) - (process.tune_s or 0.0) for process in known])
        return None if built is None else built + (self.tune_s or 0.0)

    @property
    def tune_s(self) -> float | None:
        return self._median_of("tune_s")

    @property
    def first_call_s(self) -> float | None:
        return self._median_of("first_call_s")

    @property
    def start_s(self) -> float | None:
        """What a strategy takes before its steady state: build and first call."""
        both = self.build_s, self.first_call_s
        return None if both[0] is None or both[1] is None else both[0] + both[1]

    @property
    def peak_memory_bytes(self) -> int | None:
        return max(self._known("peak_memory_bytes"), default=None)

    @property
    def page_faults_per_call(self) -> float | None:
        return self._median_of("page_faults_per_call")

    @property
    def reference_page_faults_per_call(self) -> float | None:
        return self._median_of("reference_page_faults_per_call")

    @property
    def others_cpu_share(self) -> float | None:
        return self._median_of("others_cpu_share")

    @cached_property
    def median_s(self) -> float | None:
        return median(self.times_s)

    @cached_property
    def reference_median_s(self) -> float | None:
        return median(self.reference_times_s)

    @cached_property
    def iqr_s(self) -> float | None:
        return iqr(self.times_s)

    @cached_property
    def speedup(self) -> float | None:
        """Reference time / strategy time: the median of the processes' medians over their pairs.

        1 for the reference.
        """
        if self.case.is_reference and self.times_s:
            return 1.0
        return median(self.process_speedups) if self.status == "ok" else None

    @cached_property
    def speedup_interval(self) -> tuple[float, float] | None:
        """The 95 % interval across processes; of a single one, a bootstrap over its pairs."""
        if self.status != "ok":
            return None
        if len(self.process_speedups) == 1:
            return bootstrap_interval(self.processes[0].ratios)
        return interval_of_processes(self.process_speedups)

    @cached_property
    def process_speedups(self) -> tuple[float, ...]:
        """The speedup that each process found."""
        found = (process.speedup for process in self.processes)
        return tuple(speedup for speedup in found if speedup is not None)

    @cached_property
    def within_processes(self) -> float | None:
        """How sure a process is of itself: the half width of its own interval, the median."""
        intervals = (bootstrap_interval(process.ratios) for process in self.processes)
        return median([half_width(interval) for interval in intervals if interval is not None])

    @cached_property
    def between_processes(self) -> float | None:
        """How far the processes lie apart: half their range, as a share of its middle."""
        speedups = self.process_speedups
        return half_width((min(speedups), max(speedups))) if len(speedups) > 1 else None

    @cached_property
    def load(self) -> Load | None:
        """What the process in the middle, by the rate that it held, found under load."""
        loads = [process.load for process in self.processes if process.load is not None]
        ordered = sorted(loads, key=lambda load: load.held_qps or 0.0)
        return ordered[(len(ordered) - 1) // 2] if ordered else None

    @property
    def scenario(self) -> str | None:
        return self.load.scenario if self.load else None

    @property
    def held_qps(self) -> float | None:
        return self.load.held_qps if self.load else None

    @property
    def held_range(self) -> tuple[float, float] | None:
        """The least and the most that the processes held; None unless all held something."""
        found = [process.load.held_qps for process in self.processes if process.load is not None]
        held = [rate for rate in found if rate is not None]
        return (min(held), max(held)) if held and len(held) == len(found) else None

    @property
    def load_run(self) -> LoadRun | None:
        """The run that the row's figures under load are of."""
        return self.load.shown if self.load else None

    @property
    def roofline_share(self) -> float | None:
        """How much of the device's own measured limit this row reaches."""
        return self.least_s / self.median_s if self.least_s and self.median_s else None

    @cached_property
    def noise(self) -> float | None:
        """The largest inter-quartile range / median of times, of strategy and reference, that any
        process had."""
        spreads = [
            spread / middle
            for process in self.processes
            for times in (process.times_s, process.reference_times_s)
            if (spread := iqr(times)) is not None and (middle := median(times))
        ]
        return max(spreads, default=None)

    @property
    def inconclusive(self) -> str | None:
        """Why the speedup cannot be claimed, or None where it can (or where there is none)."""
        if self.speedup is None or self.case.is_reference:
            return None
        if self.speedup_interval is None:
            return "too few pairs"
        if (self.others_cpu_share or 0.0) > TOO_BUSY:
            return MACHINE_BUSY
        if len(self.process_speedups) > 1:  # there what is noisy is wide
            is_noisy = half_width(self.speedup_interval) > TOO_WIDE
        else:
            is_noisy = self.noise is not None and self.noise > TOO_NOISY
        return "too noisy" if is_noisy else None

    @property
    def beyond_disturbance(self) -> str | None:
        """`faster` or `slower` where the machine was too busy for a figure, but the fastest calls,
        and the whole interval, lie further apart than other programs can have put them."""
        interval = self.speedup_interval
        if self.inconclusive != MACHINE_BUSY or interval is None:
            return None
        ratio = min(self.reference_times_s) / min(self.times_s)
        if min(ratio, interval[0]) > FAR:
            return "faster"
        return "slower" if max(ratio, interval[1]) < 1 / FAR else None

    def _all(self, field: str) -> tuple[float, ...]:
        return tuple(time for process in self.processes for time in getattr(process, field))

    def _known(self, field: str) -> list[Any]:
        values = [getattr(process, field) for process in self.processes]
        return [value for value in values if value is not None]

    def _median_of(self, field: str) -> float | None:
        return median(self._known(field))


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _share(more: float | None, less: float | None, whole: float | None) -> float | None:
    return None if more is None or less is None else _ratio(more - less, whole)


@dataclass(frozen=True)
class Run:
    """A run as its file holds it. The configuration stays plain: it is shown and compared."""

    environment: Environment
    config: Mapping[str, Any]
    results: tuple[Result, ...]
