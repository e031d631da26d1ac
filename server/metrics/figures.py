"""What a scrape needs to know besides the counters of the API processes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.engine.counters import EngineCounters

# Of an engine that does not answer.
NO_ENGINE = EngineCounters((), ())


@dataclass(frozen=True)
class Histogram:
    """Observations by size.

    Attributes:
        bounds: upper bounds (inclusive) of the buckets, ascending.
        counts: observations of each bucket alone, and of the ones above the last bound.
        sum: of all observations.
    """

    bounds: Sequence[float]
    counts: Sequence[int]
    sum: float


@dataclass(frozen=True)
class StateFigures:
    """State of the registry and of the instance.

    Attributes:
        generation_desired: of the registry.
        generation_observed: the smallest over the members.
        num_members: live API processes.
        num_profiles: in the registry.
        num_bundles: in the registry.
        has_passed_self_test: see `SteeringEngine.self_test`.
        is_ready: what /ready answers.
        is_declaration_applied: whether the profiles are as the declaration says, if there is one.
        last_change_at_s: Unix time of the registry's last change; None before the first.
        bytes_per_row: of a row in the workers' pools.
        build: values of the labels of `series.BUILD`.
    """

    generation_desired: int
    generation_observed: int
    num_members: int
    num_profiles: int
    num_bundles: int
    has_passed_self_test: bool
    is_ready: bool
    is_declaration_applied: bool
    last_change_at_s: float | None
    bytes_per_row: int
    build: Mapping[str, Any]
