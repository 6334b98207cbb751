"""MLPerf's LoadGen: draws the arrivals, keeps the clock, writes the log, and judges.

Reddi et al., MLPerf Inference Benchmark, ISCA 2020. It is native code with threads of its own, and
calls back for each arrival. Nothing else here knows it; it knows nothing of models.
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
class Order:
    """What the referee is asked to play."""

    scenario: str
    rate_qps: float  # offered; for the other scenarios what is expected
    percentile: float  # 0 to 1
    bound_s: float
    min_seconds: float
    min_queries: int
    seed: int


@dataclass(frozen=True)
class Ruling:
    """What the referee says: latencies from the scheduled arrivals, in the order of these."""

    valid: bool
    why_not: str | None
    arrivals_s: tuple[float, ...]
    latencies_s: tuple[float, ...]
    late_issue_s: float  # how late it told of an arrival, at worst
    seconds: float  # from the first scheduled arrival to the last answer


def load() -> Any:
    """The module `mlperf_loadgen`; raises UnavailableError where it is not installed."""
    try:
        import mlperf_loadgen
    except ImportError as error:
        raise UnavailableError(
            "expected the package mlcommons-loadgen, found none: pip install -r"
            " requirements-peers.txt"
        ) from error
    return mlperf_loadgen


def answer(idents: Sequence[int]) -> None:
    """Tell that requests are done."""
    module = load()
    module.QuerySamplesComplete([module.QuerySampleResponse(ident, 0, 0) for ident in idents])


class Play:
    """One run of the referee, in a thread of its own, so that the caller's can serve.

    Args:
        arrive: told (ident, entry of the library) of requests as they come.
        finish: told that no more will come.
        entries: of the library.
        log: where its logs are kept; None to keep none.
    """

    def __init__(
        self,
        order: Order,
        *,
        arrive: Callable[[Sequence[tuple[int, int]]], None],
        finish: Callable[[], None],
        entries: int,
        log: Path | None,
    ) -> None:
        self._order, self._arrive, self._finish = order, arrive, finish
        self._entries, self._log = entries, log

    def run(self, serve: Callable[[], None], close: Callable[[], None]) -> Ruling:
        """Play, while `serve` runs here until `close` is called at the end."""
        folder = tempfile.TemporaryDirectory() if self._log is None else nullcontext(str(self._log))
        with folder as name:
            out = Path(name)
            out.mkdir(parents=True, exist_ok=True)
            problems: list[BaseException] = []

            def play() -> None:
                try:
                    self._start(out)
                except BaseException as error:
                    problems.append(error)
                finally:
                    close()

            thread = threading.Thread(target=play, name="referee", daemon=True)
            thread.start()
            serve()
            thread.join()
            if problems:
                raise problems[0]
            ruling = read(out, self._order)
            (out / _TRACE).unlink()  # large, and all that counts has been read
            return ruling

    def _start(self, out: Path) -> None:
        module = load()
        sut = module.ConstructSUT(
            lambda samples: self._arrive([(sample.id, sample.index) for sample in samples]),
            self._finish,
        )
        nothing: Callable[[list[int]], None] = lambda indices: None  # noqa: E731
        library = module.ConstructQSL(self._entries, self._entries, nothing, nothing)
        output = module.LogOutputSettings()
        output.outdir, output.copy_summary_to_stdout = str(out), False
        logs = module.LogSettings()
        logs.log_output, logs.enable_trace = output, True
        try:
            module.StartTestWithLogSettings(sut, library, _settings(module, self._order), logs)
        finally:
            module.DestroyQSL(library)
            module.DestroySUT(sut)


def _settings(module: Any, order: Order) -> Any:
    settings = module.TestSettings()
    settings.scenario = getattr(module.TestScenario, _SCENARIOS[order.scenario])
    settings.mode = module.TestMode.PerformanceOnly
    settings.min_duration_ms = round(1e3 * order.min_seconds)
    settings.min_query_count = order.min_queries
    settings.server_target_qps = settings.offline_expected_qps = order.rate_qps
    settings.single_stream_expected_latency_ns = round(1e9 / order.rate_qps)
    settings.server_target_latency_ns = round(1e9 * order.bound_s)
    settings.server_target_latency_percentile = order.percentile
    settings.single_stream_target_latency_percentile = order.percentile
    settings.schedule_rng_seed = settings.sample_index_rng_seed = order.seed
    settings.qsl_rng_seed = order.seed
    return settings


def read(out: Path, order: Order) -> Ruling:
    """The ruling of a run's logs."""
    summary = (out / "mlperf_log_summary.txt").read_text()
    samples = []
    with (out / _TRACE).open() as trace:
        for line in trace:
            if found := _SAMPLE.search(line):
                arrival_us, number, issue_ns, complete_ns = map(float, found.groups())
                samples.append((number, 1e-6 * arrival_us, 1e-9 * issue_ns, 1e-9 * complete_ns))
    samples.sort()
    latencies = tuple(latency for _, _, _, latency in samples)
    return Ruling(
        valid="Result is : VALID" in summary,
        why_not=_why_not(summary, order),
        arrivals_s=tuple(arrival for _, arrival, _, _ in samples),
        latencies_s=latencies,
        late_issue_s=max((issue for _, _, issue, _ in samples), default=0.0),
        seconds=_seconds(summary, latencies),
    )


def _seconds(summary: str, latencies: Sequence[float]) -> float:
    rate = re.search(r"(?:amples per second|w/ loadgen overhead)\s*: ([\d.e+]+)", summary)
    return len(latencies) / float(rate.group(1)) if rate else 0.0


def _why_not(summary: str, order: Order) -> str | None:
    """In words, the first of the referee's own reasons; None where the run is valid."""
    if "Result is : VALID" in summary:
        return None
    failed = set(re.findall(r"^\s*(.*?) satisfied\s*: NO", summary, re.MULTILINE))
    if "Performance constraints" in failed:
        return f"more than {1 - order.percentile:.3g} of requests took over {order.bound_s:.4g} s"
    if "Early stopping" in failed:
        more = re.search(r"run at least (\d+) more|Need to process at least (\d+)", summary)
        number = next(filter(None, more.groups()), "") if more else ""
        return f"not enough queries: {number} more needed, all in time"
    return f"not satisfied: {', '.join(sorted(failed)) or 'unknown'}"
