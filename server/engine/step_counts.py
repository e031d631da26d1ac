"""Counts of steered tokens on their way from a step to its output."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from server.engine.plan import RequestPlan, Segment

# {request id: (steering id, tokens steered so far, see `RequestPlan.tokens_steered`)}
Counts = Mapping[str, tuple[str, tuple[int, ...]]]


class Scheduled(NamedTuple):
    """Tokens of one request in a step.

    Attributes:
        request_id: the engine's id.
        start: absolute position of the first.
        num_tokens: how many, drafts included.
        num_drafts: how many of them, at the end, are drafts of speculative decoding.
    """

    request_id: str
    start: int
    num_tokens: int
    num_drafts: int = 0


class PendingCounts(NamedTuple):
    """Counts of a step that are still on their way from the device: where each row of `counts` belongs."""

    counts: Tensor
    ready: torch.cuda.Event | None
    owners: Sequence[tuple[RequestPlan, Segment]]


class StepCounts:
    """Token counts of one step, to be read when its output is there.

    Under asynchronous scheduling that is after the next step was filled, so what is known already is kept as it was.

    Args:
        known: counts of the requests that need nothing from the device or the output.
        drafted: tokens of requests with drafts, of which the output says how many were accepted.
        pending: counts that are still on their way from the device.
        plans: requests with spans or drafts by id, and the position after their last token.
    """

    def __init__(
        self,
        known: Counts,
        drafted: Sequence[Scheduled],
        pending: PendingCounts | None,
        plans: Mapping[str, tuple[RequestPlan, int]],
    ) -> None:
        self._known = known
        self._drafted = drafted
        self._pending = pending
        self._plans = plans

    def read(self, num_sampled: Mapping[str, int]) -> Counts:
        """Counts of all requests of the step.

        Args:
            num_sampled: tokens that each request got; with drafts it says how many of them were accepted.
        """
        if self._pending is not None:
            if self._pending.ready is not None:
                self._pending.ready.synchronize()
            for (plan, segment), row in zip(self._pending.owners, self._pending.counts.tolist(), strict=True):
                for variant, count in zip(segment.variants, row, strict=True):
                    plan.count(segment, variant, count)
        for tokens in self._drafted:
            accepted = max(0, num_sampled.get(tokens.request_id, 0) - 1)
            plan, _ = self._plans[tokens.request_id]
            plan.advance(tokens.start + tokens.num_tokens - tokens.num_drafts + accepted)
        late = {}
        for request_id, (plan, stop) in self._plans.items():
            late[request_id] = (plan.steering_id, tuple(plan.tokens_steered))
            if plan.has_spans:
                plan.settle(stop)
        return {**self._known, **late}


def to_host(counts: Tensor, owners: Sequence[tuple[RequestPlan, Segment]]) -> PendingCounts:
    """Send counts [len(owners), NUM_STATES], int64, to the host; nobody waits before they are read."""
    if counts.device.type == "cpu":
        return PendingCounts(counts, None, owners)
    host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
    host.copy_(counts, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return PendingCounts(host, ready, owners)
