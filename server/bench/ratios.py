"""Ratios of two arms, paired by round and request, with bootstrap intervals."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 2000
_LEVEL_PERCENT = 95
# Of one block of resamples, so that long runs do not need gigabytes.
_MAX_VALUES = 4_000_000

Array = NDArray[np.float64]


class Interval(NamedTuple):
    """An estimate and its 95 % percentile-bootstrap interval."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ratio_of_percentiles(ours: Array, theirs: Array, percentile: float, seed: int = 0) -> Interval | None:
    """A percentile of our times / that of theirs, over all rounds.

    Resamples rounds and, within each, requests, the same ones of both arms: request i of a round has the same prompt
    and the same arrival in both.

    Args:
        ours, theirs: [num_rounds, num_requests]; NaN where a request has no time.
        percentile: from 0 to 100.
        seed: of the resampling.

    Returns:
        None where an arm has no times, or none that a clock can tell from 0.
    """
    if np.isnan(ours).all() or np.isnan(theirs).all():
        return None
    num_rounds, num_requests = ours.shape
    rng = np.random.default_rng(seed)
    block = max(1, _MAX_VALUES // ours.size)
    drawn: list[Array] = []
    for start in range(0, _RESAMPLES, block):
        size = min(block, _RESAMPLES - start)
        rounds = rng.integers(num_rounds, size=(size, num_rounds, 1))
        requests = rng.integers(num_requests, size=(size, num_rounds, num_requests))
        drawn.append(
            _quotient(
                _percentile(ours[rounds, requests], percentile), _percentile(theirs[rounds, requests], percentile)
            )
        )
    estimate = _quotient(_percentile(ours[None], percentile), _percentile(theirs[None], percentile))
    return _interval(float(estimate[0]), np.concatenate(drawn))


def ratio_of_sums(ours: tuple[Array, Array], theirs: tuple[Array, Array], seed: int = 0) -> Interval | None:
    """Our amount per time / theirs, over all rounds; resamples rounds.

    Args:
        ours, theirs: amounts and times, each [num_rounds].
        seed: of the resampling.

    Returns:
        None with fewer than two rounds, which show no spread, or where an arm did nothing.
    """
    num_rounds = len(ours[0])
    if num_rounds < 2 or not ours[0].sum() or not theirs[0].sum():
        return None
    rounds = np.random.default_rng(seed).integers(num_rounds, size=(_RESAMPLES, num_rounds))
    amounts = ours[0][rounds].sum(1), theirs[0][rounds].sum(1)
    times = ours[1][rounds].sum(1), theirs[1][rounds].sum(1)
    drawn = _quotient(amounts[0] * times[1], amounts[1] * times[0])
    estimate = (ours[0].sum() / ours[1].sum()) / (theirs[0].sum() / theirs[1].sum())
    return _interval(float(estimate), drawn)


def _quotient(ours: Array, theirs: Array) -> Array:
    """NaN where there is nothing to divide by: times below the clock's step, or rounds in which all requests failed."""
    found: Array = np.divide(ours, theirs, where=theirs > 0, out=np.full_like(ours, np.nan))
    return found


def _percentile(values: Array, percentile: float) -> Array:
    """Of each resample, linear between values as numpy's; NaN where there is no value."""
    # NaN is sorted to the end.
    ordered = np.sort(values.reshape(len(values), -1), axis=1)
    place = np.maximum(0, np.count_nonzero(~np.isnan(ordered), axis=1) - 1) * percentile / 100
    below = np.floor(place).astype(int)
    low, high = (np.take_along_axis(ordered, index[:, None], 1)[:, 0] for index in (below, np.ceil(place).astype(int)))
    found: Array = low + (place - below) * (high - low)
    return found


def _interval(estimate: float, drawn: Array) -> Interval | None:
    drawn = drawn[np.isfinite(drawn)]
    if not math.isfinite(estimate) or not len(drawn):
        return None
    tail = (100 - _LEVEL_PERCENT) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Interval(estimate, float(low), float(high))
