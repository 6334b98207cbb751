"""MLPerf's LoadGen: draws arrivals, issues queries, logs, and decides whether a run is valid.

Reddi et al., MLPerf Inference Benchmark, ISCA 2020. LoadGen is native code with its own threads and
calls back for each query. Only this module imports it; it knows nothing of models.
"""

from __future__ import annotations

import re
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensemble.errors import UnavailableError

SINGLE_STREAM, OFFLINE, SERVER = "single_stream", "offline", "server"
_SCENARIOS = {SINGLE_STREAM: "SingleStream", OFFLINE: "Offline", SERVER: "Server"}
_TRACE = "mlperf_log_trace.json"
_SAMPLE = re.compile(
    r'"name":"Sample".*"ts":([\d.]+).*"sample_seq":(\d+).*"issue_start_ns":(\d+),"complete_ns":(\d+)'
)


@dataclass(frozen=True)
class LoadGenSettings:
    """The settings of one run, as in LoadGen's TestSettings."""

    scenario: str
    rate_qps: float  # offered rate; for the other scenarios the expected one
    percentile: float  # 0 to 1
    bound_s: float
    min_seconds: float
    min_queries: int
    seed: int


@dataclass(frozen=True)
class LoadGenResult:
    """The result of one run. Latencies count from the scheduled arrivals, in order of these."""

    valid: bool
    invalid_reason: str | None
    arrivals_s: tuple[float, ...]
    latencies_s: tuple[float, ...]
    max_issue_delay_s: float
    seconds: float  # from the first scheduled arrival to the last answer


def import_loadgen() -> Any:
    """The module `mlperf_loadgen`; raises UnavailableError if it is not installed."""
    try:
        import mlperf_loadgen
    except ImportError as error:
        raise UnavailableError(
            "--scenario requires the package mlcommons-loadgen: pip install -r"
            " requirements-peers.txt"
        ) from error
    return mlperf_loadgen


def complete(sample_ids: Sequence[int]) -> None:
    """Report requests as complete to LoadGen."""
    module = import_loadgen()
    module.QuerySamplesComplete(
        [module.QuerySampleResponse(sample_id, 0, 0) for sample_id in sample_ids]
    )


class LoadGenSession:
    """One run of LoadGen, in its own thread, so that the caller's thread can serve.

    Args:
        issue_query: is given (sample id, index in the sample library) of arriving requests.
        flush_queries: is called after the last request.
        num_samples: the size of the sample library.
        log_dir: where LoadGen's logs are kept; None to keep none.
    """

    def __init__(
        self,
        settings: LoadGenSettings,
        *,
        issue_query: Callable[[Sequence[tuple[int, int]]], None],
        flush_queries: Callable[[], None],
        num_samples: int,
        log_dir: Path | None,
    ) -> None:
        self._settings, self._issue_query = settings, issue_query
        self._flush_queries, self._num_samples = flush_queries, num_samples
        self._log_dir = log_dir

    def run(self, serve: Callable[[], None], stop: Callable[[], None]) -> LoadGenResult:
        """Issue all requests while `serve` runs in this thread; `stop` ends it."""
        keep = self._log_dir
        folder = tempfile.TemporaryDirectory() if keep is None else nullcontext(str(keep))
        with folder as name:
            log_dir = Path(name)
            log_dir.mkdir(parents=True, exist_ok=True)
            errors: list[BaseException] = []

            def issue_all() -> None:
                try:
                    self._start_test(log_dir)
                except BaseException as error:
                    errors.append(error)
                finally:
                    stop()

            thread = threading.Thread(target=issue_all, name="loadgen", daemon=True)
            thread.start()
            serve()
            thread.join()
            if errors:
                raise errors[0]
            result = read_result(log_dir, self._settings)
            (log_dir / _TRACE).unlink()  # large, and fully parsed
            return result

    def _start_test(self, log_dir: Path) -> None:
        module = import_loadgen()
        sut = module.ConstructSUT(
            lambda samples: self._issue_query([(sample.id, sample.index) for sample in samples]),
            self._flush_queries,
        )
        nothing: Callable[[list[int]], None] = lambda indices: None  # noqa: E731
        qsl = module.ConstructQSL(self._num_samples, self._num_samples, nothing, nothing)
        output = module.LogOutputSettings()
        output.outdir, output.copy_summary_to_stdout = str(log_dir), False
        logs = module.LogSettings()
        logs.log_output, logs.enable_trace = output, True
        try:
            module.StartTestWithLogSettings(sut, qsl, _test_settings(module, self._settings), logs)
        finally:
            module.DestroyQSL(qsl)
            module.DestroySUT(sut)


def _test_settings(module: Any, ours: LoadGenSettings) -> Any:
    settings = module.TestSettings()
    settings.scenario = getattr(module.TestScenario, _SCENARIOS[ours.scenario])
    settings.mode = module.TestMode.PerformanceOnly
    settings.min_duration_ms = round(1e3 * ours.min_seconds)
    settings.min_query_count = ours.min_queries
    settings.server_target_qps = settings.offline_expected_qps = ours.rate_qps
    settings.single_stream_expected_latency_ns = round(1e9 / ours.rate_qps)
    settings.server_target_latency_ns = round(1e9 * ours.bound_s)
    settings.server_target_latency_percentile = ours.percentile
    settings.single_stream_target_latency_percentile = ours.percentile
    settings.schedule_rng_seed = settings.sample_index_rng_seed = ours.seed
    settings.qsl_rng_seed = ours.seed
    return settings


def read_result(log_dir: Path, settings: LoadGenSettings) -> LoadGenResult:
    """The result of a run, from LoadGen's summary and trace."""
    summary = (log_dir / "mlperf_log_summary.txt").read_text()
    samples = []
    with (log_dir / _TRACE).open() as trace:
        for line in trace:
            if match := _SAMPLE.search(line):
                arrival_us, number, issue_ns, complete_ns = map(float, match.groups())
                samples.append((number, 1e-6 * arrival_us, 1e-9 * issue_ns, 1e-9 * complete_ns))
    samples.sort()
    latencies = tuple(latency for _, _, _, latency in samples)
    return LoadGenResult(
        valid="Result is : VALID" in summary,
        invalid_reason=_invalid_reason(summary, settings),
        arrivals_s=tuple(arrival for _, arrival, _, _ in samples),
        latencies_s=latencies,
        max_issue_delay_s=max((issue for _, _, issue, _ in samples), default=0.0),
        seconds=_seconds(summary, latencies),
    )


def _seconds(summary: str, latencies: Sequence[float]) -> float:
    rate = re.search(r"(?:amples per second|w/ loadgen overhead)\s*: ([\d.e+]+)", summary)
    return len(latencies) / float(rate.group(1)) if rate else 0.0


def _invalid_reason(summary: str, settings: LoadGenSettings) -> str | None:
    """The first of LoadGen's reasons for an invalid run; None if the run is valid."""
    if "Result is : VALID" in summary:
        return None
    failed = set(re.findall(r"^\s*(.*?) satisfied\s*: NO", summary, re.MULTILINE))
    if "Performance constraints" in failed:
        late = f"{1 - settings.percentile:.3g} of requests"
        return f"more than {late} took over {settings.bound_s:.4g} s"
    if "Early stopping" in failed:
        more = re.search(r"run at least (\d+) more|Need to process at least (\d+)", summary)
        number = next(filter(None, more.groups()), "") if more else ""
        return f"not enough queries: {number} more needed, all in time"
    return f"not satisfied: {', '.join(sorted(failed)) or 'unknown'}"
