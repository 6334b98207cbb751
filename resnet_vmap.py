"""Serve N ResNets on one device: a Python loop, or one vmapped forward? Measured, checked, told.

python resnet_vmap.py --num_models 4
"""

from __future__ import annotations

import io
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ensemble import comparison, exports
from ensemble.errors import InputError
from ensemble.options import grid_path, parse
from ensemble.report import name, render_table, time_lines, varying_columns
from ensemble.results import Config, Result
from ensemble.strategies import BEST, STRATEGIES
from ensemble.verdict import render_verdict

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, load, run, show, export; returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a letter of the table
    try:
        config = parse(argv)
        code = show_saved(config) if config.from_json else measure(config)
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


def show_saved(config: Config) -> int:
    """Show, export, draw and compare a saved run: no torch, no model, no measurement."""
    assert config.from_json is not None
    run = exports.read(config.from_json, flag="--from_json")
    baseline = read_baseline(config)
    check_baseline(config, run, baseline)
    unsaved = save(config, run)
    return finish(config, run, baseline, unsaved)


def measure(config: Config) -> int:
    """The program, once its command line is known. torch is imported here and not before."""
    earlier = exports.read(config.resume, flag="--resume") if config.resume else None
    baseline = read_baseline(config)
    from ensemble import benchmark, devices, images, memory, progress
    from ensemble.strategies import best

    logging.basicConfig()
    logging.getLogger("ensemble").setLevel(logging.DEBUG if config.verbose else logging.WARNING)
    refused = memory.retain_freed_memory() if config.allocator == "retain" else None
    if refused:
        raise InputError(f"--allocator: retain cannot be had here: {refused}")
    devices.configure(threads=config.threads)
    device = devices.select_device(config.device)

    per_model = max(config.num_models) if config.inputs == "per_model" else 1
    count = max(config.batch_size) * per_model
    image = images.read_image(config.image_path)

    @cache
    def views(px: int) -> Tensor:
        return images.views(image, count, image_size=px, seed=config.seed).to(device)

    first_views = views(config.image_size[0])
    models, weights = load_models(config, device)
    print(f"Loading image from {config.image_path}")
    print(f"Converted image to shape {first_views[:1].shape}")
    if config.verbose:
        print(models[0])
    first_forward_s = predict(config, models, first_views[:1])

    print("Serving multiple models")
    chosen = f"{device}, the accelerator here" if device.type != "cpu" else "the CPU"
    print(f"Running on {chosen}" + (" (--device auto)" if config.device == "auto" else ""))
    environment = devices.describe(
        device, allocator=config.allocator, weights=weights, first_forward_s=first_forward_s
    )
    run = exports.Run(environment, exports.plain(config), ())
    check_baseline(config, run, baseline)
    if earlier is not None:
        check_resumable(config, run, earlier)
        kept = tuple(row for row in earlier.results if row.status != "failed")
        first = earlier.environment.first_forward_s  # of the process that the kept rows belong to
        environment = replace(environment, first_forward_s=first)
        run = replace(run, environment=environment, results=kept)
    rows = benchmark.plan(config, models, device)
    missing = [row for row in rows if row.key not in {own.key for own in run.results}]
    if earlier is not None:
        print(f"Going on with {config.resume}: {len(missing)} of {len(rows)} rows are missing")
    order = {row.key: index for index, row in enumerate(rows)}
    unsaved, stopped, deadline = "", "", _deadline(config)
    try:
        with progress.show_progress(len(missing)) as update:
            for result in benchmark.run(config, missing, models, views, progress=update):
                results = [*run.results, result]
                results.sort(key=lambda row: order.get(row.key, len(order)))
                run = replace(run, results=tuple(results))
                unsaved = unsaved or save(replace(config, plot=None), run)
                if time.monotonic() > deadline:
                    stopped = f"--max_minutes {config.max_minutes:g} are over"
                    break
    except KeyboardInterrupt:
        stopped = "interrupted"
    if run.results:
        unsaved = unsaved or save(config, run)
    code = finish(config, run, baseline, unsaved)
    expected = best.pick(models, device.type, config.dtype[0])
    if expected not in config.strategies and BEST not in config.strategies:
        print(f"Expected to be the fastest here: {expected}; --strategies {BEST} measures it.")
    left = [row for row in rows if row.key not in {own.key for own in run.results}]
    if stopped and left:
        names = "; ".join(name(row, varying_columns(rows)) for row in left)
        measured = f"{len(rows) - len(left)} of {len(rows)} rows were measured"
        print(f"{stopped}: {measured}; not measured: {names}", file=sys.stderr)
    return 130 if stopped == "interrupted" else code


