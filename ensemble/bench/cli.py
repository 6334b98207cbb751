"""Parse the command line into a `Config`, or one line that says what is wrong. Imports no torch."""

from __future__ import annotations

import argparse
import os
import site
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from ensemble import user_functions
from ensemble.artifacts.formats import (
    check_destination,
    check_saved_destination,
    format_of,
)
from ensemble.bench.config import (
    ALL,
    DEFAULT_IMAGE,
    DEFAULT_NUM_MODELS,
    OUTPUTS,
    PARTS,
    Config,
    LoadOptions,
    ModelOptions,
    RunOptions,
    config_of,
    default_text,
    outputs,
)
from ensemble.errors import InputError
from ensemble.files import check_writable
from ensemble.machine import cores, launch
from ensemble.strategies import HYBRIDS, STRATEGIES, user

CHECKPOINT_SUFFIXES = {".pth", ".pt", ".safetensors"}
PICTURE_SUFFIXES = {".png", ".svg"}
GRAYSCALE, IMAGE_CHANNELS = 1, 3  # of image files
# Library argument -> flag, where their names differ.
FLAGS = {"paths": "model_path", "path": "export_model"}
LEAVING = ("export_model", "save")  # files of the models themselves
WITH_FROM_JSON = {*OUTPUTS, "overwrite", "from_json", "baseline", "fail_above", "verbose"}


def in_flags(error: InputError) -> str:
    """The message of an error in one line, with the flag in place of the library's argument."""
    flag = f"--{FLAGS.get(error.argument, error.argument)}: " if error.argument else ""
    return flag + " ".join(error.message.split())


class HelpFormatter(argparse.HelpFormatter):
    """argparse's, with wider option names and short lists."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=26, **options)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        many = action.nargs == argparse.ONE_OR_MORE
        return f"{action.metavar} ..." if many else super()._format_args(action, default_metavar)


class Parser(argparse.ArgumentParser):
    """argparse with one-line usage errors that suggest the nearest name."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.dest == "strategies" and user.is_user_strategy(value):
            return
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            near = get_close_matches(str(value), choices, n=1)
            help = f"did you mean {near[0]}?" if near else f"choose from {', '.join(choices)}"
            raise argparse.ArgumentError(action, f"invalid choice: {value!r} ({help})")

    def parse_args(self, *arguments: Any) -> Any:  # type: ignore[override]
        options, unknown = self.parse_known_args(*arguments)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = get_close_matches(unknown[0].partition("=")[0], flags, n=1)
            help = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{help}")
        return options


