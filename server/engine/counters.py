"""Figures of the engine for a scrape of metrics."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class HostTime(NamedTuple):
    """Time that steering takes on the host in each step that holds a steered request: a histogram.

    Attributes:
        bounds_s: upper bounds of the buckets; a last one has none.
        counts: steps in each bucket, not cumulative; one more than bounds.
        sum_s: over all steps.
    """

    bounds_s: tuple[float, ...]
    counts: tuple[int, ...]
    sum_s: float


class CacheTokens(NamedTuple):
    """Tokens that requests looked up in the prefix cache when they were first scheduled, and found there."""

    queries: int
    hits: int


@dataclass(frozen=True)
class RankCounters:
    """One worker: storage in use, and what steering costs its host."""

    replica: int
    rank: int
    num_bundles: int
    rows_used: int
    rows_total: int
    slots_used: int
    slots_total: int
    host_time: HostTime


@dataclass(frozen=True)
class ReplicaCounters:
    """One engine core.

    Attributes:
        replica: its data-parallel rank.
        requests: steered requests in its scheduler, waiting or running.
        steered: prefix-cache lookups of steered requests.
        unsteered: of all others.
    """

    replica: int
    requests: int
    steered: CacheTokens
    unsteered: CacheTokens


@dataclass(frozen=True)
class EngineCounters:
    """All workers and all replicas."""

    ranks: tuple[RankCounters, ...]
    replicas: tuple[ReplicaCounters, ...]

    @staticmethod
    def from_wire(ranks: list[list[dict[str, Any]]], replicas: list[dict[str, Any]]) -> "EngineCounters":
        """From `SteeringWorker.steering_counters` by replica and rank, and `SteeringCore.status` by replica."""
        return EngineCounters(
            tuple(_rank(replica, each) for replica, answers in enumerate(ranks) for each in answers),
            tuple(
                ReplicaCounters(
                    replica,
                    each["requests"],
                    CacheTokens(*each["cache"]["steered"]),
                    CacheTokens(*each["cache"]["unsteered"]),
                )
                for replica, each in enumerate(replicas)
            ),
        )


def _rank(replica: int, data: Mapping[str, Any]) -> RankCounters:
    time = data["host_time"]
    host_time = HostTime(tuple(time["bounds_s"]), tuple(time["counts"]), time["sum_s"])
    return RankCounters(**{**data, "replica": replica, "host_time": host_time})
