"""Every flag of the command line, its default and what it takes. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from math import inf
from pathlib import Path
from typing import Any, TypeVar

from ensemble.bench.records import SELF_CHECK, Case
from ensemble.strategies import (
    BEST,
    HYBRIDS,
    STRATEGIES,
    TUNE_SECONDS,
)

Number = TypeVar("Number", int, float)
DEFAULT_NUM_MODELS = 2
DEFAULT_IMAGE = "kitten.jpg"
ALL = "all"


def flag(group: str, help: str, **options: Any) -> Any:
    """A field of `Config` with its flag: `options` are argparse's own."""
    return field(metadata={"group": group, "help": help, **options})


def switch(group: str, help: str) -> Any:
    return flag(group, help, action="store_true")


def _within(
    least: float, beyond: float, kind: Callable[[str], Number], expected: str
) -> Callable[[str], Number]:
    def parse_number(text: str) -> Number:
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = None
        if value is None or not least <= value < beyond:
            raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}")
        return value

    return parse_number


positive = _within(1, 10**6 + 1, int, "a whole number from 1 to 1,000,000")
not_negative = _within(0, inf, int, "a whole number of at least 0")
thread_count = _within(1, 1025, int, "a whole number from 1 to 1024")
# What torch's generators take, with room for one a model and an image.
seed_number = _within(0, 2**62, int, "a whole number from 0 to 2**62")
minutes = _within(1e-9, 1e6, float, "a number of minutes above 0, below a million")
seconds = _within(0, inf, float, "a number of seconds of at least 0")
percent = _within(0, inf, float, "a number of percent of at least 0")

rate = _within(1e-9, inf, float, "a number of requests per second above 0")
milliseconds = _within(0, inf, float, "a number of milliseconds of at least 0")
bound = _within(1e-9, inf, float, "a number of milliseconds above 0")
percentile = _within(50, 99.9001, float, "a percentile from 50 to 99.9")
batch = _within(1, 1025, int, "a whole number from 1 to 1024")
skewness = _within(0, 10.0001, float, "a number from 0 to 10")

