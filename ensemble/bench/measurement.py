"""What one process measured of a case: raw values. Statistics: `summary`. Imports no torch."""

from dataclasses import dataclass
from functools import cached_property

from ensemble.bench.case import Case
from ensemble.bench.load.record import LoadTest
from ensemble.machine.gpu_state import GpuState
from ensemble.statistics import bootstrap_interval, bootstrap_ratio_interval, median

OK, FAILED, UNAVAILABLE = "ok", "failed", "unavailable"


@dataclass(frozen=True)
class Note:
    """A remark on a measurement. `details`, which differ between processes, are shown once."""

    text: str
    details: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.details})" if self.details else self.text


@dataclass(frozen=True)
class RankTimes:
    """Rounds that attribute the time of a call over ranks, in seconds.

    `whole_s` are whole calls, `forward_s` the slowest rank's forward in each of them, `alone_s` the
    slowest shard's forward while all other ranks are idle, `one_rank_s` all models on one rank.
    """

    whole_s: tuple[float, ...] = ()
    forward_s: tuple[float, ...] = ()
    alone_s: tuple[float, ...] = ()
    one_rank_s: tuple[float, ...] = ()

    @property
    def parallel_efficiency(self) -> float | None:
        """Slowest shard alone / whole call."""
        return _ratio(median(self.alone_s), median(self.whole_s))

    @property
    def interference(self) -> float | None:
        """Share of a call that the slowest forward loses to concurrent forwards of other ranks."""
        return _share(median(self.forward_s), median(self.alone_s), median(self.whole_s))

    @property
    def communication(self) -> float | None:
        """Share of a call spent in moving input and logits, and in waiting for other ranks."""
        return _share(median(self.whole_s), median(self.forward_s), median(self.whole_s))

    @property
    def speedup_over_one_rank(self) -> float | None:
        """The same strategy with all models on one rank / whole call."""
        return _ratio(median(self.one_rank_s), median(self.whole_s))


@dataclass(frozen=True)
class Measurement:
    """A case measured once, by one process or by the ranks of torchrun. Unknown is None.

    `status` is `ok`, `failed` (it raised, or its outputs disagree) or `unavailable` (it cannot run
    on this machine); `error` says why where it is not `ok`. `times_s` and `reference_times_s` are
    pairs, in the order in which they were measured; the reference itself has no pairs.
    `reference_alone_times_s` are calls of the reference before the strategy was built: what a
    program takes that runs nothing else. In files of earlier versions there are none.

    On CUDA, `device_times_s` and `reference_device_times_s` are the same calls between two events
    on the stream, and `with_copies_s` is the median of further calls from pinned host memory to
    logits on the host.
    """

    case: Case
    status: str = OK
    error: str | None = None
    times_s: tuple[float, ...] = ()
    reference_times_s: tuple[float, ...] = ()
    reference_alone_times_s: tuple[float, ...] = ()
    device_times_s: tuple[float, ...] = ()
    reference_device_times_s: tuple[float, ...] = ()
    with_copies_s: float | None = None
    build_s: float | None = None
    first_call_s: float | None = None
    peak_memory_bytes: int | None = None
    peak_reserved_bytes: int | None = None  # on CUDA: what the caching allocator held
    held_bytes: int | None = None  # between calls: weights and working memory
    bytes_per_model: int | None = None  # of held_bytes, what one more model would add
    tune_s: float | None = None  # of build_s, to choose a strategy; None where nothing was chosen
    page_faults_per_call: float | None = None
    reference_page_faults_per_call: float | None = None
    others_cpu_share: float | None = None  # share of the CPU that other processes used
    max_rel_error: float | None = None
    error_float64: float | None = None  # as max_rel_error, against the models in float64
    top1: list[list[int]] | None = None
    top1_agreement: float | None = None
    notes: tuple[Note, ...] = ()
    picked: str | None = None  # the strategy that `best` chose
    load: LoadTest | None = None
    ranks: RankTimes | None = None
    gpu: GpuState | None = None  # right after the last timed call

    @property
    def is_measured(self) -> bool:
        """Did the strategy start, so that there is something to summarize?"""
        return bool(self.times_s) or self.build_s is not None or self.load is not None

    @property
    def ratios(self) -> tuple[float, ...]:
        """Reference time / strategy time of each pair."""
        pairs = zip(self.reference_times_s, self.times_s, strict=False)
        return tuple(reference / time for reference, time in pairs)

    def speedup(self, *, alone: bool) -> float | None:
        """Time of the reference / time of the strategy: the median of the pairs, in which drift of
        the machine cancels; with `alone` that of the reference alone, which nothing slows."""
        if not alone:
            return median(self.ratios)
        return _ratio(median(self.reference_alone_times_s), median(self.times_s))

    def speedup_interval(self, *, alone: bool) -> tuple[float, float] | None:
        """The bootstrap interval of the speedup: how precisely this process knows its own."""
        if not alone:
            return bootstrap_interval(self.ratios)
        return bootstrap_ratio_interval(self.reference_alone_times_s, self.times_s)

    @cached_property
    def slowdown_of_reference(self) -> float | None:
        """Time of the reference in the pairs / alone."""
        return _ratio(median(self.reference_times_s), median(self.reference_alone_times_s))


@dataclass(frozen=True)
class Roofline:
    """The least time that the measured limits of the device allow, and the binding one: compute or
    memory; or why there is none. `note` is a remark on the bound."""

    least_s: float | None = None
    bound: str | None = None
    problem: str | None = None
    note: str | None = None


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _share(more: float | None, less: float | None, whole: float | None) -> float | None:
    return None if more is None or less is None else _ratio(more - less, whole)
