"""Break the statistics, the measuring loop and the gate on purpose: does a test notice?

`python -m tests.studies.mutants` takes some minutes and writes mutants.md. Each mutant is one edit
of a copy of this tree, in which the nearest tests then run. A mutant that lives is a line of the
program that no test holds.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).parents[2]
PAGE = Path(__file__).with_name("mutants.md")
COPIED = ("ensemble", "tests", "resnet_vmap.py", "kitten.jpg", "pyproject.toml")
AT_ONCE = 2  # each has a copy of the tree of its own
PYTEST = (sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0")
TIMEOUT_S = 40.0  # of the tests of a mutant, which may loop forever: that is noticed too
TIMEOUT_OF_ALL_S = 600.0

STATISTICS = ("tests/test_statistics.py",)
RECORDS = ("tests/test_records.py",)
GATE = ("tests/bench/report/test_comparison.py",)
SWEEP = ("tests/bench/report/test_sweep.py",)
TABLE = ("tests/bench/report/test_table.py",)
TIMING = ("tests/machine/test_timing.py",)
OTHERS = ("tests/machine/test_other_processes.py",)
CALLS = ("tests/bench/test_timed_calls.py",)
INPUTS = ("tests/bench/test_inputs.py",)
AGREEMENT = ("tests/strategies/test_agreement.py",)
MEASURE = ("tests/bench/test_measure.py",)
SESSION = ("tests/bench/test_session.py",)
_WORKERS = "tests/bench/executors/test_fresh_process.py::test_"  # those that start no process
SCHEDULE = (
    f"{_WORKERS}every_row_gets_the_same_number_of_processes_whatever_they_find",
    f"{_WORKERS}further_processes_are_planned_once_from_the_first_ones",
    f"{_WORKERS}a_row_that_failed_gets_no_more_and_the_reference_then_runs_by_itself",
    f"{_WORKERS}the_processes_of_a_row_are_spread_over_the_run",
    f"{_WORKERS}what_the_processes_of_a_row_share_is_asked_of_them_together",
)


RUN_RECORD = ("tests/bench/load/test_run_record.py",)
SEARCH = ("tests/bench/load/test_queue_simulation.py",)
LOAD_REPORT = ("tests/bench/report/test_load_report.py",)


@dataclass(frozen=True)
class Mutant:
    """An edit that makes the program wrong, and the tests that should notice."""

    name: str
    file: str
    old: str  # occurs once in the file
    new: str
    tests: tuple[str, ...]


_RECORD = "ensemble/bench/load/run_record.py"
_SEARCH = "ensemble/bench/load/search.py"
_QUEUE = "ensemble/bench/load/queue_simulation.py"
_LOAD = "ensemble/bench/load/record.py"
_STATISTICS = "ensemble/statistics.py"
_SUMMARY = "ensemble/bench/summary.py"
_MEASUREMENT = "ensemble/bench/measurement.py"
_MEASURE = "ensemble/bench/measure.py"
_CALLS = "ensemble/bench/timed_calls.py"
_INPUTS = "ensemble/bench/inputs.py"
_SCHEDULE = "ensemble/bench/schedule.py"
_SESSION = "ensemble/bench/session.py"
_TIMING = "ensemble/machine/timing.py"
_OTHERS = "ensemble/machine/other_processes.py"
_VERDICT = "ensemble/bench/report/verdict.py"
_SWEEP = "ensemble/bench/report/sweep.py"
_GATE = "ensemble/bench/report/comparison.py"
_SHOW = "ensemble/bench/report/show.py"
_AGREEMENT = "ensemble/strategies/agreement.py"

_BOTH = "both = self.variance + other.variance"

MUTANTS = (
    # Statistics.
    Mutant(
        "the interval of a mean is one-sided",
        _STATISTICS,
        "stdtrit(self.degrees, (1 + confidence) / 2)",
        "stdtrit(self.degrees, confidence)",
        STATISTICS,
    ),
    Mutant(
        "n degrees of freedom, not n - 1",
        _STATISTICS,
        "variance, len(logs) - 1.0)",
        "variance, float(len(logs)))",
        STATISTICS,
    ),
    Mutant(
        "the variance of a sample is divided by n",
        _STATISTICS,
        "logs.var(ddof=1)",
        "logs.var(ddof=0)",
        STATISTICS,
    ),
    Mutant(
        "the interval of processes may miss their median",
        _STATISTICS,
        "return min(low, middle), max(high, middle)",
        "return low, high",
        STATISTICS,
    ),
    Mutant(
        "each tail of a bootstrap interval has 5 %",
        _STATISTICS,
        "tail = 50 * (1 - confidence)",
        "tail = 100 * (1 - confidence)",
        STATISTICS,
    ),
    Mutant(
        "the bootstrap of a ratio is upside down",
        _STATISTICS,
        "medians[0] / medians[1]",
        "medians[1] / medians[0]",
        STATISTICS,
    ),
    Mutant(
        "a deviation is the whole width of its interval",
        _STATISTICS,
        "float(high - low) / 2 / NORMAL_QUANTILE",
        "float(high - low) / NORMAL_QUANTILE",
        STATISTICS,
    ),
    Mutant(
        "autocorrelation is not corrected for its bias",
        _STATISTICS,
        "(lag_one + 1 / count) / (1 - 4 / count)",
        "lag_one",
        STATISTICS,
    ),
    Mutant(
        "autocorrelation has no standard error",
        _STATISTICS,
        "rho += max(0.0, 1 - rho**2) ** 0.5 / count**0.5",
        "rho += 0.0",
        STATISTICS,
    ),
    Mutant(
        "a gap of 1 % separates modes",
        _STATISTICS,
        "MIN_FOR_MODES = 0.10, 20.0, 2, 5",
        "MIN_FOR_MODES = 0.01, 20.0, 2, 5",
        STATISTICS,
    ),
    Mutant(
        "a gap need not exceed the spread within modes",
        _STATISTICS,
        "MODE_GAP_TO_SPREAD / len(order) * spread",
        "0.0 * spread",
        STATISTICS,
    ),
    Mutant(
        "the spread of the lower mode alone counts",
        _STATISTICS,
        "spread = max(logs[at - 1] - logs[0], logs[-1] - logs[at])",
        "spread = logs[at - 1] - logs[0]",
        STATISTICS,
    ),
    # The gate.
    Mutant(
        "the baseline's variance is not added", _STATISTICS, _BOTH, "both = self.variance", GATE
    ),
    Mutant(
        "half-widths are added, not in quadrature",
        _STATISTICS,
        _BOTH,
        "both = (self.variance**0.5 + other.variance**0.5) ** 2",
        GATE,
    ),
    Mutant(
        "the gate uses the larger variance alone",
        _STATISTICS,
        _BOTH,
        "both = max(self.variance, other.variance)",
        GATE,
    ),
    Mutant(
        "each bound ignores the number of rows",
        _GATE,
        "2 * CONFIDENCE ** (1 / max(1, gated)) - 1",
        "2 * CONFIDENCE - 1",
        GATE,
    ),
    Mutant(
        "the bounds of the gate are two-sided",
        _GATE,
        "2 * CONFIDENCE ** (1 / max(1, gated)) - 1",
        "CONFIDENCE ** (1 / max(1, gated))",
        GATE,
    ),
    Mutant(
        "the reference counts as a gated row",
        _GATE,
        "gated = sum(not row.case.is_reference for row, _ in both)",
        "gated = len(both)",
        GATE,
    ),
    Mutant(
        "an inconclusive row passes",
        _GATE,
        "self.inconclusive is None and self.interval is not None",
        "self.interval is not None",
        GATE,
    ),
    Mutant(
        "a row without an interval passes",
        _GATE,
        "self.inconclusive is None and self.interval is not None",
        "True",
        GATE,
    ),
    Mutant(
        "a slowdown need not be significant",
        _GATE,
        "self.interval[0] > 1 and self.ratio",
        "self.ratio",
        GATE,
    ),
    Mutant(
        "a slowdown need not exceed the limit",
        _GATE,
        "self.interval[0] > 1 and self.ratio > 1 + percent / 100",
        "self.interval[0] > 1",
        GATE,
    ),
    Mutant(
        "the reference is gated",
        _GATE,
        "if self.row.case.is_reference or self.interval is None",
        "if self.interval is None",
        GATE,
    ),
    Mutant(
        "one process is taken for all of them",
        _GATE,
        "variance + ASSUMED_SPREAD**2",
        "variance",
        GATE,
    ),
    Mutant(
        "of one process the spread of its calls does not count",
        _GATE,
        "of_interval(interval).variance + ASSUMED_SPREAD**2",
        "ASSUMED_SPREAD**2",
        GATE,
    ),
    Mutant(
        "one process without a difference passes",
        _GATE,
        "inconclusive = inconclusive or ONE_PROCESS",
        "pass",
        GATE,
    ),
    Mutant(
        "a noisy baseline is conclusive",
        _GATE,
        "inconclusive = row.inconclusive or old.inconclusive",
        "inconclusive = row.inconclusive",
        GATE,
    ),
    Mutant(
        "times alone are compared with times in pairs",
        _GATE,
        "is_over_reference_alone) and all(",
        "is_over_reference_alone) and any(",
        RECORDS,
    ),
    Mutant(
        "a regression ends with exit code 0",
        _SHOW,
        "        return 1\n",
        "        return 0\n",
        GATE,
    ),
    Mutant(
        "an inconclusive gate ends with exit code 0",
        _SHOW,
        "return INCONCLUSIVE if inconclusive else 0",
        "return 0",
        GATE,
    ),
    Mutant(
        "inconclusive comes before a regression",
        _SHOW,
        "if any(row.is_significantly_slower(fail_above) for row in compared):",
        "if all(row.is_significantly_slower(fail_above) for row in compared):",
        GATE,
    ),
    Mutant(
        "a strategy that was asked for may be unavailable",
        _SHOW,
        'else {"failed", "unavailable"}',
        'else {"failed"}',
        GATE,
    ),
    # A row.
    Mutant(
        "the speedup is the maximum over processes",
        _SUMMARY,
        "return median(self.process_speedups) if",
        "return max(self.process_speedups, default=None) if",
        RECORDS,
    ),
    Mutant(
        "memory is the minimum over processes",
        _SUMMARY,
        'max(self._known("peak_memory_bytes")',
        'min(self._known("peak_memory_bytes")',
        RECORDS,
    ),
    Mutant(
        "the error is the minimum over processes",
        _SUMMARY,
        'max(self._known("max_rel_error")',
        'min(self._known("max_rel_error")',
        RECORDS,
    ),
    Mutant(
        "the error against float64 is the minimum over processes",
        _SUMMARY,
        'max(self._known("error_float64")',
        'min(self._known("error_float64")',
        RECORDS,
    ),
    Mutant(
        "the agreement of classes is the maximum over processes",
        _SUMMARY,
        'min(self._known("top1_agreement")',
        'max(self._known("top1_agreement")',
        RECORDS,
    ),
    Mutant(
        "the first call is the fastest over processes",
        _SUMMARY,
        "median([one.first_call_s for one in self._starts if one.first_call_s is not None])",
        "min([one.first_call_s for one in self._starts if one.first_call_s is not None])",
        RECORDS,
    ),
    Mutant(
        "the build of a row leaves out the time to choose",
        _SUMMARY,
        "built + (self.tune_s or 0.0)",
        "built",
        RECORDS,
    ),
    Mutant(
        "the reference has the page faults of the strategy",
        _SUMMARY,
        'median(self._known("reference_page_faults_per_call"))',
        'median(self._known("page_faults_per_call"))',
        RECORDS,
    ),
    Mutant(
        "the CPU share of others is the minimum over processes",
        _SUMMARY,
        'median(self._known("others_cpu_share"))',
        'min(self._known("others_cpu_share"), default=None)',
        RECORDS,
    ),
    Mutant(
        "the time of the reference is that in pairs",
        _SUMMARY,
        "return median([t for one in self.measurements for t in one.reference_alone_times_s])",
        "return median(self.reference_times_s)",
        RECORDS,
    ),
    Mutant(
        "noise is the smallest spread",
        _SUMMARY,
        "return max(spreads, default=None)",
        "return min(spreads, default=None)",
        RECORDS,
    ),
    Mutant(
        "others may take half of the CPU",
        _SUMMARY,
        "BUSY, TOO_BUSY = 0.05, 0.25",
        "BUSY, TOO_BUSY = 0.05, 0.5",
        RECORDS,
    ),
    Mutant(
        "an interval of any width is conclusive",
        _SUMMARY,
        "is_noisy = half_width(self.speedup_interval) > TOO_WIDE",
        "is_noisy = False",
        RECORDS,
    ),
    Mutant(
        "the interval within a process decides over several",
        _SUMMARY,
        "is_noisy = half_width(self.speedup_interval) > TOO_WIDE",
        "is_noisy = (self.noise or 0.0) > TOO_NOISY",
        RECORDS,
    ),
    Mutant(
        "on a busy CPU the fastest calls alone decide",
        _SUMMARY,
        "min(ratio, interval[0]) > FAR",
        "ratio > FAR",
        RECORDS,
    ),
    Mutant(
        "a row that failed in a later process is ok",
        _SUMMARY,
        "next(((index, one) for index, one in found if one.status != OK), None)",
        "next(((index, one) for index, one in found if one.status != OK and not index), None)",
        RECORDS,
    ),
    Mutant(
        "a ratio of a pair is upside down",
        _MEASUREMENT,
        "tuple(reference / time for",
        "tuple(time / reference for",
        RECORDS,
    ),
    Mutant(
        "the speedup is over the reference in pairs",
        _MEASUREMENT,
        "        if not alone:\n            return median(self.ratios)\n",
        "        if self.ratios:\n            return median(self.ratios)\n",
        RECORDS,
    ),
    Mutant(
        "the interval is over the reference in pairs",
        _MEASUREMENT,
        "return bootstrap_ratio_interval(self.reference_alone_times_s, self.times_s)",
        "return bootstrap_interval(self.ratios)",
        RECORDS,
    ),
    Mutant(
        "the slowdown of the reference is upside down",
        _MEASUREMENT,
        "_ratio(median(self.reference_times_s), median(self.reference_alone_times_s))",
        "_ratio(median(self.reference_alone_times_s), median(self.reference_times_s))",
        RECORDS,
    ),
    Mutant(
        "interference is measured against one rank",
        _MEASUREMENT,
        "_share(median(self.forward_s), median(self.alone_s), median(self.whole_s))",
        "_share(median(self.forward_s), median(self.one_rank_s), median(self.whole_s))",
        RECORDS,
    ),
    # Measuring a case.
    Mutant(
        "the reference alone is timed after the build",
        _MEASURE,
        "alone = () if is_reference else setup.reference_alone",
        "alone = () if is_reference else time_alone(setup, options)",
        MEASURE,
    ),
    Mutant(
        "the times of the reference alone are those in pairs",
        _MEASURE,
        "alone = () if is_reference else setup.reference_alone",
        "alone = tuple(paired)",
        MEASURE,
    ),
    Mutant(
        "strategy and reference are swapped",
        _MEASURE,
        "timed = [setup.reference] if is_reference else [setup.reference, built]",
        "timed = [setup.reference] if is_reference else [built, setup.reference]",
        MEASURE,
    ),
    Mutant(
        "the reference alone is timed with one input",
        _MEASURE,
        "        renew=[calls.renew],\n        warmup=options.warmup,\n",
        "        warmup=options.warmup,\n",
        MEASURE,
    ),
    Mutant(
        "the reference alone is timed by too few calls",
        _MEASURE,
        "max(MIN_ALONE, options.min_pairs // 2)",
        "1",
        MEASURE,
    ),
    Mutant(
        "pairs are timed with one input",
        _MEASURE,
        "        renew=[one.renew for one in calls],\n",
        "",
        MEASURE,
    ),
    Mutant(
        "an answer is not compared",
        _MEASURE,
        "same(strategy.result, reference.result)",
        "same(reference.result, reference.result)",
        MEASURE,
    ),
    Mutant(
        "a wrong answer in a timed call is accepted",
        _MEASURE,
        "    if found.problem:\n",
        "    if False:\n",
        MEASURE,
    ),
    Mutant(
        "a wrong answer after the timed calls is accepted",
        _MEASURE,
        "if problem := _problem_of_result(built, setup, reduce):",
        "if problem := None:",
        MEASURE,
    ),
    Mutant(
        "the error is the smallest of all answers",
        _MEASURE,
        "max_rel_error=max([found.max_rel_error",
        "max_rel_error=min([found.max_rel_error",
        MEASURE,
    ),
    Mutant(
        "the strategy has the page faults of the reference",
        _MEASURE,
        "        page_faults_per_call=_page_faults(ours),",
        "        page_faults_per_call=_page_faults(paired),",
        MEASURE,
    ),
    Mutant(
        "the page faults of the reference are those in pairs",
        _MEASURE,
        "reference_page_faults_per_call=_page_faults(alone)",
        "reference_page_faults_per_call=_page_faults(paired)",
        MEASURE,
    ),
    Mutant(
        "the calls of a leak are not counted",
        _MEASURE,
        "rounds.calls.append(calls[-1].calls)",
        "rounds.calls.append(0)",
        MEASURE,
    ),
    Mutant(
        "the reference's own row has its times in pairs",
        _MEASURE,
        "times_s=found.reference_alone_times_s,",
        "times_s=found.reference_times_s,",
        MEASURE,
    ),
    Mutant(
        "the new input is not renewed",
        _CALLS,
        "        self._next_number += 1\n",
        "",
        CALLS,
    ),
    Mutant(
        "a timed call has the input of the last one",
        _CALLS,
        "        self._input, self._next = self._next, self._input\n",
        "",
        CALLS,
    ),
    Mutant(
        "an untimed call has the input of the timed one to come",
        _CALLS,
        "self._answers[self._number] = self._built.timed_forward(self._input)",
        "self._answers[self._number] = self._built.timed_forward(self._next)",
        CALLS,
    ),
    Mutant(
        "an answer is an earlier one if it is its own",
        _CALLS,
        "            if number != self._number\n",
        "",
        CALLS,
    ),
    Mutant(
        "the last result is kept while the next is computed",
        _CALLS,
        "        self.result = None\n\n",
        "\n",
        CALLS,
    ),
    Mutant(
        "the slope of a leak has the wrong sign",
        _CALLS,
        "(after - before) / (later - earlier)",
        "(before - after) / (later - earlier)",
        CALLS,
    ),
    Mutant(
        "a leak is counted per round",
        _CALLS,
        "(after - before) / (later - earlier)",
        "float(after - before)",
        CALLS,
    ),
    Mutant(
        "memory that grows in a few rounds is a leak",
        _CALLS,
        "MIN_LEAK_BYTES = 0.8, 4 * 2**20, 2**18",
        "MIN_LEAK_BYTES = 0.3, 4 * 2**20, 2**18",
        CALLS,
    ),
    Mutant(
        "memory that grows by little in all is a leak",
        _CALLS,
        "MIN_LEAK_BYTES = 0.8, 4 * 2**20, 2**18",
        "MIN_LEAK_BYTES = 0.8, 0, 2**18",
        CALLS,
    ),
    Mutant(
        "a fiftieth of a core counts as busy",
        _CALLS,
        "BUSY_CORES = 0.2",
        "BUSY_CORES = 0.02",
        CALLS,
    ),
    Mutant("a core counts as idle", _CALLS, "BUSY_CORES = 0.2", "BUSY_CORES = 1.0", CALLS),
    Mutant(
        "inputs differ by their brightness alone",
        _INPUTS,
        "number * ROW_STEP",
        "0 * ROW_STEP",
        INPUTS,
    ),
    Mutant("inputs are equally bright", _INPUTS, "DARKEST = 0.5", "DARKEST = 1.0", INPUTS),
    # The schedule and the session.
    Mutant(
        "further processes are planned from the last ones",
        _SCHEDULE,
        "summary.process_speedups[:first]",
        "summary.process_speedups[-first:]",
        SCHEDULE,
    ),
    Mutant(
        "the number of processes grows with the width, not its square",
        _SCHEDULE,
        "ceil(first * narrower**2)",
        "ceil(first * narrower)",
        SCHEDULE,
    ),
    Mutant(
        "any number of processes is planned",
        _SCHEDULE,
        "max(first, min(MAX_PLANNED, ceil(first * narrower**2)))",
        "max(first, ceil(first * narrower**2))",
        SCHEDULE,
    ),
    Mutant(
        "a row that failed gets further processes",
        _SCHEDULE,
        "summary.status == OK and _count(summary)",
        "_count(summary)",
        SCHEDULE,
    ),
    Mutant(
        "the reference has processes of its own",
        _SCHEDULE,
        "if under_load or not case.is_reference or case.grid_point not in paired",
        "if True",
        SCHEDULE,
    ),
    Mutant(
        "all processes of a row follow one another",
        _SCHEDULE,
        "            and (row is None or _count(row) <= number)\n",
        "            and row is None\n",
        SCHEDULE,
    ),
    Mutant(
        "pairs of a process are rounded down",
        _SCHEDULE,
        "-(-options.min_pairs // count)",
        "options.min_pairs // count",
        SCHEDULE,
    ),
    Mutant(
        "each process has all the seconds of a row",
        _SCHEDULE,
        "options.min_seconds / count",
        "options.min_seconds",
        SCHEDULE,
    ),
    Mutant(
        "the reference grows with each process of each strategy",
        _SESSION,
        "case not in self._places or not schedule.wants_more(before, self._config)",
        "case not in self._places",
        SESSION,
    ),
    Mutant(
        "a case that was not planned gets a row",
        _SESSION,
        "if case not in self._places or not schedule",
        "if not schedule",
        SESSION,
    ),
    Mutant(
        "rows are in the order in which they end",
        _SESSION,
        "key=lambda row: places.get(row.case, last)",
        "key=lambda row: last",
        SESSION,
    ),
    Mutant(
        "rows of an earlier run come first",
        _SESSION,
        "places.get(row.case, last)",
        "places.get(row.case, -1)",
        SESSION,
    ),
    Mutant(
        "the time budget is in seconds",
        _SESSION,
        "60 * (options.max_minutes",
        "1 * (options.max_minutes",
        SESSION,
    ),
    Mutant(
        "the time budget ends nothing",
        _SESSION,
        "if time.monotonic() > deadline:",
        "if False:",
        SESSION,
    ),
    Mutant(
        "a time budget that stopped nothing is reported",
        _SESSION,
        'stopped if code or left else ""',
        "stopped",
        SESSION,
    ),
    Mutant(
        "an interrupt ends with exit code 0",
        _SESSION,
        "str(error) or INTERRUPTED, exit_code(error)",
        "str(error) or INTERRUPTED, 0",
        SESSION,
    ),
    Mutant(
        "a row is saved at the end only",
        _SESSION,
        "        self._save(self.run)\n",
        "",
        SESSION,
    ),
    Mutant(
        "each process chooses a strategy of its own",
        _SESSION,
        "Task(case, len(summary.processes), summary.picked)",
        "Task(case, len(summary.processes))",
        SESSION,
    ),
    # Timing.
    Mutant(
        "the order of a round is always the same",
        _TIMING,
        "        generator.shuffle(order)\n",
        "",
        TIMING,
    ),
    Mutant("no warm-up", _TIMING, "for _ in range(warmup):", "for _ in range(0):", TIMING),
    Mutant(
        "the timed call is not settled",
        _TIMING,
        "_settle(settling[index], synchronize, clock)",
        "pass",
        TIMING,
    ),
    Mutant(
        "a single call settles",
        _TIMING,
        "        if clock() >= deadline:\n",
        "        if True:\n",
        TIMING,
    ),
    Mutant(
        "a slow function settles by calls",
        _TIMING,
        "if last.get(index, 0.0) >= LONG_S:",
        "if False:",
        TIMING,
    ),
    Mutant(
        "the barrier is left out before a timed call",
        _TIMING,
        "            before[index]()\n",
        "",
        TIMING,
    ),
    Mutant(
        "timed calls get no new input",
        _TIMING,
        "            if renew is not None:\n                renew[index]()\n",
        "",
        TIMING,
    ),
    Mutant(
        "queued work is timed",
        _TIMING,
        "    synchronize()\n    faults_before",
        "    faults_before",
        TIMING,
    ),
    Mutant(
        "the device is not waited for",
        _TIMING,
        "    synchronize()\n    seconds",
        "    seconds",
        TIMING,
    ),
    Mutant(
        "page faults have the wrong sign",
        _TIMING,
        "faults - faults_before,",
        "faults_before - faults,",
        TIMING,
    ),
    Mutant(
        "either of rounds and seconds ends the timing",
        _TIMING,
        "rounds < min_rounds or clock()",
        "rounds < min_rounds and clock()",
        TIMING,
    ),
    Mutant(
        "samples are in the order of the calls",
        _TIMING,
        "samples[index] for index in range(len(functions))",
        "samples.values()",
        TIMING,
    ),
    # Other processes.
    Mutant(
        "this program counts as another",
        _OTHERS,
        "((after.all_s - before.all_s) - (after.own_s - before.own_s)) / wall",
        "(after.all_s - before.all_s) / wall",
        OTHERS,
    ),
    Mutant(
        "cores that are not needed count",
        _OTHERS,
        "(others - (found.machine - needed)) / needed",
        "others / needed",
        OTHERS,
    ),
    Mutant(
        "the share of others may be negative",
        _OTHERS,
        "min(1.0, max(0.0, (others",
        "min(1.0, max(-1.0, (others",
        OTHERS,
    ),
    Mutant("waiting for a disk is busy", _OTHERS, " - ticks[4]) / os", ") / os", OTHERS),
    Mutant("stolen time is idle", _OTHERS, ".split()[1:9]", ".split()[1:8]", OTHERS),
    Mutant(
        "children that have ended count as others",
        _OTHERS,
        "time.process_time() + ended.children_user + ended.children_system",
        "time.process_time()",
        OTHERS,
    ),
    Mutant(
        "children that run count as others",
        _OTHERS,
        "pids = {*own_pids, *_descendants(os.getpid())}",
        "pids = {*own_pids}",
        OTHERS,
    ),
    Mutant(
        "grandchildren count as others",
        _OTHERS,
        "                yield from _descendants(child)\n",
        "",
        OTHERS,
    ),
    # The answer.
    Mutant(
        "the interval of a tie is what its intervals share",
        _SWEEP,
        "(min(low for low, _ in intervals), max(high for _, high in intervals))",
        "(max(low for low, _ in intervals), min(high for _, high in intervals))",
        SWEEP,
    ),
    Mutant(
        "a tie ignores the number of candidates",
        _SWEEP,
        "(1 - CONFIDENCE) / max(1, len(conclusive) - 1)",
        "(1 - CONFIDENCE)",
        SWEEP,
    ),
    Mutant(
        "the fastest alone is the answer",
        _SWEEP,
        "if row is fastest or log.over(other).interval(confidence)[0] <= 1",
        "if row is fastest",
        SWEEP,
    ),
    Mutant(
        "a tie has the speedup of the fastest",
        _SWEEP,
        "geometric_mean(row.speedup or 1.0 for row in tied)",
        "max(row.speedup or 1.0 for row in tied)",
        SWEEP,
    ),
    Mutant(
        "the first crossing is the break-even",
        _SWEEP,
        "        if not is_significantly_faster(row):\n            break\n",
        "        if not is_significantly_faster(row):\n            continue\n",
        SWEEP,
    ),
    Mutant(
        "an inconclusive N ends the break-even",
        _SWEEP,
        "for row in reversed(conclusive):",
        "for row in reversed(rows):",
        SWEEP,
    ),
    Mutant(
        "faster by the upper bound",
        _SWEEP,
        "not row.inconclusive and interval[0] > 1",
        "not row.inconclusive and interval[1] > 1",
        SWEEP,
    ),
    Mutant(
        "faster although inconclusive",
        _SWEEP,
        "interval is not None and not row.inconclusive and interval[0] > 1",
        "interval is not None and interval[0] > 1",
        SWEEP,
    ),
    Mutant(
        "a build breaks even by the time of a call, not the gain",
        _SWEEP,
        "/ (reference_call - call))",
        "/ call)",
        SWEEP,
    ),
    Mutant(
        "the first call of the reference is for free",
        _SWEEP,
        "(build + first - reference_build - reference_first)",
        "(build + first - reference_build)",
        SWEEP,
    ),
    Mutant(
        "the break-even is over the reference in pairs",
        _SWEEP,
        "call, reference_call = row.median_s, row.reference_median_s",
        "call, reference_call = row.median_s, reference.median_s",
        SWEEP,
    ),
    Mutant(
        "rows within their intervals are out of order",
        _SWEEP,
        "speedup[0] > other_speedup[1] and time_s[0] > other_time_s[1]",
        "speedup[0] > other_speedup[0] and time_s[0] > other_time_s[0]",
        SWEEP,
    ),
    Mutant(
        "the answer claims a speedup within the interval",
        _VERDICT,
        "    if not lead.is_faster:\n",
        "    if lead.speedup <= 1:\n",
        SWEEP,
    ),
    Mutant(
        "the cost is that of the slowest of a tie",
        _VERDICT,
        "_cost(lead.rows[0], references, who)",
        "_cost(lead.rows[-1], references, who)",
        SWEEP,
    ),
    Mutant(
        "a faster row that is inconclusive is left out",
        _VERDICT,
        "or (row.inconclusive and (row.speedup or 0) > lead.speedup)",
        "or False",
        TABLE,
    ),
    Mutant(
        "page faults are blamed for a quarter of a slowdown",
        _VERDICT,
        "faulted < lost / 2",
        "faulted < lost / 4",
        TABLE,
    ),
    Mutant(
        "page faults of all threads follow one another",
        _VERDICT,
        "extra * cost / environment.threads",
        "extra * cost",
        TABLE,
    ),
    Mutant(
        "page faults of the loop are not subtracted",
        _VERDICT,
        "times[0] - times[1], ours - theirs",
        "times[0] - times[1], ours",
        TABLE,
    ),
    Mutant(
        "an effect on the loop of 4 % counts",
        _SUMMARY,
        "INTERFERENCE = 0.05 ",
        "INTERFERENCE = 0.03 ",
        RECORDS,
    ),
    Mutant(
        "an effect on the loop need not be significant",
        _SUMMARY,
        "return slowdown.interval()[0] > 1 and slowdown.mean",
        "return slowdown.mean",
        RECORDS,
    ),
    Mutant(
        "others that take a tenth of the CPU are not noted",
        _VERDICT,
        "others is not None and others > BUSY",
        "others is not None and others > 2 * BUSY",
        TABLE,
    ),
    Mutant(
        "a spread below that within processes is noted",
        _VERDICT,
        "between <= max(within, NOISY / 2)",
        "between <= NOISY / 2",
        TABLE,
    ),
    Mutant(
        "page faults explain two modes of any distance",
        _VERDICT,
        "if gap > MODE_GAP else everything",
        "if gap > 0 else everything",
        TABLE,
    ),
    # The agreement of answers.
    Mutant(
        "an error is relative to the largest logit of all models",
        _AGREEMENT,
        "of_models = of_images.amax(1, keepdim=True)",
        "of_models = of_images.amax().expand(len(of_images), 1)",
        AGREEMENT,
    ),
    Mutant(
        "an image is compared at the scale of its model",
        _AGREEMENT,
        "limits = (tolerance * of_images).maximum(min(tolerance, rounding) * of_models)",
        "limits = tolerance * of_models.expand_as(of_images)",
        AGREEMENT,
    ),
    Mutant(
        "rounding is compared at the scale of its image",
        _AGREEMENT,
        "(tolerance * of_images).maximum(min(tolerance, rounding) * of_models)",
        "tolerance * of_images",
        AGREEMENT,
    ),
    Mutant(
        "another class agrees",
        _AGREEMENT,
        "    if not wrong:\n",
        "    if True:\n",
        AGREEMENT,
    ),
    Mutant(
        "one image that agrees is enough",
        _AGREEMENT,
        "bool((errors <= limits).all())",
        "bool((errors <= limits).any())",
        AGREEMENT,
    ),
    Mutant(
        "the error is that of the first image",
        _AGREEMENT,
        "relative = (errors / of_models).amax(1)",
        "relative = (errors / of_models)[:, 0]",
        AGREEMENT,
    ),
    Mutant(
        "NaN agrees with NaN of the reference",
        _AGREEMENT,
        "if reference.isnan().any() and not nan_agrees:",
        "if False:",
        AGREEMENT,
    ),
    Mutant(
        "infinities agree whatever their sign",
        _AGREEMENT,
        "equal = (logits == reference) |",
        "equal = (logits.abs() == reference.abs()) |",
        AGREEMENT,
    ),
    Mutant(
        "probabilities have the tolerance of logits",
        _AGREEMENT,
        "math.expm1(min(2 * tolerance * largest, 1.0))",
        "math.expm1(min(tolerance, 1.0))",
        AGREEMENT,
    ),
    Mutant(
        "integers need not be equal",
        _AGREEMENT,
        "    if not different.any():\n",
        "    if not different.all():\n",
        AGREEMENT,
    ),
    Mutant(
        "a request at the bound is late",
        _RECORD,
        "latency > settings.bound_s",
        "latency >= settings.bound_s",
        RUN_RECORD,
    ),
    Mutant(
        "refused requests are not late",
        _RECORD,
        " + issued - len(accepted),",
        ",",
        RUN_RECORD,
    ),
    Mutant(
        "the median is reported as the percentile asked for",
        _RECORD,
        "tail_s=latency_percentile(accepted, settings.percentile)",
        "tail_s=latency_percentile(accepted, 0.5)",
        RUN_RECORD,
    ),
    Mutant(
        "unanswered requests count in the latency",
        _RECORD,
        "if sequence_number not in unanswered",
        "if sequence_number >= 0",
        RUN_RECORD,
    ),
    Mutant(
        "wrong answers under load are no problem",
        _RECORD,
        "    elif counters.wrong:",
        "    elif counters.wrong < 0:",
        RUN_RECORD,
    ),
    Mutant(
        "padding is the share that was answered",
        _RECORD,
        "1 - answered / slots",
        "answered / slots",
        RUN_RECORD,
    ),
    Mutant(
        "a larger capacity is later",
        _SEARCH,
        "curve.share(rates * exp(-capacity))",
        "curve.share(rates * exp(capacity))",
        SEARCH,
    ),
    Mutant(
        "the jackknife has the variance of one run",
        _SEARCH,
        "variance = (count - 1) / count * float",
        "variance = 1 / count * float",
        SEARCH,
    ),
    Mutant(
        "an interval of a search is one of 90 %",
        _SEARCH,
        "*rate.interval())",
        "*rate.interval(0.9))",
        SEARCH,
    ),
    Mutant(
        "all runs of a search meet the same arrivals",
        _SEARCH,
        "* spread, 1 + trial)",
        "* spread, 1)",
        SEARCH,
    ),
    Mutant(
        "a search stays where it began",
        _SEARCH,
        "            capacity += min(max(found - capacity, -MAX_CHANGE), MAX_CHANGE)\n",
        "            capacity += 0.0\n",
        SEARCH,
    ),
    Mutant(
        "a search goes down while every rate holds",
        _SEARCH,
        "STEP if not outcomes[-1].late else -STEP",
        "-STEP if not outcomes[-1].late else STEP",
        SEARCH,
    ),
    Mutant(
        "refused requests of the simulation are in time",
        _QUEUE,
        "latency is None or latency > self.bound_s",
        "latency is not None and latency > self.bound_s / 2",
        SEARCH,
    ),
    Mutant(
        "the sustained rate has a late share above the one allowed",
        _QUEUE,
        "if share <= allowed else (low, middle)",
        "if share <= 2 * allowed else (low, middle)",
        SEARCH,
    ),
    Mutant(
        "a load test reports the first run",
        _LOAD,
        "return min(self.runs, key=lambda run: abs((run.offered_qps or 0.0) - qps))",
        "return self.runs[0]",
        LOAD_REPORT,
    ),
    Mutant(
        "the interval of a rate is that of the first process",
        _LOAD,
        "    if len(tests) > 1:\n        return between_process_interval(rates)\n",
        "",
        LOAD_REPORT,
    ),
    Mutant(
        "the slowest process is the row's",
        _LOAD,
        "ordered[(len(ordered) - 1) // 2]",
        "ordered[0]",
        LOAD_REPORT,
    ),
)


def mutated(mutant: Mutant, root: Path) -> str:
    """The text of its file with the edit.

    Raises:
        ValueError: the old text does not occur once: the mutant is out of date.
    """
    text = (root / mutant.file).read_text()
    if (count := text.count(mutant.old)) != 1:
        raise ValueError(
            f"expected one {mutant.old!r} in {mutant.file}, got {count}: {mutant.name}"
        )
    return text.replace(mutant.old, mutant.new)


def first_failure(root: Path, tests: Sequence[str], *, timeout_s: float) -> str | None:
    """The first of these tests that fails in the tree at `root`; None if all pass."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}
    try:
        done = subprocess.run(
            [*PYTEST, *tests],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return "the time limit"
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if done.returncode != 1 or not found:
        raise RuntimeError(f"pytest could not run {tests}:\n{done.stdout[-2000:]}{done.stderr}")
    return found[1].partition("::")[2].partition("[")[0]


def killer(mutant: Mutant, root: Path) -> str | None:
    """The first test that notices a mutant, in a tree that is as it was afterward."""
    path = root / mutant.file
    before, after = path.read_text(), mutated(mutant, root)
    path.write_text(after)
    try:
        return first_failure(root, mutant.tests, timeout_s=TIMEOUT_S)
    finally:
        path.write_text(before)


@contextmanager
def copies(count: int) -> Iterator[list[Path]]:
    """Copies of this tree, without what was compiled from it."""
    with tempfile.TemporaryDirectory() as folder:
        roots = [Path(folder) / str(number) for number in range(count)]
        for root in roots:
            root.mkdir()
            for name in COPIED:
                if (ROOT / name).is_dir():
                    ignored = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(ROOT / name, root / name, ignore=ignored)
                else:
                    shutil.copy(ROOT / name, root / name)
        yield roots


def killers(mutants: Sequence[Mutant]) -> Iterator[str | None]:
    """What kills each mutant, in their order.

    Raises:
        RuntimeError: a test fails without any mutant.
    """
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    with copies(AT_ONCE) as roots, ThreadPoolExecutor(AT_ONCE) as pool:
        if failed := first_failure(roots[0], tests, timeout_s=TIMEOUT_OF_ALL_S):
            raise RuntimeError(f"expected every test to pass before any edit, got {failed}")
        free = SimpleQueue[Path]()
        for root in roots:
            free.put(root)

        def judge(mutant: Mutant) -> str | None:
            root = free.get()
            try:
                return killer(mutant, root)
            finally:
                free.put(root)

        yield from pool.map(judge, mutants)


def lines(mutants: Sequence[Mutant]) -> Iterator[str]:
    """The page, line by line."""
    yield "# Mutants"
    yield ""
    yield (
        f"`python -m tests.studies.mutants` wrote this page: {len(mutants)} edits that make the"
        " program wrong, each alone, and the first of the nearest tests that fails."
    )
    yield ""
    yield "| file | mutant | killed by |"
    yield "| --- | --- | --- |"
    for mutant, test in zip(mutants, killers(mutants), strict=True):
        file = mutant.file.removeprefix("ensemble/")
        yield f"| {file} | {mutant.name} | {test or '**LIVES**'} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, and show it as it grows; of the mutants whose names hold a word, show it
    only. 1 if a mutant lives."""
    words = sys.argv[1:] if argv is None else argv
    chosen = [one for one in MUTANTS if not words or any(word in one.name for word in words)]
    text = []
    for line in lines(chosen):
        print(line, flush=True)
        text.append(line)
    if not words:
        PAGE.write_text("\n".join(text) + "\n")
    return int(any("LIVES" in line for line in text))


if __name__ == "__main__":
    sys.exit(main())
