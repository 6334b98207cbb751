"""What a run leaves behind: frozen records and their statistics. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

REFERENCE = "loop"  # in float32
SELF_CHECK = "self_check"  # the reference against itself: the noise floor of this program
CONFIDENCE = 0.99
RESAMPLES = 10_000
# Of a 99 % interval for a median from n values, no interval is known below n = 8: not even the
# whole range of 7 values holds the median that often (1 - 2 / 2**7 < 0.99 < 1 - 2 / 2**8).
MIN_PAIRS_FOR_INTERVAL = 8
# Thresholds on the inter-quartile range over the median, as in torch.utils.benchmark.
NOISY, TOO_NOISY = 0.10, 0.25
# Share of the CPU that other programs may take before a row is warned of.
BUSY = 0.05


@dataclass(frozen=True)
class Config:
    """What was asked for: the command line, with defaults filled in."""

    num_models: tuple[int, ...]
    model_path: tuple[str, ...] | None
    arch: str
    image_path: str
    image_size: tuple[int, ...]
    batch_size: tuple[int, ...]
    inputs: str
    device: str
    dtype: tuple[str, ...]
    strategies: tuple[str, ...]
    warmup: int
    min_seconds: float
    min_pairs: int
    threads: int | None
    allocator: str
    self_check: bool
    roofline: bool
    seed: int
    max_minutes: float | None
    resume: str | None
    from_json: str | None
    baseline: str | None
    fail_above: float | None
    export_json: str | None
    export_csv: str | None
    export_markdown: str | None
    plot: str | None
    verbose: bool


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


@dataclass(frozen=True)
class Result:
    """One row: one strategy for one N. Raw times are stored, statistics derived from them.

    `status` is `ok`, `failed` (it broke, or its outputs disagree) or `unavailable` (it cannot run
    on this machine); `error` says why where it is not `ok`. The reference row has no pairs.
    """

    strategy: str
    num_models: int
    batch_size: int
    image_size: int
    dtype: str
    inputs: str
    status: str = "ok"
    error: str | None = None
    build_s: float | None = None
    first_call_s: float | None = None
    times_s: tuple[float, ...] = ()
    reference_times_s: tuple[float, ...] = ()
    max_rel_error: float | None = None
    error_float64: float | None = None  # as max_rel_error, against the models in float64
    top1: list[list[int]] | None = None
    top1_agreement: float | None = None
    peak_memory_bytes: int | None = None
    page_faults_per_call: float | None = None
    reference_page_faults_per_call: float | None = None
    others_cpu_share: float | None = None
    least_s: float | None = None  # the least time that the device's measured limits allow
    bound: str | None = None  # which limit that is: compute or memory
    notes: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, int, int, int, str, str]:
        """What was measured, apart from the outcome."""
        return (
            self.strategy,
            self.num_models,
            self.batch_size,
            self.image_size,
            self.dtype,
            self.inputs,
        )

    @property
    def cell(self) -> tuple[int, int, int]:
        """Where in the grid: (N, batch, px). Its rows share models, images and reference."""
        return self.num_models, self.batch_size, self.image_size

    @property
    def line(self) -> tuple[str, str, int, int]:
        """The row without its N, (strategy, dtype, batch, px): one line of a picture."""
        return self.strategy, self.dtype, self.batch_size, self.image_size

    @property
    def is_reference(self) -> bool:
        return self.strategy == REFERENCE and self.dtype == "float32"

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
        """Reference time / strategy time, median over interleaved pairs; 1 for the reference."""
        if self.is_reference and self.times_s:
            return 1.0
        return median(self._ratios) if self.status == "ok" else None

    @cached_property
    def speedup_interval(self) -> tuple[float, float] | None:
        return bootstrap_interval(self._ratios) if self.status == "ok" else None

    @property
    def roofline_share(self) -> float | None:
        """How much of the device's own measured limit this row reaches."""
        return self.least_s / self.median_s if self.least_s and self.median_s else None

    @cached_property
    def noise(self) -> float | None:
        """The larger inter-quartile range / median of the strategy's and the reference's times."""
        spreads = [
            spread / middle
            for times in (self.times_s, self.reference_times_s)
            if (spread := iqr(times)) is not None and (middle := median(times))
        ]
        return max(spreads, default=None)

    @property
    def inconclusive(self) -> str | None:
        """Why the speedup cannot be claimed, or None where it can (or where there is none)."""
        if self.speedup is None or self.is_reference:
            return None
        if self.speedup_interval is None:
            return "too few pairs"
        return "too noisy" if self.noise is not None and self.noise > TOO_NOISY else None

    @property
    def _ratios(self) -> tuple[float, ...]:
        pairs = zip(self.reference_times_s, self.times_s, strict=False)
        return tuple(reference / own for reference, own in pairs)


def median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if len(values) else None


def iqr(values: Sequence[float]) -> float | None:
    """Inter-quartile range, linear interpolation; unknown for fewer than two values."""
    if len(values) < 2:
        return None
    low, high = np.percentile(values, (25, 75))
    return float(high - low)


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The `CONFIDENCE` percentile bootstrap interval of the median; None below 8 values.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. Values are
    resampled with a fixed seed, so that one result file always gives one interval.
    """
    if len(values) < MIN_PAIRS_FOR_INTERVAL:
        return None
    return percentile_interval(resampled_medians(values, np.random.default_rng(0)))


def resampled_medians(values: Sequence[float], generator: np.random.Generator) -> np.ndarray:
    """The medians of `RESAMPLES` samples with replacement, each as large as `values`."""
    picks = generator.integers(len(values), size=(RESAMPLES, len(values)))
    return np.median(np.asarray(values)[picks], axis=1)


def percentile_interval(resampled: np.ndarray) -> tuple[float, float]:
    """The middle `CONFIDENCE` of resampled statistics."""
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(resampled, (tail, 100 - tail))
    return float(low), float(high)
