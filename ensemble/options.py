"""The command line: every flag, its default and what it takes. Imports no torch."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import NoReturn, TypeVar

from ensemble.errors import InputError
from ensemble.results import Config
from ensemble.strategies import BEST, STRATEGIES

Number = TypeVar("Number", int, float)
DEFAULT_NUM_MODELS = 2
DEFAULT_IMAGE = "kitten.jpg"
CHECKPOINT_SUFFIXES = {".pth", ".pt", ".safetensors"}
PICTURE_SUFFIXES = {".png", ".svg"}
OUTPUTS = ("export_json", "export_csv", "export_markdown", "plot")
SEVERAL = ("num_models", "batch_size", "image_size", "dtype", "strategies")
ALL = "all"


class Parser(argparse.ArgumentParser):
    """argparse, with usage errors in the one-line form of every other error."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def parse(argv: Sequence[str] | None) -> Config:
    """The command line as a Config; raises InputError for a bad one."""
    options = vars(make_parser().parse_args(argv))
    paths = options["model_path"]
    if options["num_models"] is None:
        options["num_models"] = [len(paths) if paths and len(paths) > 1 else DEFAULT_NUM_MODELS]
    if paths and len(paths) > 1 and options["num_models"] != [len(paths)]:
        asked = " ".join(map(str, options["num_models"]))
        raise InputError(f"--num_models: expected {len(paths)}, one a file, found {asked}")
    if ALL in options["strategies"]:
        options["strategies"] = list(STRATEGIES)
    beside = Path(__file__).parents[1] / DEFAULT_IMAGE
    if options["image_path"] == DEFAULT_IMAGE and not Path(DEFAULT_IMAGE).exists():
        options["image_path"] = str(beside)
    values = {
        name: tuple(dict.fromkeys(value)) if name in SEVERAL else value
        for name, value in options.items()
    }
    config = Config(**values | {"model_path": tuple(paths) if paths else None})
    if config.resume and not config.export_json:
        config = replace(config, export_json=config.resume)  # it goes on in its own file
    check_paths(config)
    return config


def check_paths(config: Config) -> None:
    """Raise InputError unless every file can be written, before a long run finds out."""
    if config.fail_above is not None and config.baseline is None:
        raise InputError("--fail_above: expected --baseline with it, found none")
    if config.resume and config.from_json:
        raise InputError(
            "--resume: expected a run to go on with, found --from_json, which runs none"
        )
    read = [config.image_path, *(config.model_path or ()), config.baseline, config.from_json]
    if config.resume != config.export_json:
        read.append(config.resume)
    taken = {os.path.realpath(path): f"the input {path}" for path in read if path}
    for name in OUTPUTS:
        path = getattr(config, name)
        for written in () if path is None else outputs(name, path):
            # The file that a run goes on in was read already, as a result file.
            if name != "export_json" or written != config.resume:
                _check_output(f"--{name}", written, taken)
            taken[os.path.realpath(written)] = f"--{name} {path}"


def outputs(name: str, path: str) -> tuple[str, ...]:
    """The files that an output option writes: a plot of a grid has a second one."""
    return (path, str(grid_path(path))) if name == "plot" else (path,)


def grid_path(path: str) -> Path:
    """Where the heat map of a grid goes, beside the picture at `path`."""
    return Path(path).with_stem(Path(path).stem + "_grid")


def _check_output(flag: str, path: str, taken: dict[str, str]) -> None:
    other = taken.get(os.path.realpath(path))
    if other is not None:
        raise InputError(f"{flag}: expected a file of its own, found {other}")
    suffix, folder = Path(path).suffix.lower(), Path(path).parent
    if suffix in CHECKPOINT_SUFFIXES:  # the default weights file, named by mistake
        raise InputError(f"{flag}: expected a file to write, found a checkpoint's name, {path}")
    if flag == "--plot" and suffix not in PICTURE_SUFFIXES:
        known = " or ".join(sorted(PICTURE_SUFFIXES))
        raise InputError(f"--plot: expected a name that ends in {known}, found {path}")
    if not folder.is_dir():
        raise InputError(f"{flag}: expected a folder at {folder}, found none")
    if Path(path).exists() and not Path(path).is_file():
        raise InputError(f"{flag}: expected a file at {path}, found a directory or a device")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{flag}: expected to write in {folder}: {reason}") from error


