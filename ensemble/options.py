"""The command line: every flag, its default and what it takes, in one place. Imports no torch."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from math import inf
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ensemble.errors import InputError
from ensemble.machine import launch
from ensemble.strategies import BEST, STRATEGIES

Number = TypeVar("Number", int, float)
DEFAULT_NUM_MODELS = 2
DEFAULT_IMAGE = "kitten.jpg"
CHECKPOINT_SUFFIXES = {".pth", ".pt", ".safetensors"}
PICTURE_SUFFIXES = {".png", ".svg"}
OUTPUTS = ("export_json", "export_csv", "export_markdown", "plot")
BESIDE_FROM_JSON = {*OUTPUTS, "from_json", "baseline", "fail_above", "verbose"}
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
# What torch's generators take, with room for one a model and a view.
seed_number = _within(0, 2**62, int, "a whole number from 0 to 2**62")
minutes = _within(1e-9, inf, float, "a number of minutes above 0")
seconds = _within(0, inf, float, "a number of seconds of at least 0")
percent = _within(0, inf, float, "a number of percent of at least 0")

SERVE, RUN, MEASURE, SHOW = "what to serve", "how to run", "how to measure", "what to show"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What was asked for: the command line, with defaults filled in. A field is a flag."""

    num_models: tuple[int, ...] = flag(
        SERVE,
        "models in the ensemble; several values are measured one after another"
        f" (default: one per file, {DEFAULT_NUM_MODELS} with a single file)",
        type=positive,
        nargs="+",
        metavar="N",
    )
    model_path: tuple[str, ...] | None = flag(
        SERVE,
        ".pth, .pt or .safetensors; one file gives N independent copies, K files K different"
        " models (default: torchvision's file for the architecture, else its download, else random"
        " weights)",
        nargs="+",
        metavar="PATH",
    )
    arch: str = flag(
        SERVE, "a torchvision classification architecture", default="resnet18", metavar="NAME"
    )
    image_path: str = flag(SERVE, "the image to predict", default=DEFAULT_IMAGE, metavar="PATH")
    image_size: tuple[int, ...] = flag(
        SERVE,
        "side of the model's input; several values make a grid",
        type=positive,
        nargs="+",
        default=[224],
        metavar="PX",
    )
    batch_size: tuple[int, ...] = flag(
        SERVE,
        "images in a batch: the plain image and B - 1 augmented ones; several make a grid",
        type=positive,
        nargs="+",
        default=[1],
        metavar="B",
    )
    inputs: str = flag(
        SERVE,
        "per_model when each model gets a batch of its own (N tenants), not one for all",
        choices=("shared", "per_model"),
        default="shared",
    )
    reduce: str = flag(
        SERVE,
        "mean when an ensemble's answer is asked, the mean of the models' probabilities, and not"
        " the logits of each",
        choices=("none", "mean"),
        default="none",
    )
    device: str = flag(
        RUN, "auto (the accelerator if there is one), cpu, cuda, cuda:1, xpu, mps", default="auto"
    )
    dtype: tuple[str, ...] = flag(
        RUN,
        "float32, bfloat16, float16: of weights and inputs; the reference stays the float32 loop",
        choices=("float32", "bfloat16", "float16"),
        nargs="+",
        default=["float32"],
        metavar="DTYPE",
    )
    strategies: tuple[str, ...] = flag(
        RUN,
        f"names of --list_strategies; {BEST}: the loop and the one expected to be the fastest here;"
        f" {ALL}: every one",
        choices=(*STRATEGIES, BEST, ALL),
        nargs="+",
        default=["loop", "vmap"],
        metavar="NAME",
    )
    threads: int | None = flag(
        RUN, "CPU threads for torch (default: the cores)", type=thread_count, metavar="T"
    )
    allocator: str = flag(
        RUN,
        "retain when page faults explain a loss on the CPU: freed memory is kept (glibc)",
        choices=("system", "retain"),
        default="system",
    )
    seed: int = flag(
        RUN, "for random weights and augmented images", type=seed_number, default=0, metavar="S"
    )
    warmup: int = flag(
        MEASURE,
        "untimed calls of each strategy and of the reference beside it",
        type=not_negative,
        default=3,
        metavar="CALLS",
    )
    min_pairs: int = flag(
        MEASURE,
        "time at least so many pairs of reference and strategy",
        type=positive,
        default=20,
        metavar="P",
    )
    min_seconds: float = flag(
        MEASURE,
        "and for at least so long; raise it on a noisy machine",
        type=seconds,
        default=2.0,
        metavar="S",
    )
    processes: int = flag(
        MEASURE,
        "fresh processes for each row, at most; 0: in this one, for a debugger or a profiler",
        type=not_negative,
        default=5,
        metavar="P",
    )
    precision: float = flag(
        MEASURE,
        "after three processes, more only where half of the interval is wider than this",
        type=percent,
        default=5.0,
        metavar="PERCENT",
    )
    timeout_minutes: float = flag(
        MEASURE,
        "give a process, or a rank of torchrun, up that says nothing for so long",
        type=minutes,
        default=5.0,
        metavar="M",
    )
    roofline: bool = switch(MEASURE, "add how much of this device's measured limits a row reaches")
    self_check: bool = switch(
        MEASURE, "add a row that times the reference against itself: the noise floor"
    )
    max_minutes: float | None = flag(
        MEASURE,
        "start no row after so long; what was not measured is said",
        type=minutes,
        metavar="M",
    )
    resume: str | None = flag(
        MEASURE,
        "go on with the run of an --export_json file: measure only what it lacks",
        metavar="PATH",
    )
    export_json: str | None = flag(SHOW, "write everything, after each row", metavar="PATH")
    export_csv: str | None = flag(SHOW, "the same as a table for a spreadsheet", metavar="PATH")
    export_markdown: str | None = flag(SHOW, "the same as a page to read", metavar="PATH")
    plot: str | None = flag(
        SHOW,
        "draw time and speedup against N, .png or .svg; of a grid, a heat map too",
        metavar="PATH",
    )
    from_json: str | None = flag(
        SHOW,
        "measure nothing: show, export, draw or compare the run of an --export_json file",
        metavar="PATH",
    )
    baseline: str | None = flag(
        SHOW, "compare with the run of an earlier --export_json file", metavar="PATH"
    )
    fail_above: float | None = flag(
        SHOW,
        "with --baseline: exit code 1 where a strategy is surely slower by more than this",
        type=percent,
        metavar="PERCENT",
    )
    list_strategies: bool = switch(SHOW, "print what strategies there are, and what each needs")
    verbose: bool = switch(
        SHOW, "also all columns, the model, the top 5 classes, raw times, why a row failed"
    )

    def plain(self) -> dict[str, Any]:
        """As a result file has it: tuples are lists there."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


def in_flags(error: InputError) -> str:
    """What an error says, in one line, about a flag where the library speaks of an argument."""
    flag = f"--{FLAGS.get(error.argument, error.argument)}: " if error.argument else ""
    return flag + " ".join(error.message.split())


class Parser(argparse.ArgumentParser):
    """argparse, with usage errors in the one-line form of every other error."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def make_parser() -> Parser:
    """The parser of all flags, made of the fields of `Config`."""
    parser = Parser(
        prog="resnet_vmap.py",
        description="Run N ResNets on one device by a Python loop and by other strategies, check"
        " that all compute the same logits, and say which is fastest here, by how much and how"
        " surely.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    for own in fields(Config):
        options = dict(own.metadata)
        name = options.pop("group")
        group = groups.get(name) or groups.setdefault(name, parser.add_argument_group(name))
        group.add_argument(f"--{own.name}", **options)
    return parser


def parse(argv: Sequence[str] | None) -> Config:
    """The command line as a Config; raises InputError for a bad one.

    Under torchrun each rank parses the same line; files are written, and checked, by the first.
    """
    parser = make_parser()
    options = vars(parser.parse_args(argv))
    if options["from_json"]:
        _check_beside_from_json(parser, options)
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
    if launch.is_launched():
        config = replace(config, processes=_no_processes(sys.argv[1:] if argv is None else argv))
    if config.resume and not config.export_json:
        config = replace(config, export_json=config.resume)  # it goes on in its own file
    if launch.rank() == 0:
        check_paths(config)
    return config


def _no_processes(argv: Sequence[str]) -> int:
    """Of worker processes, under torchrun; raises InputError where some were asked for."""
    if any(word.partition("=")[0] == "--processes" for word in argv):
        message = "expected none under torchrun: rows are measured in its ranks themselves"
        raise InputError(message, argument="processes")
    return 0


def default_image() -> Path:
    """The image that comes with the program: beside it, or where `pip install` puts it."""
    beside = Path(__file__).parents[1] / DEFAULT_IMAGE
    return beside if beside.exists() else Path(sys.prefix) / "share" / "resnet-vmap" / DEFAULT_IMAGE


def _check_beside_from_json(parser: Parser, options: dict[str, Any]) -> None:
    given = [name for name, value in options.items() if value != parser.get_default(name)]
    without_effect = [f"--{name}" for name in given if name not in BESIDE_FROM_JSON]
    if without_effect:
        raise InputError(
            f"expected no {', '.join(without_effect)} beside it: it shows a run that was made",
            argument="from_json",
        )


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
