"""Ratios paired by round, over several starts of the engines, with bootstrap confidence intervals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 4000

Array = NDArray[np.float64]
# Takes the times of two modes in one start, each [num_rounds, ...], and gives one ratio.
Ratio = Callable[[Array, Array], float]


class Timed(Protocol):
    """Times of one turn, in seconds."""

    @property
    def seconds(self) -> float: ...

    @property
    def cpu_seconds(self) -> float: ...

    @property
    def decode_seconds(self) -> Sequence[float]: ...


class Interval(NamedTuple):
    """An estimate and its 95 % percentile-bootstrap interval."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Samples:
    """Times of one mode; samples of two modes are paired by start and round.

    Attributes:
        turns: [num_starts, num_rounds, turns_per_round], seconds per batch.
        cpu: [num_starts, num_rounds, turns_per_round], processor seconds per batch.
        steps: [num_starts, num_rounds, decode_steps_per_round], seconds.
    """

    turns: Array
    cpu: Array
    steps: Array

    @staticmethod
    def of(starts: Sequence[Sequence[Sequence[Timed]]]) -> "Samples":
        """Samples from starts of equally many rounds of equally many turns."""
        return Samples(
            np.array([[[turn.seconds for turn in turns] for turns in rounds] for rounds in starts]),
            np.array([[[turn.cpu_seconds for turn in turns] for turns in rounds] for rounds in starts]),
            np.array([[[s for turn in turns for s in turn.decode_seconds] for turns in rounds] for rounds in starts]),
        )

    def seconds_over(self, other: "Samples") -> Interval:
        """Median over rounds of this one's seconds / the other's."""
        return _bootstrap(self.turns, other.turns, _median_ratio)

    def cpu_seconds_over(self, other: "Samples") -> Interval:
        """Median over rounds of this one's processor seconds / the other's."""
        return _bootstrap(self.cpu, other.cpu, _median_ratio)

    def step_percentile_over(self, other: "Samples", percentile: float) -> Interval:
        """Ratio of the percentiles of all decode steps."""

        def ratio(ours: Array, theirs: Array) -> float:
            return float(np.percentile(ours, percentile) / np.percentile(theirs, percentile))

        return _bootstrap(self.steps, other.steps, ratio)

    def step_percentile(self, percentile: float) -> float:
        """Percentile of the seconds of a decode step."""
        return float(np.percentile(self.steps, percentile))

    def batch_percentile(self, percentile: float) -> float:
        """Percentile of the seconds of a batch, prompt and generation."""
        return float(np.percentile(self.turns, percentile))


def _median_ratio(ours: Array, theirs: Array) -> float:
    return float(np.median(ours.sum(1) / theirs.sum(1)))


def _bootstrap(ours: Array, theirs: Array, ratio: Ratio) -> Interval:
    """Geometric mean over starts of a ratio within each start.

    Resamples starts and, within each, rounds: two processes that run the same code differ by a few percent for as long
    as they live, so rounds of one start are not independent. Starts are drawn among those of the same starting order,
    of which each is every second one. (Percentile interval: Efron & Tibshirani, An Introduction to the Bootstrap, 1993,
    chapter 13.)
    """
    num_starts, num_rounds = ours.shape[:2]
    rng = np.random.default_rng(0)

    def mean(starts: Sequence[int], rounds: NDArray[np.int64]) -> float:
        logs = [np.log(ratio(ours[s, r], theirs[s, r])) for s, r in zip(starts, rounds, strict=True)]
        return float(np.exp(np.mean(logs)))

    def draw() -> float:
        starts = [int(rng.choice(range(start % 2, num_starts, 2))) for start in range(num_starts)]
        return mean(starts, rng.integers(num_rounds, size=(num_starts, num_rounds)))

    low, high = np.percentile([draw() for _ in range(_RESAMPLES)], [2.5, 97.5])
    return Interval(mean(range(num_starts), np.tile(np.arange(num_rounds), (num_starts, 1))), float(low), float(high))