def finish(config: Config, run: exports.Run, baseline: exports.Run | None, unsaved: str) -> int:
    """Show a run and say by the exit code how it went."""
    show(config, run)
    compared = comparison.compare(run, baseline) if baseline else []
    if baseline:
        print(comparison.render(compared, run, baseline), end="")
    if unsaved:
        raise InputError(unsaved)
    slower = config.fail_above is not None and any(
        own.surely_slower(config.fail_above) for own in compared
    )
    return int(slower) or exit_code(config, run.results)


def read_baseline(config: Config) -> exports.Run | None:
    """The run to compare with, if there is one."""
    return exports.read(config.baseline, flag="--baseline") if config.baseline else None


def check_baseline(config: Config, run: exports.Run, baseline: exports.Run | None) -> None:
    """Raise InputError unless a baseline comes from the machine of the run."""
    if baseline is not None:
        comparison.check_machine(
            run.environment, baseline.environment, flag="--baseline", path=str(config.baseline)
        )


def check_resumable(config: Config, run: exports.Run, earlier: exports.Run) -> None:
    """Raise InputError unless a run can go on as if it had never stopped."""
    path = str(config.resume)
    comparison.check_machine(run.environment, earlier.environment, flag="--resume", path=path)
    for difference in comparison.differences(run, earlier):
        raise InputError(f"--resume: expected the settings of {path}, found {difference}")


def _deadline(config: Config) -> float:
    limit = config.max_minutes
    return time.monotonic() + 60 * limit if limit is not None else float("inf")


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
        models = weights.load_models(
            paths, arch=config.arch, device=device, num_models=count, say=print
        )
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
            f"--image_size: {config.arch} does not run at {config.image_size[0]} px: {reason}"
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


def show(config: Config, run: exports.Run) -> None:
    """Print the two lines that users of the original know, the table and the verdict."""
    for line in time_lines(run.results):
        print(line)
    print(render_table(run.results))
    print(render_verdict(run.results, run.environment), end="")
    if config.verbose:
        varying = varying_columns(run.results)
        for result in run.results:
            print(f"{name(result, varying)}, times in s: {result.times_s}")


def exit_code(config: Config, results: Sequence[Result]) -> int:
    """1 where a row failed, or where a strategy that was named cannot run here; else 0."""
    asked_for_all = set(config.strategies) == set(STRATEGIES)
    bad = {"failed"} if asked_for_all or config.from_json else {"failed", "unavailable"}
    return int(any(result.status in bad for result in results))


def save(config: Config, run: exports.Run) -> str:
    """Write every file that was asked for; what went wrong where one cannot be written.

    A full disk loses no result: they are still shown.
    """
    paths = {form: getattr(config, f"export_{form}") for form in exports.FORMATS}
    path: str | None = None
    try:
        for form, path in paths.items():
            exports.save(run, {form: path})
        path = config.plot
        if path is not None:
            from ensemble import pictures

            pictures.save(run.results, Path(path), grid_path(path))
    except OSError as error:
        return f"{path} cannot be written: {error.strerror or error}"
    return ""


if __name__ == "__main__":
    sys.exit(main())
