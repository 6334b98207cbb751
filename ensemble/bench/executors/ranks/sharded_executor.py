"""The executor of rank 0: models are sharded over all ranks, which run every step together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from ensemble.bench import workload
from ensemble.bench.case import Case
from ensemble.bench.config import Config
from ensemble.bench.environment import Environment
from ensemble.bench.executors import in_process
from ensemble.bench.executors.executor import Execute
from ensemble.bench.executors.ranks import exit_reasons, group, sharded_backend
from ensemble.bench.executors.ranks.join import join
from ensemble.bench.executors.ranks.leader import Leader
from ensemble.bench.executors.ranks.sharding import shard_ranges
from ensemble.bench.setup import Setup, SetupError, make_example, make_setup
from ensemble.bench.workload import Workload
from ensemble.errors import InputError, RankError
from ensemble.formatting import count
from ensemble.models import architectures


@dataclass(frozen=True, kw_only=True)
class ShardedWorkload(Workload):
    """The models of rank 0, and the images of all ranks."""

    leader: Leader

    def see(self, image: Tensor, count: int) -> list[Tensor]:
        if count <= len(self.models):
            return super().see(image, count)
        self.leader.run_step(self.leader.worker.configure, count, tuple(image.shape))
        logits: list[Tensor] = self.leader.run_step(self.leader.worker.predict, image=image)
        return logits

    def on_one_device(self, num_models: int) -> int:
        return len(shard_ranges(num_models, len(self.leader.ranks))[0])

    def device_name(self, config: Config) -> str:
        hosts = list(dict.fromkeys(info.host for info in self.leader.ranks))
        placements = "; ".join(dict.fromkeys(info.placement for info in self.leader.ranks))
        backend = self.leader.worker.group.backend
        ranks = count(len(self.leader.ranks), "rank")
        return f"{ranks} on {', '.join(hosts)} by {backend}: {placements}"

    def describe(self, config: Config, *, first_forward_s: float) -> Environment:
        ranks = self.leader.ranks
        return replace(
            super().describe(config, first_forward_s=first_forward_s),
            ranks=len(ranks),
            backend=self.leader.worker.group.backend,
            hosts=tuple(info.host for info in ranks),
            rank_devices=tuple(
                f"{info.placement}{f', {info.device_name}' if info.device_name else ''}"
                for info in ranks
            ),
        )


def load(config: Config, *, say: Callable[[str], None]) -> Workload:
    """Join the other ranks, each with its shard of the models; the workload of rank 0.

    Raises:
        InputError: bad input, or a rank that cannot work or differs from this one.
        RankError: a rank has ended.
    """
    with _diagnosed():
        worker, ranks = join(config, say=say)
        own = architectures.find(config.models.arch, channels=config.models.channels)
        config = config.for_architecture(own.image_size)
        preprocessing = workload.preprocessing_of(config, own)
        images = workload.read_images(config, worker.device, preprocessing)
        workload.report_image(config, images, preprocessing, say=say)
        if config.report.verbose:
            say(str(worker.models[0]))
        return ShardedWorkload(
            worker.device,
            worker.models,
            worker.weights,
            images,
            preprocessing=preprocessing,
            image_size=own.image_size,
            leader=Leader(worker, ranks),
        )


@contextmanager
def over_ranks(config: Config, workload: Workload) -> Iterator[Execute]:
    """An executor that measures each case on all ranks.

    Raises:
        RankError: a rank has ended; the message names it, and the exit reason.
    """
    assert isinstance(workload, ShardedWorkload)
    leader = workload.leader

    def make(cases: Sequence[Case]) -> Setup:
        case = cases[0]
        images = workload.images(case.image_size)
        example = make_example(images, case)
        reports = leader.run_step(leader.worker.configure, case.num_models, tuple(example.shape))
        reason = sharded_backend.failure_reason(reports, leader.ranks)
        if reason:
            raise SetupError(reason)
        backend = sharded_backend.make_backend(leader, example, config.models.reduce)
        setup = make_setup(cases, backend, workload.models, images)
        return in_process.with_reference_alone(setup, cases, config)

    with _diagnosed():
        yield partial(in_process.execute, make, config)
        leader.shut_down()


@contextmanager
def _diagnosed() -> Iterator[None]:
    """Turn a lost rank into its name and exit reason.

    The connections are closed first, so that the other ranks detect the failure and record their
    reasons.
    """
    try:
        yield
    except RankError as error:
        group.destroy_group()
        raise RankError(exit_reasons.diagnose(error)) from error
    except InputError:
        group.destroy_group()
        raise
    except KeyboardInterrupt as error:
        if exit_reasons.received_sigterm():
            group.destroy_group()
            raise RankError(exit_reasons.diagnose(RankError("stopped by SIGTERM"))) from error
        exit_reasons.suppress_reports()
        group.destroy_group()
        raise
