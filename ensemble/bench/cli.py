"""From a command line to a `Config`, or to the one line that says what is wrong. No torch."""

from __future__ import annotations

import argparse
import os
import site
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from ensemble.bench.config import (
    ALL,
    DEFAULT_IMAGE,
    DEFAULT_NUM_MODELS,
    LOAD,
    OUTPUTS,
    Config,
    outputs,
)
from ensemble.errors import InputError
from ensemble.machine import cores, launch
from ensemble.strategies import HYBRIDS, STRATEGIES

CHECKPOINT_SUFFIXES = {".pth", ".pt", ".safetensors"}
PICTURE_SUFFIXES = {".png", ".svg"}
# Flags whose name is another than that of the argument which the library knows them by.
FLAGS = {"paths": "model_path"}
BESIDE_FROM_JSON = {*OUTPUTS, "overwrite", "from_json", "baseline", "fail_above", "verbose"}


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

    def _check_value(self, action: argparse.Action, value: Any) -> None:
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
    """The parser of all flags, made of the fields of `Config`."""
    parser = Parser(
        prog="resnet_vmap.py",
        usage="%(prog)s [--FLAG [VALUE ...]] ...",
        description="Run N ResNets by a Python loop and by other strategies, check that all compute"
        " the same logits, and say which is fastest here. On several devices: torchrun"
        " --nproc_per_node 2 resnet_vmap.py",
        epilog="Exit codes: 0 all ran and agreed; 1 a strategy failed, disagrees, or is slower than"
        " --fail_above allows; 2 bad input or output; 3 --fail_above could not judge every row;"
        " 130, 143, 129 stopped by Ctrl-C, SIGTERM, SIGHUP. Where other programs take over 25% of"
        " the CPU a winner needs fastest calls that differ by 5 times: lost time slices mislead",
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
    options, typed = vars(parser.parse_args(argv)), _typed(parser, argv)
    _check_not_empty(options)
    if options["from_json"]:
        _check_beside_from_json(typed)
    else:
        if launch.is_launched():
            _check_ranks(typed)
            options["processes"] = 0
        _check_load(typed, options)
    config = Config(**_filled_in(options))
    if config.reduce == "mean" and config.inputs == "per_model":
        message = "expected --inputs shared with it: tenants have no mean, found per_model"
        raise InputError(message, argument="reduce")
    if config.resume and not config.export_json:
        config = replace(config, export_json=config.resume)  # it goes on in its own file
    if launch.rank() == 0:
        check_paths(config)
        warn_of_threads(config)
    return config


def _check_not_empty(options: dict[str, Any]) -> None:
    """Raise InputError for an empty string, as an unset shell variable gives."""
    for name, value in options.items():
        if "" in (value if isinstance(value, list) else [value]):
            raise InputError("expected a value, found an empty one", argument=name)


def warn_of_threads(config: Config) -> None:
    """Say on stderr that more threads than cores are asked for: they wait for each other."""
    found = cores.find()
    if config.threads and found.whole and config.threads > found.whole:
        print(
            f"Warning: --threads {config.threads}: more than the cores here ({found.words()});"
            " threads that wait for a core slow the strategies down, unequally so",
            file=sys.stderr,
        )


def _filled_in(options: dict[str, Any]) -> dict[str, Any]:
    """The options with the defaults that depend on others, as `Config` has them."""
    paths = options["model_path"]
    files = len(paths) if paths and len(paths) > 1 else None  # one for each model
    if options["num_models"] is None:
        options["num_models"] = [files or DEFAULT_NUM_MODELS]
    if files and options["num_models"] != [files]:
        asked = " ".join(map(str, options["num_models"]))
        raise InputError(f"expected {files}, one per file, found {asked}", argument="num_models")
    if ALL in options["strategies"]:
        options["strategies"] = list(STRATEGIES)
    if options["image_path"] == DEFAULT_IMAGE and not Path(DEFAULT_IMAGE).exists():
        options["image_path"] = str(default_image())
    return {
        name: tuple(dict.fromkeys(value) if name != "model_path" else value)
        if isinstance(value, list)
        else value
        for name, value in options.items()
    }


def default_image() -> Path:
    """The bundled image: in the checkout, or where pip installs data files, which depends on
    `--target`, a virtual environment, or `--user`."""
    root = Path(__file__).parents[2]
    prefixes = (root, Path(sys.prefix), Path(site.USER_BASE or ""))
    folders = [root, *(prefix / "share" / "resnet-vmap" for prefix in prefixes)]
    paths = [folder / DEFAULT_IMAGE for folder in folders]
    return next((path for path in paths if path.exists()), paths[0])


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