def make_parser() -> Parser:
    """The parser of all flags, which are the fields of the parts of `Config`.

    It gives the flags that were typed alone: defaults are those of the fields.
    """
    parser = Parser(
        prog="resnet_vmap.py",
        usage="%(prog)s [--FLAG [VALUE ...]] ...",
        description="Run N ResNets in a Python loop and by other strategies, check that all give"
        " the same logits, and report which is the fastest. On several devices: torchrun"
        " --nproc_per_node 2 resnet_vmap.py",
        epilog="Exit codes: 0 success; 1 a strategy failed, its outputs disagree, or --fail_above"
        " was exceeded; 2 invalid input, or an output that cannot be written; 3 --fail_above was"
        " inconclusive; 130, 143, 129 stopped by Ctrl-C, SIGTERM, SIGHUP. Where other processes use"
        " over 25% of the CPU, a speedup is reported only if the fastest calls differ by a factor"
        " of 5",
        formatter_class=HelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for part in PARTS:
        group = parser.add_argument_group(part.__doc__)
        for option in fields(part):
            options = dict(option.metadata)
            help = options.pop("help") + default_text(option)
            old_names = options.pop("aliases", ())
            group.add_argument(f"--{option.name}", help=help, **options)
            for name in old_names:
                hidden = {**options, "dest": option.name, "help": argparse.SUPPRESS}
                group.add_argument(f"--{name}", **hidden)
    return parser


def parse(argv: Sequence[str] | None) -> Config:
    """The command line as a Config; raises InputError for a bad one.

    Under torchrun each rank parses the same line; rank 0 writes and checks the files.
    """
    typed = vars(make_parser().parse_args(argv))
    _check_not_empty(typed)
    if typed.get("from_json"):
        _check_with_from_json(typed)
    else:
        if launch.is_launched():
            _check_ranks(typed)
            typed["processes"] = 0
        _check_load(typed)
    config = _config(typed)
    models, report = config.models, config.report
    _check_channels(models)
    if models.reduce == "mean" and models.inputs == "per_model":
        raise InputError("mean requires --inputs shared, got per_model", argument="reduce")
    if config.measure.resume and not report.export_json:  # continue in the same file
        report = replace(report, export_json=config.measure.resume)
        config = replace(config, report=report)
    for flag in (flag for flag in LEAVING if getattr(report, flag)):
        for name in ("num_models", "image_size"):  # a file has one of each, and any batch size
            if len(values := getattr(models, name)) > 1:
                found = " ".join(map(str, values))
                raise InputError(f"requires one --{name}, got {found}", argument=flag)
    for name in filter(user.is_user_strategy, config.run.strategies):
        user.user_strategy(name).builder()  # imports the file, before a long run finds out
    if launch.rank() == 0:
        check_paths(config)
        warn_of_threads(config.run)
    return config


def _config(typed: dict[str, Any]) -> Config:
    """The configuration of the typed options, with the defaults that depend on others."""
    config = config_of({name: _without_repeats(name, value) for name, value in typed.items()})
    models, run = config.models, config.run
    files = len(models.model_path or ())
    if models.num_models is None:
        models = replace(models, num_models=(files if files > 1 else DEFAULT_NUM_MODELS,))
    if files > 1 and models.num_models != (files,):
        asked = " ".join(map(str, models.num_models))
        raise InputError(f"expected {files}, one per file, got {asked}", argument="num_models")
    if models.channels != IMAGE_CHANNELS and "image_path" not in typed:
        models = replace(models, image_path=None)  # synthetic ones
    elif models.image_path == DEFAULT_IMAGE and not Path(DEFAULT_IMAGE).exists():
        models = replace(models, image_path=str(default_image()))
    if user_functions.names_file(models.arch):
        path, function = user_functions.split_file(models.arch, argument="arch")
        # Absolute, so that workers find it wherever the file changes the working folder to.
        models = replace(models, arch=f"{os.path.abspath(path)}:{function}")
    if ALL in run.strategies:
        run = replace(run, strategies=tuple(STRATEGIES))
    if config.report.export_model:
        exported = format_of(config.report.export_model, argument="export_model").strategy
        run = replace(run, strategies=tuple(dict.fromkeys((*run.strategies, exported))))
    return replace(config, models=models, run=run)


def _check_channels(models: ModelOptions) -> None:
    """Raise InputError unless the image, the mean and the deviation have the images' channels."""
    channels = models.channels
    if models.image_path is not None and channels not in (GRAYSCALE, IMAGE_CHANNELS):
        message = f"expected none with --channels {channels}, whose images are synthetic"
        raise InputError(f"{message}, got {models.image_path}", argument="image_path")
    for name in ("image_mean", "image_std"):
        found = getattr(models, name)
        if found is not None and len(found) not in (1, channels):
            expected = f"one value or {channels}, one per channel" if channels > 1 else "one value"
            raise InputError(f"expected {expected}, got {len(found)}", argument=name)


# Options whose repeated values count: several paths may be the same file.
WITH_REPEATS = ("model_path", "image_mean", "image_std")


def _without_repeats(name: str, value: Any) -> Any:
    """A list without its repeated values."""
    is_set = isinstance(value, list) and name not in WITH_REPEATS
    return list(dict.fromkeys(value)) if is_set else value


def _check_not_empty(options: dict[str, Any]) -> None:
    """Raise InputError for an empty string, as an unset shell variable gives."""
    for name, value in options.items():
        if "" in (value if isinstance(value, list) else [value]):
            raise InputError("expected a value, got an empty one", argument=name)


def warn_of_threads(run: RunOptions) -> None:
    """Warn on stderr of more threads than cores: they wait for each other."""
    found = cores.detect()
    if run.threads and found.max_threads and run.threads > found.max_threads:
        print(
            f"Warning: --threads {run.threads} is more than the cores here ({found.describe()});"
            " oversubscribed threads slow some strategies more than others",
            file=sys.stderr,
        )


def default_image() -> Path:
    """The bundled image: in the checkout, or where pip installs data files, which depends on
    `--target`, a virtual environment, or `--user`."""
    root = Path(__file__).parents[2]
    prefixes = (root, Path(sys.prefix), Path(site.USER_BASE or ""))
    folders = [root, *(prefix / "share" / "resnet-vmap" for prefix in prefixes)]
    paths = [folder / DEFAULT_IMAGE for folder in folders]
    return next((path for path in paths if path.exists()), paths[0])


def _check_with_from_json(typed: Collection[str]) -> None:
    without_effect = [f"--{name}" for name in typed if name not in WITH_FROM_JSON]
    if without_effect:
        raise InputError(
            f"cannot be combined with {', '.join(without_effect)}: it shows an earlier run",
            argument="from_json",
        )


def _check_ranks(typed: Collection[str]) -> None:
    """Raise InputError for flags that do not apply under torchrun."""
    if "processes" in typed:
        message = "cannot be combined with torchrun: rows are measured in its ranks"
        raise InputError(message, argument="processes")
    if "scenario" in typed:
        message = "cannot be combined with torchrun: one process serves the requests"
        raise InputError(message, argument="scenario")
    if "flush_l2" in typed:
        message = "cannot be combined with torchrun: the other ranks would keep their caches"
        raise InputError(message, argument="flush_l2")
    for flag in LEAVING:
        if flag in typed:
            message = "cannot be combined with torchrun: each rank has a part of the models"
            raise InputError(message, argument=flag)


# A load test has single images and no pairs.
NOT_UNDER_LOAD = (
    *("batch_size", "reduce", "roofline", "flush_l2", "self_check", "baseline", "fail_above"),
    *LEAVING,
)


def _check_load(typed: dict[str, Any]) -> None:
    """Raise InputError for flags of a load test without a scenario, or that it has no use for."""
    of_load = {option.name for option in fields(LoadOptions)}
    scenario, hybrids = typed.get("scenario"), set(typed.get("strategies", ())) & set(HYBRIDS)
    if scenario is None:
        for name in sorted(of_load & typed.keys()):
            raise InputError("requires --scenario", argument=name)
        for name in sorted(hybrids):
            raise InputError(f"{name} requires --scenario", argument="strategies")
        return
    of_server = {"target_qps", "latency_percentile", "latency_bound_ms"}
    for name in sorted(typed.keys() & of_server if scenario != "server" else ()):
        raise InputError(f"requires --scenario server, got {scenario}", argument=name)
    for name in sorted(typed.keys() & set(NOT_UNDER_LOAD)):
        raise InputError("cannot be combined with --scenario", argument=name)
    if typed.get("inputs") != "per_model":
        if "skew" in typed:
            raise InputError("requires --inputs per_model", argument="skew")
        for name in sorted(hybrids):
            raise InputError(f"{name} requires --inputs per_model", argument="strategies")
    log = typed.get("load_log")
    if log is not None:
        _check_log_folder(log)
    if find_spec("mlperf_loadgen") is None:
        message = "requires the package mlcommons-loadgen: pip install -r requirements-peers.txt"
        raise InputError(message, argument="scenario")


def _check_log_folder(path: str) -> None:
    """Raise InputError unless the folder, or the nearest one above it that exists, is writable."""
    folder = Path(path).absolute()
    with _os_errors_as_input_errors(path, "load_log"):
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            raise InputError(f"expected a folder, got a file at {folder}", argument="load_log")
    check_writable(folder, argument="load_log")


def check_paths(config: Config) -> None:
    """Raise InputError unless every file can be written, before a long run finds out."""
    models, report, resume = config.models, config.report, config.measure.resume
    if report.fail_above is not None and report.baseline is None:
        raise InputError("requires --baseline", argument="fail_above")
    read = [models.image_path, *(models.model_path or ()), report.baseline, report.from_json]
    if resume != report.export_json:
        read.append(resume)
    taken = {os.path.realpath(path): f"the input {path}" for path in read if path}
    for name in OUTPUTS:
        path = getattr(report, name)
        for written in () if path is None else outputs(name, path):
            # The file that a run continues in was read already, as a result file.
            if name != "export_json" or written != resume:
                _check_output(name, written, taken)
            taken[os.path.realpath(written)] = f"--{name} {path}"
    if exported := report.export_model:
        if other := taken.get(os.path.realpath(exported)):
            raise InputError(f"expected a separate file, got {other}", argument="export_model")
        check_destination(exported, overwrite=report.overwrite, argument="export_model")
        taken[os.path.realpath(exported)] = f"--export_model {exported}"
    if saved := report.save:
        if other := taken.get(os.path.realpath(saved)):
            raise InputError(f"expected a separate file, got {other}", argument="save")
        check_saved_destination(saved, overwrite=report.overwrite, argument="save")


def _check_output(name: str, path: str, taken: dict[str, str]) -> None:
    with _os_errors_as_input_errors(path, name):
        folder, problem = _output_folder(path), _problem_of_output(name, path, taken)
    if problem:
        raise InputError(problem, argument=name)
    check_writable(folder, argument=name)


def _output_folder(path: str) -> Path:
    """The folder that an output is written to: a symbolic link is followed."""
    return Path(os.path.realpath(path) if os.path.islink(path) else path).parent


def _problem_of_output(name: str, path: str, taken: dict[str, str]) -> str:
    other = taken.get(os.path.realpath(path))
    suffix, folder = Path(path).suffix.lower(), _output_folder(path)
    problem = ""
    if other is not None:
        problem = f"expected a separate file, got {other}"
    elif suffix in CHECKPOINT_SUFFIXES:  # the default weights file, named by mistake
        problem = f"expected a file to write, got a checkpoint's name, {path}"
    elif name == "plot" and suffix not in PICTURE_SUFFIXES:
        known = " or ".join(sorted(PICTURE_SUFFIXES))
        problem = f"expected a name that ends in {known}, got {path}"
    elif not folder.is_dir():
        problem = f"expected a folder at {folder}, got none"
    elif Path(path).exists() and not Path(path).is_file():
        problem = f"expected a file at {path}, got a directory or a device"
    return problem


@contextmanager
def _os_errors_as_input_errors(path: str, argument: str) -> Iterator[None]:
    """Convert the errors of looking at a path, such as a name that is too long."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}", argument=argument) from error
