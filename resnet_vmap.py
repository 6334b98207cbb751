"""Serve N ResNets on one device: a Python loop, or one vmapped forward? Measured, checked, told.

python resnet_vmap.py --num_models 4

The loop, and vmap by functorch's combine_state_for_ensemble, stand in ensemble/strategies/eager.py;
every other way to run N models has its line in ensemble/strategies/__init__.py. A row of the table
is measured in ensemble/measure/row.py, its speedup is computed in ensemble/records.py.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ensemble import options
from ensemble.errors import InputError, RankError
from ensemble.machine import launch
from ensemble.options import Config
from ensemble.records import Environment, Run
from ensemble.report import exports, show
from ensemble.report.progress import show_progress

if TYPE_CHECKING:
    from ensemble.measure.session import Session
    from ensemble.models.workload import Workload


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, and turn what went wrong into an exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a letter of the table
    if launch.rank() > 0:  # of several ranks the first speaks
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        config = options.parse(argv)
        code = run(config) if launch.rank() == 0 else follow(config)
        sys.stdout.flush()
        return code
    except InputError as error:
        tell(options.in_flags(error))
        return 2
    except RankError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head`: who reads the output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def run(config: Config) -> int:
    """The program, once its command line is known; returns the exit code."""
    if config.list_strategies:
        show.list_strategies()
        return 0
    baseline = exports.read_if(config.baseline, argument="baseline")
    files = show.Files(config)
    if config.from_json:
        saved = exports.read(config.from_json, argument="from_json")
        show.check_baseline(config, saved.environment, baseline)
        return finish(config, saved, baseline, files)
    earlier = exports.read_if(config.resume, argument="resume")
    workload = load(config)
    environment = predict(config, workload)
    show.check_baseline(config, environment, baseline)
    session = serve(config, workload, Run(environment, config.plain(), ()), earlier, files)
    code = finish(config, session.run, baseline, files)
    show.show_left(session.stopped, session.left, session.planned)
    return 130 if session.interrupted else int(session.broken) or code


def load(config: Config) -> Workload:
    """N models and their images on the device. torch is imported here and not before."""
    if launch.is_launched():
        from ensemble.distributed import lead

        return lead.load(config, say=print)
    from ensemble.models import workload

    return workload.load(config, say=print)


def predict(config: Config, workload: Workload) -> Environment:
    """Print what the models see in the plain image; return the environment of the run."""
    from ensemble.measure import prediction

    print("Running Sample prediction")
    first_forward_s = prediction.predict(config, workload, say=print)
    return workload.describe(config, first_forward_s=first_forward_s)


def serve(
    config: Config, workload: Workload, new: Run, earlier: Run | None, files: show.Files
) -> Session:
    """Run all models by each strategy: build, compare with the loop, time beside the loop."""
    from ensemble.measure import session

    print("Serving multiple models")
    print(f"Running on {workload.device_name(config)}")
    begun, measure = session.resume(config, new, earlier), None
    if launch.is_launched():
        from ensemble.distributed import lead

        measure = lead.measure
    return session.measure_all(
        config,
        begun,
        workload,
        save=files.save,
        show_progress=show_progress,
        say=print,
        row="ensemble.serving.row" if config.scenario else "ensemble.measure.row",
        measure=measure,
    )


def follow(config: Config) -> int:
    """Under torchrun all ranks but the first: take the steps that it announces."""
    from ensemble.distributed import follow

    return follow.follow(config)


def tell(error: str) -> None:
    """Say what is wrong, in one line; of several ranks of torchrun one says it."""
    if launch.is_launched():
        from ensemble.distributed import faults

        faults.tell(error)
    else:
        print(f"error: {error}", file=sys.stderr)


def finish(config: Config, done: Run, baseline: Run | None, files: show.Files) -> int:
    """Show a run, save it, and say by the exit code how it went."""
    files.finish(done)
    show.show(done, verbose=config.verbose)
    slower = show.compare(done, baseline, config.fail_above)
    files.check()
    return int(slower or show.has_failed(config, done))


def command() -> None:
    """The installed command."""
    sys.exit(main())


if __name__ == "__main__":
    command()
