"""Every flag of the command line, with its default, grouped by purpose. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from itertools import product
from math import inf
from pathlib import Path
from typing import Any, TypeVar

from ensemble.bench.case import SELF_CHECK, Case
from ensemble.strategies import BEST, HYBRIDS, STRATEGIES, TUNE_SECONDS

Number = TypeVar("Number", int, float)
DEFAULT_NUM_MODELS = 2
DEFAULT_IMAGE = "kitten.jpg"
ALL = "all"
# What CUDA graphs alone gain: compared by default on CUDA.
CUDA_GRAPH_OF_LOOP = "cudagraph_loop"


def flag(help: str, *, default: Any = None, **options: Any) -> Any:
    """A field with its flag: `options` are argparse's own; `aliases` are old names of the flag."""
    return field(default=default, metadata={"help": help, **options})


def switch(help: str) -> Any:
    return flag(help, default=False, action="store_true")


def _within(
    least: float, beyond: float, kind: Callable[[str], Number], expected: str
) -> Callable[[str], Number]:
    def parse_number(text: str) -> Number:
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = None
        if value is None or not least <= value < beyond:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
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
channel_count = _within(1, 1025, int, "a whole number from 1 to 1024")
real = _within(-1e6, 1e6, float, "a number between -1e6 and 1e6")
deviation = _within(1e-9, 1e6, float, "a number above 0, below 1e6")
skewness = _within(0, 10.0001, float, "a number from 0 to 10")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """models and inputs"""

    num_models: tuple[int, ...] = flag(
        f"how many models; several: a grid (default: one per file, else {DEFAULT_NUM_MODELS})",
        type=positive,
        nargs="+",
        metavar="N",
    )
    model_path: tuple[str, ...] | None = flag(
        ".pth, .pt or .safetensors: one file for N copies, or one per model"
        " (default: torchvision's, else random weights)",
        nargs="+",
        metavar="PATH",
    )
    arch: str = flag(
        "a torchvision name, timm/NAME, or your function that gives a module:"
        " MODULE:FUNCTION, PATH.py:FUNCTION",
        default="resnet18",
        metavar="NAME",
    )
    output: str | None = flag(
        "of models that give a dict, tuple or list: the tensor to compare", metavar="NAME_OR_INDEX"
    )
    image_path: str | None = flag("the image to classify", default=DEFAULT_IMAGE, metavar="PATH")
    channels: int = flag(
        "of images; 1: grayscale; others: synthetic images",
        type=channel_count,
        default=3,
        metavar="C",
    )
    image_mean: tuple[float, ...] | None = flag(
        "that pixels from 0 to 1 are normalized by: one value or one per channel"
        " (default: ImageNet's; of timm its own)",
        type=real,
        nargs="+",
        metavar="X",
    )
    image_std: tuple[float, ...] | None = flag(
        "standard deviation, likewise", type=deviation, nargs="+", metavar="X"
    )
    image_size: tuple[int, ...] = flag(
        "side of the input in pixels; several: a grid; of timm its own size",
        type=positive,
        nargs="+",
        default=(224,),
        metavar="PX",
    )
    batch_size: tuple[int, ...] = flag(
        "the image and B - 1 augmentations of it; several: a grid",
        type=positive,
        nargs="+",
        default=(1,),
        metavar="B",
    )
    inputs: str = flag(
        "shared: one batch for all models; per_model: a batch each",
        choices=("shared", "per_model"),
        default="shared",
        metavar="WHICH",
    )
    reduce: str = flag(
        "none: all outputs; mean: of the probabilities, or of outputs that are no class logits",
        choices=("none", "mean"),
        default="none",
        metavar="HOW",
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """execution"""

    device: str = flag(
        "auto (an accelerator, else cpu), cpu, cuda:1, xpu, mps", default="auto", metavar="NAME"
    )
    dtype: tuple[str, ...] = flag(
        "float32, tf32 (float32 with TF32 products; CUDA), bfloat16, float16; the reference is"
        " float32",
        choices=("float32", "tf32", "bfloat16", "float16"),
        nargs="+",
        default=("float32",),
        metavar="DTYPE",
    )
    strategies: tuple[str, ...] = flag(
        f"names of --list_strategies; {BEST}: autotuned; {ALL}: every one; your own:"
        f" PATH.py:FUNCTION; on CUDA {CUDA_GRAPH_OF_LOOP} too",
        choices=(*STRATEGIES, *HYBRIDS, ALL),
        nargs="+",
        default=("loop", "vmap", BEST),
        metavar="NAME",
    )
    threads: int | None = flag(
        "CPU threads (default: OMP_NUM_THREADS, or the usable cores)",
        type=thread_count,
        metavar="T",
    )
    allocator: str = flag(
        "system, or retain: glibc keeps freed memory, which avoids page faults",
        choices=("system", "retain"),
        default="system",
        metavar="NAME",
    )
    seed: int = flag(
        "of random weights and augmentations", type=seed_number, default=0, metavar="S"
    )


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """measurement"""

    warmup: int = flag("warm-up calls", type=not_negative, default=1, metavar="CALLS")
    min_pairs: int = flag(
        "minimum pairs of strategy and reference per row", type=positive, default=30, metavar="P"
    )
    min_seconds: float = flag("minimum duration of them", type=seconds, default=2.0, metavar="S")
    processes: int = flag(
        "fresh processes per row; 0: measure in this process, for a debugger",
        type=not_negative,
        default=5,
        metavar="P",
    )
    max_ci_percent: float | None = flag(
        "plan further processes (at most 30 per row) for a 95%% CI half-width below this",
        type=percent,
        metavar="PCT",
        aliases=("precision",),
    )
    tune_seconds: float = flag(
        f"autotuning budget of {BEST}; raise it, and --timeout_minutes, where candidates compile",
        type=seconds,
        default=TUNE_SECONDS,
        metavar="S",
    )
    timeout_minutes: float = flag("worker timeout", type=minutes, default=5.0, metavar="M")
    roofline: bool = switch("add the share of the roofline, from measured device limits")
    flush_l2: bool = switch("CUDA: evict the L2 cache before each timed call")
    self_check: bool = switch("add the reference against itself: the noise floor")
    max_minutes: float | None = flag(
        "start no further row after this time, and list those missing", type=minutes, metavar="M"
    )
    resume: str | None = flag(
        "measure only the rows that an --export_json file lacks", metavar="PATH"
    )


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """load test (MLPerf LoadGen)"""

    scenario: str = flag(
        "single_stream: one request after another; offline: all at once; server: Poisson arrivals",
        choices=("single_stream", "offline", "server"),
    )
    target_qps: float | None = flag(
        "server: requests per second (default: search the highest in the bound)",
        type=rate,
        metavar="R",
    )
    latency_percentile: float = flag(
        "server: percentile of the latency that the bound applies to",
        type=percentile,
        default=99.0,
        metavar="P",
    )
    latency_bound_ms: float | None = flag(
        "server: latency bound (default: 4 times one request by the loop)", type=bound, metavar="MS"
    )
    max_batch: int = flag(
        "maximum batch size; with per_model inputs, of each model",
        type=batch,
        default=4,
        metavar="B",
    )
    max_wait_ms: float = flag("batching delay", type=milliseconds, default=0.0, metavar="MS")
    skew: float = flag(
        "per_model: exponent of Zipf's law for requests per model; 0: uniform",
        type=skewness,
        default=0.0,
        metavar="S",
    )
    load_log: str | None = flag("keep LoadGen's logs in this folder", metavar="DIR")


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """output"""

    export_json: str | None = flag("all results, rewritten after each row", metavar="PATH")
    export_csv: str | None = flag("a summary, one line per row", metavar="PATH")
    export_markdown: str | None = flag("a report with all results", metavar="PATH")
    plot: str | None = flag(
        "speedup and time, .png or .svg; a grid adds a heat map; a load test: latency against rate",
        metavar="PATH",
    )
    export_model: str | None = flag(
        "the models as one file for machines without this package: .pt2 (torch.export),"
        " .aoti.pt2 (AOTInductor), .onnx, or a folder triton_repository/",
        metavar="PATH",
    )
    save: str | None = flag(
        "the fastest strategy with its packed weights and plans, for ensemble.load", metavar="PATH"
    )
    overwrite: bool = switch("replace output files that this program did not write")
    from_json: str | None = flag(
        "measure nothing; show, export, plot or compare an --export_json file", metavar="PATH"
    )
    baseline: str | None = flag("an earlier --export_json file to compare with", metavar="PATH")
    fail_above: float | None = flag(
        "exit code 1 if a row is significantly slower than --baseline by more; 3: inconclusive",
        type=percent,
        metavar="PERCENT",
    )
    list_strategies: bool = switch("list all strategies and what each needs")
    verbose: bool = switch("all columns and rows, top 5 classes, raw times")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A parsed command line. `load` is None unless a scenario was given.

    names_strategies: whether the strategies were named, and are not the default ones.
    names_image_size: likewise of the image size; or it is settled, by the architecture.
    """

    models: ModelOptions
    run: RunOptions
    measure: MeasureOptions
    load: LoadOptions | None
    report: ReportOptions
    names_strategies: bool
    names_image_size: bool

    def for_architecture(self, image_size: int | None) -> Config:
        """The configuration for an architecture with an image size of its own, unless another was
        named; None: it has none, and the default is settled."""
        if self.names_image_size:
            return self
        models = self.models
        if image_size is not None:
            models = replace(models, image_size=(image_size,))
        return replace(self, models=models, names_image_size=True)

    def on(self, device_type: str) -> Config:
        """The configuration on a kind of device: on CUDA the default comparison has a CUDA graph
        of the loop too."""
        if self.names_strategies or device_type != "cuda":
            return self
        *others, last = self.run.strategies
        strategies = (*others, CUDA_GRAPH_OF_LOOP, last)
        return replace(self, run=replace(self.run, strategies=strategies), names_strategies=True)

    def plan(self) -> list[Case]:
        """The cases to measure, in their order: one grid point after another, each case once."""
        names = [(name, dtype) for dtype, name in product(self.run.dtype, self.run.strategies)]
        names += [(SELF_CHECK, "float32")] if self.measure.self_check else []
        models = self.models
        grid_points = product(models.image_size, models.batch_size, models.num_models)
        return [
            Case(name, num_models, batch_size, image_size, dtype, models.inputs)
            for image_size, batch_size, num_models in grid_points
            for name, dtype in dict.fromkeys(names)
        ]

    def plain(self) -> dict[str, Any]:
        """All options in one dict of plain values, as a result file has them."""
        values: dict[str, Any] = {"scenario": None}
        for part in (self.models, self.run, self.measure, self.load, self.report):
            values |= asdict(part) if part is not None else {}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }


PARTS = (ModelOptions, RunOptions, MeasureOptions, LoadOptions, ReportOptions)
# Files that results are written to: not the models.
OUTPUTS = (
    *(
        option.name
        for option in fields(ReportOptions)
        if option.name.startswith("export_") and option.name != "export_model"
    ),
    "plot",
)


def config_of(values: Mapping[str, Any]) -> Config:
    """The configuration of values as `Config.plain` gives them; unknown names are ignored, and
    missing ones have their defaults."""

    def part(kind: type[Any]) -> Any:
        names = {option.name for option in fields(kind)} & values.keys()
        return kind(**{name: _hashable(values[name]) for name in names})

    return Config(
        models=part(ModelOptions),
        run=part(RunOptions),
        measure=part(MeasureOptions),
        load=part(LoadOptions) if values.get("scenario") else None,
        report=part(ReportOptions),
        names_strategies="strategies" in values,
        names_image_size="image_size" in values,
    )


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def default_text(option: Field[Any]) -> str:
    """The default as the help shows it; empty if there is none, or the help text explains it."""
    value = option.default
    if value is None or value is False or value is MISSING:
        return ""
    values = value if isinstance(value, tuple) else (value,)
    return f" (default: {' '.join(map(str, values))})"


def outputs(name: str, path: str) -> tuple[str, ...]:
    """The files that an output option writes: a plot of a grid has a second one."""
    has_grid = name == "plot" and Path(path).name  # "." and "/" have no file name
    return (path, str(grid_path(path))) if has_grid else (path,)


def grid_path(path: str) -> Path:
    """The path of the heat map of a grid, next to the picture at `path`."""
    return Path(path).with_stem(Path(path).stem + "_grid")