def make_parser() -> Parser:
    """Every flag and its default: the one place where defaults are written."""
    parser = Parser(
        prog="resnet_vmap.py",
        description="Run N ResNets on one device by a Python loop and by other strategies, check"
        " that all compute the same logits, and say which is fastest here, by how much and how"
        " surely.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("what to serve").add_argument
    add(
        "--num_models",
        type=positive,
        nargs="+",
        metavar="N",
        help="models in the ensemble; several values are measured one after another"
        f" (default: one a file, {DEFAULT_NUM_MODELS} with a single file)",
    )
    add(
        "--model_path",
        nargs="+",
        metavar="PATH",
        help=".pth, .pt or .safetensors; one file gives N independent copies, K files K different"
        " models (default: torchvision's file name for the architecture, else its download, else"
        " random weights)",
    )
    add(
        "--arch",
        default="resnet18",
        metavar="NAME",
        help="a torchvision classification architecture that the weights are for",
    )
    add("--image_path", default=DEFAULT_IMAGE, metavar="PATH", help="the image to predict")
    add(
        "--image_size",
        type=positive,
        nargs="+",
        default=[224],
        metavar="PX",
        help="side of the model's input; several values make a grid",
    )
    add(
        "--batch_size",
        type=positive,
        nargs="+",
        default=[1],
        metavar="B",
        help="images in a batch: the plain image and B - 1 augmented views; several make a grid",
    )
    add(
        "--inputs",
        choices=("shared", "per_model"),
        default="shared",
        help="per_model when each model gets a batch of its own (N tenants), not one for all",
    )
    add = parser.add_argument_group("how to run").add_argument
    add(
        "--device",
        default="auto",
        help="auto, cpu, cuda, cuda:1, xpu, mps; auto: the accelerator"
        " if there is one, else the CPU",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        nargs="+",
        default=["float32"],
        metavar="DTYPE",
        help="float32, bfloat16, float16: of weights and inputs; the reference stays the float32"
        " loop",
    )
    add(
        "--strategies",
        nargs="+",
        choices=(*STRATEGIES, BEST, ALL),
        default=["loop", "vmap"],
        metavar="NAME",
        help="; ".join(f"{name}: {s.summary}" for name, s in STRATEGIES.items())
        + f"; {BEST}: the reference and the one expected to be the fastest here; {ALL}: every one",
    )
    add(
        "--threads",
        type=thread_count,
        metavar="T",
        help="CPU threads for torch (default: torch's own choice, the cores)",
    )
    add(
        "--allocator",
        choices=("system", "retain"),
        default="system",
        help="retain when page faults explain a loss on the CPU: freed memory is kept (glibc)",
    )
    add("--seed", type=seed, default=0, metavar="S", help="for random weights and augmented views")
    add = parser.add_argument_group("how to measure").add_argument
    add(
        "--warmup",
        type=not_negative,
        default=3,
        metavar="CALLS",
        help="untimed calls of each strategy and of the reference beside it",
    )
    add(
        "--min_pairs",
        type=positive,
        default=20,
        metavar="P",
        help="time at least so many pairs of reference and strategy",
    )
    add(
        "--min_seconds",
        type=seconds,
        default=2.0,
        metavar="S",
        help="and for at least so long; raise it on a noisy machine",
    )
    add(
        "--roofline",
        action="store_true",
        help="add how much of this device's own measured limits each row reaches",
    )
    add(
        "--self_check",
        action="store_true",
        help="add a row that times the reference against itself: the noise floor",
    )
    add(
        "--max_minutes",
        type=minutes,
        metavar="M",
        help="start no row after so long; what was not measured is said",
    )
    add(
        "--resume",
        metavar="PATH",
        help="go on with the run of a --export_json file: measure only what it lacks",
    )
    add = parser.add_argument_group("what to show").add_argument
    add("--export_json", metavar="PATH", help="write everything measured, after each row")
    add("--export_csv", metavar="PATH", help="the same as a table for a spreadsheet")
    add("--export_markdown", metavar="PATH", help="the same as a page to read")
    add(
        "--plot",
        metavar="PATH",
        help="draw time and speedup against N, .png or .svg; of a grid, a heat map too",
    )
    add(
        "--from_json",
        metavar="PATH",
        help="measure nothing: show, export, draw or compare the run of a --export_json file",
    )
    add("--baseline", metavar="PATH", help="compare with the run of an earlier --export_json file")
    add(
        "--fail_above",
        type=percent,
        metavar="PERCENT",
        help="with --baseline: exit code 1 where a strategy is surely slower by more than this",
    )
    add(
        "--verbose",
        action="store_true",
        help="also print the model, the top 5 classes, every raw time and why a row failed",
    )
    return parser


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _within(1, inf, int, text, "a whole number of at least 1")


def thread_count(text: str) -> int:
    """A number of threads that a machine may have."""
    return _within(1, 1025, int, text, "a whole number from 1 to 1024")


def not_negative(text: str) -> int:
    """A whole number of at least 0."""
    return _within(0, inf, int, text, "a whole number of at least 0")


def seed(text: str) -> int:
    """A whole number that torch's generators take, with room for one a model and a view."""
    return _within(0, 2**62, int, text, "a whole number from 0 to 2**62")


def minutes(text: str) -> float:
    """A finite number of minutes above 0."""
    return _within(1e-9, inf, float, text, "a number of minutes above 0")


def percent(text: str) -> float:
    """A finite share of at least 0, in percent."""
    return _within(0, inf, float, text, "a number of percent of at least 0")


def seconds(text: str) -> float:
    """A finite number of seconds of at least 0."""
    return _within(0, inf, float, text, "a number of seconds of at least 0")


def _within(
    least: float, beyond: float, kind: Callable[[str], Number], text: str, expected: str
) -> Number:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not least <= value < beyond:
        raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}")
    return value
