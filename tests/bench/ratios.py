"""Paired ratios with bootstrap confidence intervals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 4000

Array = NDArray[np.float64]


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
    """Times of one mode, by round; samples of two modes are paired by round.

    Attributes:
        turns: [num_rounds, turns_per_round], seconds per batch.
        cpu: [num_rounds, turns_per_round], processor seconds per batch.
        steps: [num_rounds, decode_steps_per_round], seconds.
    """

    turns: Array
    cpu: Array
    steps: Array

    @staticmethod
    def of(rounds: Sequence[Sequence[Timed]]) -> "Samples":
        """Samples from rounds of equally many turns."""
        return Samples(
            np.array([[turn.seconds for turn in turns] for turns in rounds]),
            np.array([[turn.cpu_seconds for turn in turns] for turns in rounds]),
            np.array([[second for turn in turns for second in turn.decode_seconds] for turns in rounds]),
        )

    def seconds_over(self, other: "Samples") -> Interval:
        """Median over rounds of this one's seconds / the other's."""
        return _median_ratio(self.turns, other.turns)

    def cpu_seconds_over(self, other: "Samples") -> Interval:
        """Median over rounds of this one's processor seconds / the other's."""
        return _median_ratio(self.cpu, other.cpu)

    def step_percentile_over(self, other: "Samples", percentile: float) -> Interval:
        """Ratio of the percentiles of all decode steps; whole rounds are resampled, of both in the same way."""

        def ratio(rounds: NDArray[np.intp]) -> float:
            return float(np.percentile(self.steps[rounds], percentile) / np.percentile(other.steps[rounds], percentile))

        return _bootstrap(len(self.steps), ratio)

    def step_percentile(self, percentile: float) -> float:
        """Percentile of the seconds of a decode step."""
        return float(np.percentile(self.steps, percentile))

    def batch_percentile(self, percentile: float) -> float:
        """Percentile of the seconds of a batch, prompt and generation."""
        return float(np.percentile(self.turns, percentile))


def _median_ratio(ours: Array, theirs: Array) -> Interval:
    ratios = ours.sum(1) / theirs.sum(1)
    return _bootstrap(len(ratios), lambda rounds: float(np.median(ratios[rounds])))


def _bootstrap(num_rounds: int, estimator: Callable[[NDArray[np.intp]], float]) -> Interval:
    """Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13: percentile interval."""
    draws = np.random.default_rng(0).integers(num_rounds, size=(_RESAMPLES, num_rounds))
    low, high = np.percentile([estimator(rounds) for rounds in draws], [2.5, 97.5])
    return Interval(estimator(np.arange(num_rounds)), float(low), float(high))
