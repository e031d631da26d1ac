"""Ratios paired by round, over several starts of the engines, with bootstrap confidence intervals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from server.bench.ratios import Interval

_RESAMPLES = 2000

Array = NDArray[np.float64]
# Takes times of two variants, each [..., num_rounds, times_per_round], and gives ratios [...].
Ratio = Callable[[Array, Array], Array]


class Timed(Protocol):
    """Times of one turn, in seconds."""

    @property
    def seconds(self) -> float: ...

    @property
    def cpu_seconds(self) -> float: ...

    @property
    def ttft(self) -> Sequence[float]: ...

    @property
    def tpot(self) -> Sequence[float]: ...


@dataclass(frozen=True)
class Samples:
    """Times of one variant, in seconds; samples of two variants are paired by start and round.

    Attributes:
        seconds: [num_starts, num_rounds, turns_per_round], of batches.
        cpu_seconds: [num_starts, num_rounds, turns_per_round], processor time of batches.
        ttft: [num_starts, num_rounds, requests_per_round].
        tpot: [num_starts, num_rounds, requests_per_round].
    """

    seconds: Array
    cpu_seconds: Array
    ttft: Array
    tpot: Array

    @staticmethod
    def of(starts: Sequence[Sequence[Sequence[Timed]]]) -> "Samples":
        """Samples from starts of equally many rounds of equally many turns."""

        def collected(times: Callable[[Timed], Sequence[float]]) -> Array:
            return np.array([[[one for turn in turns for one in times(turn)] for turns in start] for start in starts])

        return Samples(
            collected(lambda turn: [turn.seconds]),
            collected(lambda turn: [turn.cpu_seconds]),
            collected(lambda turn: turn.ttft),
            collected(lambda turn: turn.tpot),
        )


def ratio_of_rounds(ours: Array, theirs: Array) -> Interval:
    """Median over rounds of our time / theirs."""
    return _bootstrap(ours, theirs, lambda ours, theirs: np.median(ours.sum(-1) / theirs.sum(-1), axis=-1))


def ratio_of_percentiles(ours: Array, theirs: Array, percentile: float) -> Interval:
    """Percentile of all our times / that of all theirs."""

    def ratio(ours: Array, theirs: Array) -> Array:
        return np.percentile(ours, percentile, axis=(-2, -1)) / np.percentile(theirs, percentile, axis=(-2, -1))

    return _bootstrap(ours, theirs, ratio)


def _bootstrap(ours: Array, theirs: Array, ratio: Ratio) -> Interval:
    """Geometric mean over starts of a ratio within each start.

    Resamples starts and, within each, rounds: two processes that run the same code differ by a few percent for as long
    as they live, so rounds of one start are not independent. Starts are drawn among those of the same starting order,
    of which each is every second one. (Percentile interval: Efron & Tibshirani, An Introduction to the Bootstrap, 1993,
    chapter 13.)
    """
    num_starts, num_rounds = ours.shape[:2]
    rng = np.random.default_rng(0)
    logs = []
    for start in range(num_starts):
        starts = rng.choice(np.arange(start % 2, num_starts, 2), (_RESAMPLES, 1))
        rounds = rng.integers(num_rounds, size=(_RESAMPLES, num_rounds))
        logs.append(np.log(ratio(ours[starts, rounds], theirs[starts, rounds])))
    low, high = np.percentile(np.exp(np.mean(logs, axis=0)), [2.5, 97.5])
    return Interval(float(np.exp(np.mean(np.log(ratio(ours, theirs))))), float(low), float(high))
