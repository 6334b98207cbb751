"""Run N ResNets on one device in a Python loop, or as one vmapped forward: which is faster?

python resnet_vmap.py --num_models 4

The loop, and vmap with functorch's combine_state_for_ensemble, are in ensemble/strategies/eager.py;
all strategies are listed in ensemble/strategies/__init__.py. A row of the table is measured in
ensemble/bench/measure.py, and its speedup is computed in ensemble/bench/summary.py.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if __name__ == "__main__":  # `python -P`, `-I` and PYTHONSAFEPATH leave this folder out
    sys.path[:0] = [folder for folder in [os.path.dirname(__file__)] if folder not in sys.path]

from ensemble.errors import (
    InputError,
    exit_code,
    import_errors_as_input_errors,
    interrupt_behind,
)

try:
    with import_errors_as_input_errors():
        from ensemble import gc_pause
        from ensemble.bench import cli
        from ensemble.bench.config import Config
        from ensemble.bench.report import exports, gpu_remarks, resuming, show
        from ensemble.bench.summary import Run
        from ensemble.machine import launch, signals, streams
except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)

if TYPE_CHECKING:
    from ensemble.bench.executors.executor import Executor
    from ensemble.bench.session import Session
    from ensemble.bench.workload import Workload


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run, and turn errors into exit codes."""
    streams.prepare()
    try:
        if launch.is_launched():
            from ensemble.bench.executors.ranks import main as program

            return program.main(argv, run)
        with signals.stop_on_signals(), streams.flush_on_exit():
            return run(cli.parse(argv))
    except InputError as error:
        if interrupt := interrupt_behind(error):
            return interrupted(interrupt)
        print(f"error: {cli.in_flags(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        return interrupted(error)
    except BrokenPipeError:  # `| head`: who reads the output has read enough
        streams.discard()
        return 1


def interrupted(error: KeyboardInterrupt) -> int:
    """Print what stopped the program; returns the exit code."""
    print(str(error) or "interrupted", file=sys.stderr)
    return exit_code(error)


def load(config: Config, *, say: Callable[[str], None]) -> Workload:
    """Load N models and their images. Imports torch, which is not imported before."""
    with import_errors_as_input_errors(), gc_pause.paused_then_frozen():
        from ensemble.bench.executors import device_probe
    return device_probe.load(config, say=say)


def run(
    config: Config, load: Callable[..., Workload] = load, executor: Executor | None = None
) -> int:
    """Run a parsed command line; returns the exit code."""
    if config.report.list_strategies:
        show.list_strategies()
        return 0
    baseline = exports.read_if(config.report.baseline, argument="baseline")
    earlier = exports.read_if(config.measure.resume, argument="resume")
    files = show.Files(config.report)
    if config.report.from_json:
        saved = exports.read(config.report.from_json, argument="from_json")
        cases = [row.case for row in saved.results]
        show.check_baseline(config, saved.environment, cases, baseline)
        return finish(config, saved, baseline, files)
    workload = load(config, say=print)
    config = config.on(workload.device.type).for_architecture(workload.image_size)
    here = workload.describe(config, first_forward_s=math.nan)  # nothing ran here yet
    show.check_baseline(config, here, config.plan(), baseline)
    begun = resuming.resume(config, Run(here, config.plain(), ()), earlier)
    session = measure_all(config, workload, predict(config, workload, begun), files, executor)
    code = finish(config, session.run, baseline, files)
    show.show_missing(session.stopped, session.left, session.planned)
    if config.report.export_model and not session.exit_code:
        code = export_file(config, workload, session.run) or code
    if config.report.save and not session.exit_code:
        code = save_file(config, workload, session.run) or code
    return session.exit_code or code


def predict(config: Config, workload: Workload, begun: Run) -> Run:
    """Print the predictions for the plain image; returns the run with the time of the first
    forward, of the process that its first rows come from."""
    from ensemble.bench import prediction

    print("Running Sample prediction")
    first_forward_s = prediction.predict(
        config.models, workload, verbose=config.report.verbose, say=print
    )
    if not math.isnan(begun.environment.first_forward_s):
        return begun
    return replace(begun, environment=replace(begun.environment, first_forward_s=first_forward_s))


def measure_all(
    config: Config, workload: Workload, begun: Run, files: show.Files, executor: Executor | None
) -> Session:
    """Measure each strategy: build it, compare it with the loop, time it in pairs with the loop."""
    from ensemble.bench import session
    from ensemble.bench.load import search

    print("Serving multiple models")
    print(f"Running on {workload.device_name(config)}")
    for line in gpu_remarks.warnings_before(begun.environment):
        show.print_wrapped(line)
    options = config.load
    if options and options.scenario == "server" and options.target_qps is None:
        show.print_wrapped(search.announcement(options, config.measure.min_seconds))
    return session.measure_all(
        config, begun, workload, save=files.save, say=show.print_wrapped, executor=executor
    )


def export_file(config: Config, workload: Workload, done: Run) -> int:
    """Write the file of `--export_model`; returns the exit code."""
    from ensemble.bench import export_model

    return export_model.export_model(config, workload, done, say=show.print_wrapped)


def save_file(config: Config, workload: Workload, done: Run) -> int:
    """Write the file of `--save`; returns the exit code."""
    from ensemble.bench import save_winner

    return save_winner.save_winner(config, workload, done, say=show.print_wrapped)


def finish(config: Config, done: Run, baseline: Run | None, files: show.Files) -> int:
    """Save and show a run; returns the exit code."""
    files.finish(done)  # first: an error while it is shown must not lose it
    with streams.flush_on_exit():
        show.show(done, verbose=config.report.verbose)
        gate = show.compare(config, done, baseline)
    files.check()
    return 1 if show.has_failed(config, done) else gate


def command() -> None:
    """The installed command."""
    sys.exit(main())


if __name__ == "__main__":
    command()
