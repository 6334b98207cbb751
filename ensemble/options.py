"""The command line: every flag, its default and what it takes, in one place. Imports no torch."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ensemble.errors import InputError
from ensemble.machine import launch
from ensemble.strategies import BEST, HYBRIDS, STRATEGIES, TUNE_SECONDS

Number = TypeVar("Number", int, float)
DEFAULT_NUM_MODELS = 2
DEFAULT_IMAGE = "kitten.jpg"
CHECKPOINT_SUFFIXES = {".pth", ".pt", ".safetensors"}
PICTURE_SUFFIXES = {".png", ".svg"}
ALL = "all"
# Flags whose name is another than that of the argument which the library knows them by.
FLAGS = {"paths": "model_path"}


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
        except ValueError:
            value = None
        if value is None or not least <= value < beyond:
            raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}")
        return value

    return parse_number


positive = _within(1, inf, int, "a whole number of at least 1")
not_negative = _within(0, inf, int, "a whole number of at least 0")
thread_count = _within(1, 1025, int, "a whole number from 1 to 1024")
# What torch's generators take, with room for one a model and an image.
seed_number = _within(0, 2**62, int, "a whole number from 0 to 2**62")
minutes = _within(1e-9, inf, float, "a number of minutes above 0")
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
        "how many models; several values are measured one after another"
        f" (default: one per file, else {DEFAULT_NUM_MODELS})",
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
    arch: str = flag(
        SERVE, "a torchvision classification architecture", default="resnet18", metavar="NAME"
    )
    image_path: str = flag(SERVE, "the image to predict", default=DEFAULT_IMAGE, metavar="PATH")
    image_size: tuple[int, ...] = flag(
        SERVE,
        "side of the input; several make a grid",
        type=positive,
        nargs="+",
        default=[224],
        metavar="PX",
    )
    batch_size: tuple[int, ...] = flag(
        SERVE,
        "the image and B - 1 augmented ones; several make a grid",
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
        "auto (an accelerator if there is one), cpu, cuda, cuda:1, xpu, mps",
        default="auto",
        metavar="NAME",
    )
    dtype: tuple[str, ...] = flag(
        RUN,
        "of weights and inputs: float32, bfloat16, float16; the reference stays in float32",
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
        RUN, "CPU threads of torch (default: the cores)", type=thread_count, metavar="T"
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
        "untimed calls of strategy and reference",
        type=not_negative,
        default=3,
        metavar="CALLS",
    )
    min_pairs: int = flag(
        MEASURE,
        "pairs of reference and strategy to time, at least",
        type=positive,
        default=20,
        metavar="P",
    )
    min_seconds: float = flag(
        MEASURE,
        "and for at least so long; more on a noisy machine",
        type=seconds,
        default=2.0,
        metavar="S",
    )
    processes: int = flag(
        MEASURE,
        "fresh processes per row, at most; 0: this one, for a debugger or a profiler",
        type=not_negative,
        default=5,
        metavar="P",
    )
    precision: float = flag(
        MEASURE,
        "more than three processes only where half of the interval is wider than this",
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
        "give up a process or rank that is silent for so long",
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
        "let the oldest request wait so long for company",
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
    load_log: str | None = flag(
        LOAD, "keep LoadGen's own summary and detail logs in this folder", metavar="DIR"
    )
    export_json: str | None = flag(SHOW, "write everything, after each row", metavar="PATH")
    export_csv: str | None = flag(SHOW, "the same as a table for a spreadsheet", metavar="PATH")
    export_markdown: str | None = flag(SHOW, "the same as a page to read", metavar="PATH")
    plot: str | None = flag(
        SHOW,
        "time and speedup against N, .png or .svg; of a grid, a heat map too; under load,"
        " latency against the offered rate",
        metavar="PATH",
    )
    from_json: str | None = flag(
        SHOW,
        "measure nothing: show, export, draw or compare the run of an --export_json file",
        metavar="PATH",
    )
    baseline: str | None = flag(
        SHOW, "an earlier --export_json file to compare with", metavar="PATH"
    )
    fail_above: float | None = flag(
        SHOW,
        "exit code 1 where a strategy is surely slower than in --baseline by more than this",
        type=percent,
        metavar="PERCENT",
    )
    list_strategies: bool = switch(SHOW, "what strategies there are, and what each needs")
    verbose: bool = switch(SHOW, "all columns and rows, the top 5 classes, raw times")

    def plain(self) -> dict[str, Any]:
        """As a result file has it: tuples are lists there."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


