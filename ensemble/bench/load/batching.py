"""Dynamic batching: which requests form the next batch, and which forward runs it. Pure functions.

A batch plan is a forward built for one batch size. A single-tenant plan runs requests of one
tenant, the one with the oldest request; an all-tenant plan runs a batch of every tenant at once
and pads those with fewer requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from ensemble.bench.load.request_queue import Request, RequestQueue

SINGLE_TENANT, ALL_TENANTS = "single-tenant", "all-tenant"


@dataclass(frozen=True)
class BatchPlan:
    """A forward of `batch_size` images per tenant, and its measured time."""

    mode: str  # SINGLE_TENANT or ALL_TENANTS
    batch_size: int
    seconds: float


@dataclass(frozen=True)
class Batch:
    """The requests of each tenant in `tenants`, in that order, and the plan that runs them."""

    plan: BatchPlan
    tenants: tuple[int, ...]
    requests: tuple[tuple[Request, ...], ...]

    @property
    def num_requests(self) -> int:
        return sum(map(len, self.requests))

    @property
    def num_slots(self) -> int:
        """The images that the forward computes, padding included."""
        return self.plan.batch_size * len(self.tenants)


def batch_sizes(max_batch: int) -> tuple[int, ...]:
    """The batch sizes to build: powers of two up to `max_batch`, and `max_batch` itself."""
    powers = [2**power for power in range(max_batch.bit_length()) if 2**power <= max_batch]
    return tuple(dict.fromkeys([*powers, max_batch]))


def select_plan(
    plans: Sequence[BatchPlan], queue_lengths: Sequence[int], oldest_tenant: int
) -> BatchPlan:
    """The plan with the least time per answered request; of equals the shortest.

    Args:
        plans: at least one.
        queue_lengths: the number of queued requests of each tenant.
        oldest_tenant: the tenant of the oldest request.
    """

    def cost(plan: BatchPlan) -> tuple[float, float]:
        single = plan.mode == SINGLE_TENANT
        lengths = [queue_lengths[oldest_tenant]] if single else queue_lengths
        answered = sum(min(length, plan.batch_size) for length in lengths)
        return plan.seconds / answered if answered else inf, plan.seconds

    return min(plans, key=cost)


def dispatch_time_s(
    queue: RequestQueue, *, max_batch: int, batching_delay_s: float
) -> float | None:
    """When to dispatch the next batch: now (0), or once its oldest request has waited the delay.

    None if the queue is empty.
    """
    oldest = queue.oldest()
    if oldest is None:
        return None
    if batching_delay_s <= 0 or queue.lengths()[oldest.tenant] >= max_batch:
        return 0.0
    return oldest.arrival_s + batching_delay_s


def next_batch(queue: RequestQueue, plans: Sequence[BatchPlan]) -> Batch:
    """Remove the next batch from a queue that holds at least one request."""
    oldest = queue.oldest()
    if oldest is None:
        raise ValueError("expected a queued request, got none")
    lengths = queue.lengths()
    plan = select_plan(plans, lengths, oldest.tenant)
    tenants = (oldest.tenant,) if plan.mode == SINGLE_TENANT else tuple(range(len(lengths)))
    requests = queue.pop(tenants, plan.batch_size)
    return Batch(plan, tenants, tuple(map(tuple, requests)))


def peak_throughput_qps(plans: Sequence[BatchPlan], num_tenants: int) -> float:
    """The requests per second of the fastest plan with full batches."""
    return max(
        plan.batch_size * (1 if plan.mode == SINGLE_TENANT else num_tenants) / plan.seconds
        for plan in plans
    )