SERVE, RUN, MEASURE, SHOW = "what to serve", "how to run", "how to measure", "what to show"
LOAD = "under load"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What was asked for: the command line, with defaults filled in. A field is a flag."""

    num_models: tuple[int, ...] = flag(
        SERVE,
        f"how many models; several: a grid (default: one per file, else {DEFAULT_NUM_MODELS})",
        type=positive,
        nargs="+",
        metavar="N",
    )
    model_path: tuple[str, ...] | None = flag(
        SERVE,
        ".pth, .pt or .safetensors: one file for N copies, or one per model"
        " (default: torchvision's, else random weights)",
        nargs="+",
        metavar="PATH",
    )
    arch: str = flag(SERVE, "a torchvision classifier", default="resnet18", metavar="NAME")
    image_path: str = flag(SERVE, "the image to predict", default=DEFAULT_IMAGE, metavar="PATH")
    image_size: tuple[int, ...] = flag(
        SERVE,
        "side of the input; several: a grid",
        type=positive,
        nargs="+",
        default=[224],
        metavar="PX",
    )
    batch_size: tuple[int, ...] = flag(
        SERVE,
        "the image, B - 1 augmented ones; or a grid",
        type=positive,
        nargs="+",
        default=[1],
        metavar="B",
    )
    inputs: str = flag(
        SERVE,
        "shared: one batch for all models; per_model: one for each (N tenants)",
        choices=("shared", "per_model"),
        default="shared",
        metavar="WHICH",
    )
    reduce: str = flag(
        SERVE,
        "none: all logits; mean: the mean of the probabilities",
        choices=("none", "mean"),
        default="none",
        metavar="HOW",
    )
    device: str = flag(
        RUN,
        "auto (an accelerator or cpu), cpu, cuda:1, xpu, mps",
        default="auto",
        metavar="NAME",
    )
    dtype: tuple[str, ...] = flag(
        RUN,
        "float32, bfloat16, float16; the reference: float32",
        choices=("float32", "bfloat16", "float16"),
        nargs="+",
        default=["float32"],
        metavar="DTYPE",
    )
    strategies: tuple[str, ...] = flag(
        RUN,
        f"names of --list_strategies; {BEST}: the fastest here, found by trying; {ALL}: every one",
        choices=(*STRATEGIES, *HYBRIDS, ALL),
        nargs="+",
        default=["loop", "vmap", BEST],
        metavar="NAME",
    )
    threads: int | None = flag(
        RUN,
        "CPU threads (default: OMP_NUM_THREADS, or the usable cores)",
        type=thread_count,
        metavar="T",
    )
    allocator: str = flag(
        RUN,
        "system, or retain: keep freed memory (glibc), where page faults explain a loss",
        choices=("system", "retain"),
        default="system",
        metavar="NAME",
    )
    seed: int = flag(
        RUN, "of random weights and augmented images", type=seed_number, default=0, metavar="S"
    )
    warmup: int = flag(
        MEASURE,
        "untimed calls before the pairs",
        type=not_negative,
        default=1,
        metavar="CALLS",
    )
    min_pairs: int = flag(
        MEASURE,
        "pairs with the reference, at least",
        type=positive,
        default=20,
        metavar="P",
    )
    min_seconds: float = flag(
        MEASURE,
        "and for at least so long",
        type=seconds,
        default=2.0,
        metavar="S",
    )
    processes: int = flag(
        MEASURE,
        "fresh ones per row, at most; 0: this one, for a debugger",
        type=not_negative,
        default=4,
        metavar="P",
    )
    precision: float = flag(
        MEASURE,
        "add processes beyond 3 until half of the interval is below this",
        type=percent,
        default=5.0,
        metavar="PERCENT",
    )
    tune_seconds: float = flag(
        MEASURE,
        f"begin no further candidate of {BEST} after so long; raise it, and --timeout_minutes,"
        " where each one compiles",
        type=seconds,
        default=TUNE_SECONDS,
        metavar="S",
    )
    timeout_minutes: float = flag(
        MEASURE,
        "give up what is silent for so long",
        type=minutes,
        default=5.0,
        metavar="M",
    )
    roofline: bool = switch(MEASURE, "add the share of this device's measured limits")
    self_check: bool = switch(MEASURE, "add the reference against itself: the noise floor")
    max_minutes: float | None = flag(
        MEASURE,
        "start no row after so long, and say what is missing",
        type=minutes,
        metavar="M",
    )
    resume: str | None = flag(
        MEASURE,
        "measure only what an --export_json file lacks",
        metavar="PATH",
    )
    scenario: str | None = flag(
        LOAD,
        "how many requests per second, at which latency, by MLPerf's LoadGen: single_stream, one"
        " after another; offline, all at once; server, at random times",
        choices=("single_stream", "offline", "server"),
    )
    target_qps: float | None = flag(
        LOAD,
        "server: requests per second (default: the most that keep the bound, searched)",
        type=rate,
        metavar="R",
    )
    latency_percentile: float = flag(
        LOAD,
        "server: so many percent of the requests keep the bound",
        type=percentile,
        default=99.0,
        metavar="P",
    )
    latency_bound_ms: float | None = flag(
        LOAD,
        "server: the bound, from arrival to answer (default: 4 times what the loop takes for one)",
        type=bound,
        metavar="MS",
    )
    max_batch: int = flag(
        LOAD,
        "requests that are computed together, at most; of each model for per_model inputs",
        type=batch,
        default=4,
        metavar="B",
    )
    max_wait_ms: float = flag(
        LOAD,
        "wait so long for company",
        type=milliseconds,
        default=0.0,
        metavar="MS",
    )
    skew: float = flag(
        LOAD,
        "per_model: requests per model by Zipf's law, 1, 2**-S, 3**-S; 0: all alike",
        type=skewness,
        default=0.0,
        metavar="S",
    )
    load_log: str | None = flag(LOAD, "keep LoadGen's own logs in this folder", metavar="DIR")
    export_json: str | None = flag(SHOW, "write everything, after each row", metavar="PATH")
    export_csv: str | None = flag(SHOW, "the same as a table for a spreadsheet", metavar="PATH")
    export_markdown: str | None = flag(SHOW, "the same as a page to read", metavar="PATH")
    plot: str | None = flag(
        SHOW,
        "time and speedup against N, .png or .svg; of a grid, a heat map too; under load,"
        " latency against the offered rate",
        metavar="PATH",
    )
    overwrite: bool = switch(SHOW, "replace files that this program did not write, too")
    from_json: str | None = flag(
        SHOW,
        "measure nothing: show, export, draw or compare an --export_json file",
        metavar="PATH",
    )
    baseline: str | None = flag(
        SHOW, "an earlier --export_json file to compare with", metavar="PATH"
    )
    fail_above: float | None = flag(
        SHOW,
        "exit code 1: some row is surely slower than in --baseline by more; 3: not all judged",
        type=percent,
        metavar="PERCENT",
    )
    list_strategies: bool = switch(SHOW, "what strategies there are, and what each needs")
    verbose: bool = switch(SHOW, "all columns and rows, the top 5 classes, raw times")

    def plan(self) -> list[Case]:
        """The rows to measure, in their order: cell by cell of the grid, each once."""
        names = [(name, dtype) for dtype, name in product(self.dtype, self.strategies)]
        names += [(SELF_CHECK, "float32")] if self.self_check else []
        cells = product(self.image_size, self.batch_size, self.num_models)
        return [
            Case(name, num_models, batch_size, image_size, dtype, self.inputs)
            for image_size, batch_size, num_models in cells
            for name, dtype in dict.fromkeys(names)
        ]

    def plain(self) -> dict[str, Any]:
        """As a result file has it: tuples are lists there."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


OUTPUTS = (*(field.name for field in fields(Config) if field.name.startswith("export_")), "plot")


def outputs(name: str, path: str) -> tuple[str, ...]:
    """The files that an output option writes: a plot of a grid has a second one."""
    return (path, str(grid_path(path))) if name == "plot" else (path,)


def grid_path(path: str) -> Path:
    """Where the heat map of a grid goes, beside the picture at `path`."""
    return Path(path).with_stem(Path(path).stem + "_grid")
