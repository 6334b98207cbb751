"""Serve N ResNets on one device: a Python loop, or one vmapped forward? Measured, checked, told.

python resnet_vmap.py --num_models 4
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from ensemble.errors import InputError
from ensemble.results import Config, Environment, Result, save_json
from ensemble.strategies import STRATEGIES

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Number = TypeVar("Number", int, float)
DEFAULT_NUM_MODELS = 2
DEFAULT_IMAGE = "kitten.jpg"
CHECKPOINT_SUFFIXES = {".pth", ".pt", ".safetensors"}
ALL = "all"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, load, run, show, export; returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a letter of the table
    try:
        config = parse(argv)
        check_output(config)
        code = run(config)
        sys.stdout.flush()
        return code
    except InputError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head`: who reads the output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def run(config: Config) -> int:
    """The program, once its command line is known. torch is imported here and not before."""
    from ensemble import benchmark, devices, images, memory, progress

    logging.basicConfig()
    logging.getLogger("ensemble").setLevel(logging.DEBUG if config.verbose else logging.WARNING)
    refused = memory.retain_freed_memory() if config.allocator == "retain" else None
    if refused:
        raise InputError(f"--allocator: retain cannot be had here: {refused}")
    devices.configure(threads=config.threads)
    device = devices.select_device(config.device)

    count = config.batch_size * (max(config.num_models) if config.inputs == "per_model" else 1)
    image = images.read_image(config.image_path)
    views = images.views(image, count, image_size=config.image_size, seed=config.seed).to(device)
    models, weights = load_models(config, device)
    print(f"Loading image from {config.image_path}")
    print(f"Converted image to shape {views[:1].shape}")
    if config.verbose:
        print(models[0])
    first_forward_s = predict(config, models, views[:1])

    print("Serving multiple models")
    chosen = f"{device}, the accelerator here" if device.type != "cpu" else "the CPU"
    print(f"Running on {chosen}" + (" (--device auto)" if config.device == "auto" else ""))
    environment = devices.describe(
        device, allocator=config.allocator, weights=weights, first_forward_s=first_forward_s
    )
    results: list[Result] = []
    interrupted, unsaved = False, ""
    rows = len(config.num_models) * len(benchmark.row_names(config))
    try:
        with progress.show_progress(rows) as update:
            for result in benchmark.run(config, models, views, progress=update):
                results.append(result)
                if config.export_json and not unsaved:
                    unsaved = save(config.export_json, environment, config, results)
    except KeyboardInterrupt:
        interrupted = True
    show(config, results, environment)
    if unsaved:
        raise InputError(unsaved)
    if interrupted:
        print(f"interrupted: {len(results)} of {rows} rows were measured", file=sys.stderr)
        return 130
    return exit_code(config, results)


def load_models(config: Config, device: torch.device) -> tuple[list[nn.Module], str]:
    """The models of the run, and where their weights come from in a few words."""
    from urllib.error import URLError

    from ensemble import pretrained, weights

    weights.check_arch(config.arch)
    count = max(config.num_models)
    default = Path(pretrained.published_name(config.arch))
    paths = config.model_path or ((str(default),) if default.exists() else None)
    if paths:
        print(f"Loading resnet model from {', '.join(paths)}")
        models = weights.load_models(paths, arch=config.arch, device=device, num_models=count)
        return models, ", ".join(paths)
    url = pretrained.published_url(config.arch)
    print(f"Loading resnet model from {url}")
    try:
        state = pretrained.download(config.arch)
    except URLError as error:
        seeds = f"{config.seed} to {config.seed + count - 1}" if count > 1 else str(config.seed)
        print(
            f"No {default} here and no download ({error.reason}): using random weights,"
            f" seeds {seeds}; the predicted class is meaningless, the timings are not."
        )
        drawn = weights.random_models(count, arch=config.arch, device=device, seed=config.seed)
        return drawn, f"random, seeds {seeds}"
    models = weights.models_from_state(
        state, arch=config.arch, source=url, num_models=count, device=device
    )
    return models, url


def predict(config: Config, models: Sequence[nn.Module], image: Tensor) -> float:
    """Print what the first model, or each model of several files, sees in the plain image.

    Returns the seconds of the first forward, which is the first of the whole process.
    """
    import torch

    from ensemble import images, timing

    print("Running Sample prediction")
    paths = config.model_path or ()
    try:
        with torch.inference_mode():
            first = timing.time_call(
                lambda: models[0](image), synchronize=lambda: timing.synchronize(image.device)
            )
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"--image_size: {config.arch} does not run at {config.image_size} px: {reason}"
        ) from error
    for index, model in enumerate(models if len(paths) > 1 else models[:1]):
        with torch.inference_mode():
            probabilities = model(image)[0].softmax(0)
        names = images.labels(len(probabilities))
        source = f" ({paths[index]})" if len(paths) > 1 else ""
        top = probabilities.topk(min(5 if config.verbose else 1, len(probabilities)))
        for rank, (probability, label) in enumerate(zip(*map(list, top), strict=True)):
            name = f"{int(label)} {names[int(label)]}" if names else f"class {int(label)}"
            lead = "Prediction" if rank == 0 else f"  top {rank + 1}"
            print(f"{lead}: {name}, probability {float(probability):.3f}{source}")
    return first.seconds


def show(config: Config, results: Sequence[Result], environment: Environment) -> None:
    """Print the two lines that users of the original know, the table and the verdict."""
    from ensemble import report

    for line in report.time_lines(results):
        print(line)
    print(report.render_table(results))
    print(report.render_verdict(results, environment), end="")
    if config.verbose:
        for result in results:
            print(f"{result.strategy}, {result.num_models} models, times in s: {result.times_s}")


def exit_code(config: Config, results: Sequence[Result]) -> int:
    """1 where a row failed, or where a strategy that was named cannot run here; else 0."""
    asked_for_all = set(config.strategies) == set(STRATEGIES)
    bad = {"failed"} if asked_for_all else {"failed", "unavailable"}
    return int(any(result.status in bad for result in results))


def save(path: str, environment: Environment, config: Config, results: Sequence[Result]) -> str:
    """Write the result file; what went wrong where it cannot be (a full disk loses no result)."""
    try:
        save_json(Path(path), environment, config, results)
    except OSError as error:
        return f"--export_json: {path} cannot be written: {error.strerror or error}"
    return ""


def check_output(config: Config) -> None:
    """Raise InputError unless a file can be written, before a long run finds out."""
    if config.export_json is None:
        return
    path = config.export_json
    inputs = [config.image_path, *(config.model_path or ())]
    if any(os.path.realpath(path) == os.path.realpath(own) for own in inputs):
        raise InputError(f"--export_json: expected a file of its own, found the input {path}")
    if Path(path).suffix in CHECKPOINT_SUFFIXES:  # the default weights file, named by mistake
        raise InputError(f"--export_json: expected a JSON file, found a checkpoint's name, {path}")
    target, folder = Path(path), Path(path).parent
    if not folder.is_dir():
        raise InputError(f"--export_json: expected a folder at {folder}, found none")
    if target.exists() and not target.is_file():
        raise InputError(f"--export_json: expected a file at {path}, found a directory or a device")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"--export_json: expected to write in {folder}: {reason}") from error


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
    beside = Path(__file__).with_name(DEFAULT_IMAGE)
    if options["image_path"] == DEFAULT_IMAGE and not Path(DEFAULT_IMAGE).exists():
        options["image_path"] = str(beside)
    values = {
        name: tuple(dict.fromkeys(value)) if name in ("num_models", "strategies") else value
        for name, value in options.items()
    }
    return Config(**values | {"model_path": tuple(paths) if paths else None})


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
    add("--image_size", type=positive, default=224, metavar="PX", help="side of the model's input")
    add(
        "--batch_size",
        type=positive,
        default=1,
        metavar="B",
        help="images in a batch: the plain image and B - 1 augmented views of it",
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
        default="float32",
        help="of weights and inputs; the reference stays the float32 loop",
    )
    add(
        "--strategies",
        nargs="+",
        choices=(*STRATEGIES, ALL),
        default=["loop", "vmap"],
        metavar="NAME",
        help="; ".join(f"{name}: {s.summary}" for name, s in STRATEGIES.items())
        + f"; {ALL}: every one",
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
    add = parser.add_argument_group("what to show").add_argument
    add("--export_json", metavar="PATH", help="write everything measured, after each row")
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


if __name__ == "__main__":
    sys.exit(main())