OUTPUTS = (*(field.name for field in fields(Config) if field.name.startswith("export_")), "plot")
BESIDE_FROM_JSON = {*OUTPUTS, "from_json", "baseline", "fail_above", "verbose"}


def in_flags(error: InputError) -> str:
    """What an error says, in one line, about a flag where the library speaks of an argument."""
    flag = f"--{FLAGS.get(error.argument, error.argument)}: " if error.argument else ""
    return flag + " ".join(error.message.split())


class HelpFormatter(argparse.HelpFormatter):
    """argparse's, in fewer lines: each default once and only where there is one, short lists."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=26, **options)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.dest == "help":
            return action.help
        values = action.default if isinstance(action.default, list) else [action.default]
        return f"{action.help} (default: {' '.join(map(str, values))})"

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        many = action.nargs == argparse.ONE_OR_MORE
        return f"{action.metavar} ..." if many else super()._format_args(action, default_metavar)


class Parser(argparse.ArgumentParser):
    """argparse, with usage errors in the one-line form of every other error."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def make_parser() -> Parser:
    """The parser of all flags, made of the fields of `Config`."""
    parser = Parser(
        prog="resnet_vmap.py",
        usage="%(prog)s [--FLAG [VALUE ...]] ...",
        description="Run N ResNets by a Python loop and by other strategies, check that all compute"
        " the same logits, and say which is fastest here, by how much and how surely. On several"
        " devices: torchrun --nproc_per_node 2 resnet_vmap.py",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    for option in fields(Config):
        options = dict(option.metadata)
        name = options.pop("group")
        group = groups.get(name) or groups.setdefault(name, parser.add_argument_group(name))
        group.add_argument(f"--{option.name}", **options)
    return parser


def parse(argv: Sequence[str] | None) -> Config:
    """The command line as a Config; raises InputError for a bad one.

    Under torchrun each rank parses the same line; files are written, and checked, by the first.
    """
    parser = make_parser()
    options = vars(parser.parse_args(argv))
    if options["from_json"]:
        _check_beside_from_json(_typed(parser, argv))
    else:
        _check_load(_typed(parser, argv), options)
    paths = options["model_path"]
    if options["num_models"] is None:
        options["num_models"] = [len(paths) if paths and len(paths) > 1 else DEFAULT_NUM_MODELS]
    if paths and len(paths) > 1 and options["num_models"] != [len(paths)]:
        asked = " ".join(map(str, options["num_models"]))
        raise InputError(
            f"expected {len(paths)}, one per file, found {asked}", argument="num_models"
        )
    if ALL in options["strategies"]:
        options["strategies"] = list(STRATEGIES)
    if options["image_path"] == DEFAULT_IMAGE and not Path(DEFAULT_IMAGE).exists():
        options["image_path"] = str(default_image())
    values: dict[str, Any] = {
        name: tuple(dict.fromkeys(value) if name != "model_path" else value)
        if isinstance(value, list)
        else value
        for name, value in options.items()
    }
    config = Config(**values)
    if config.reduce == "mean" and config.inputs == "per_model":
        message = "expected --inputs shared with it: tenants have no mean, found per_model"
        raise InputError(message, argument="reduce")
    if launch.is_launched() and not config.from_json:
        _check_ranks(_typed(parser, argv))
        config = replace(config, processes=0)
    if config.resume and not config.export_json:
        config = replace(config, export_json=config.resume)  # it goes on in its own file
    if launch.rank() == 0:
        check_paths(config)
    return config


def default_image() -> Path:
    """The image that comes with the program: beside it, or where `pip install` puts it."""
    beside = Path(__file__).parents[1] / DEFAULT_IMAGE
    return beside if beside.exists() else Path(sys.prefix) / "share" / "resnet-vmap" / DEFAULT_IMAGE


def _typed(parser: Parser, argv: Sequence[str] | None) -> list[str]:
    """The flags of a command line, those too that were given their default value."""
    untouched = argparse.Namespace(**dict.fromkeys(field.name for field in fields(Config)))
    found = vars(parser.parse_args(argv, untouched))  # a default is put only where nothing is
    return [name for name, value in found.items() if value is not None]


def _check_beside_from_json(typed: Sequence[str]) -> None:
    without_effect = [f"--{name}" for name in typed if name not in BESIDE_FROM_JSON]
    if without_effect:
        raise InputError(
            f"expected no {', '.join(without_effect)} beside it: it shows a run that was made",
            argument="from_json",
        )


def _check_ranks(typed: Sequence[str]) -> None:
    """Raise InputError for flags that do not apply under torchrun."""
    if "processes" in typed:
        message = "expected none under torchrun: rows are measured in its ranks themselves"
        raise InputError(message, argument="processes")
    if "scenario" in typed:
        message = "expected no torchrun beside it: requests are served by one process"
        raise InputError(message, argument="scenario")


# Under load these mean nothing: a request is one image, and nothing is timed in pairs.
NOT_UNDER_LOAD = ("batch_size", "reduce", "roofline", "self_check", "baseline", "fail_above")


def _check_load(typed: Sequence[str], options: dict[str, Any]) -> None:
    """Raise InputError for flags of load without a scenario, or that do not go with it."""
    load = {option.name for option in fields(Config) if option.metadata["group"] == LOAD}
    given = set(typed)
    scenario, asked = options["scenario"], set(options["strategies"])
    if scenario is None:
        for name in sorted(load & given):
            raise InputError("expected --scenario with it, found none", argument=name)
        for name in sorted(asked & set(HYBRIDS)):
            raise InputError(f"{name}: expected --scenario, found none", argument="strategies")
        return
    of_server = {"target_qps", "latency_percentile", "latency_bound_ms"}
    for name in sorted(given & of_server if scenario != "server" else ()):
        raise InputError(f"expected --scenario server with it, found {scenario}", argument=name)
    for name in sorted(given & set(NOT_UNDER_LOAD)):
        raise InputError("expected no --scenario beside it, found one", argument=name)
    if options["inputs"] != "per_model":
        if "skew" in given:
            raise InputError("expected --inputs per_model with it, found shared", argument="skew")
        for name in sorted(asked & set(HYBRIDS)):
            message = f"{name}: expected --inputs per_model, found shared"
            raise InputError(message, argument="strategies")
    log = options["load_log"]
    if log is not None and Path(log).exists() and not Path(log).is_dir():
        raise InputError(f"expected a folder, found a file at {log}", argument="load_log")
    if find_spec("mlperf_loadgen") is None:
        message = "expected the package mlcommons-loadgen (requirements-peers.txt), found none"
        raise InputError(message, argument="scenario")


def check_paths(config: Config) -> None:
    """Raise InputError unless every file can be written, before a long run finds out."""
    if config.fail_above is not None and config.baseline is None:
        raise InputError("expected --baseline with it, found none", argument="fail_above")
    read = [config.image_path, *(config.model_path or ()), config.baseline, config.from_json]
    if config.resume != config.export_json:
        read.append(config.resume)
    taken = {os.path.realpath(path): f"the input {path}" for path in read if path}
    for name in OUTPUTS:
        path = getattr(config, name)
        for written in () if path is None else outputs(name, path):
            # The file that a run goes on in was read already, as a result file.
            if name != "export_json" or written != config.resume:
                _check_output(name, written, taken)
            taken[os.path.realpath(written)] = f"--{name} {path}"


def outputs(name: str, path: str) -> tuple[str, ...]:
    """The files that an output option writes: a plot of a grid has a second one."""
    return (path, str(grid_path(path))) if name == "plot" else (path,)


def grid_path(path: str) -> Path:
    """Where the heat map of a grid goes, beside the picture at `path`."""
    return Path(path).with_stem(Path(path).stem + "_grid")


def _check_output(name: str, path: str, taken: dict[str, str]) -> None:
    other = taken.get(os.path.realpath(path))
    suffix, folder = Path(path).suffix.lower(), Path(path).parent
    problem = ""
    if other is not None:
        problem = f"expected a file of its own, found {other}"
    elif suffix in CHECKPOINT_SUFFIXES:  # the default weights file, named by mistake
        problem = f"expected a file to write, found a checkpoint's name, {path}"
    elif name == "plot" and suffix not in PICTURE_SUFFIXES:
        known = " or ".join(sorted(PICTURE_SUFFIXES))
        problem = f"expected a name that ends in {known}, found {path}"
    elif not folder.is_dir():
        problem = f"expected a folder at {folder}, found none"
    elif Path(path).exists() and not Path(path).is_file():
        problem = f"expected a file at {path}, found a directory or a device"
    if problem:
        raise InputError(problem, argument=name)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"expected to write in {folder}: {reason}", argument=name) from error
