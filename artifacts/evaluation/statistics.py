"""Uncertainty of figures: bootstrap over groups of rows, McNemar's test, Holm's correction.

Every figure here is a function of sums over rows, so a resample is a matrix product: draw how often each group occurs,
multiply with the groups' sums, apply the function. Rows of one group stay together.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

Array = NDArray[np.float64]
RESAMPLES = 2000
LEVEL = 0.95


class Interval(NamedTuple):
    """A figure with its confidence interval of level `LEVEL`."""

    value: float
    low: float
    high: float


class McNemar(NamedTuple):
    """Paired comparison of two conditions on the same questions.

    Attributes:
        first_only, second_only: questions that only one of the two answered rightly.
        p_value: exact, two-sided: the smaller count under a fair coin. It takes questions as independent; the bootstrap
            interval of the difference does not, where groups are given.
    """

    first_only: int
    second_only: int
    p_value: float


def bootstrap(
    columns: Array, groups: Sequence[str], figure: Callable[[Array], Array], seed: int, resamples: int = RESAMPLES
) -> Interval:
    """Percentile bootstrap of a function of column sums.

    Args:
        columns: [num_rows, num_columns].
        groups: of the rows.
        figure: from sums [..., num_columns] to figures [...]; of NaN, as of no denominator, a resample is left out.
        seed: of the resampling.
        resamples: how many.
    """
    sums = _by_group(columns, groups)
    value = float(figure(sums.sum(0)))
    drawn = figure(_weights(len(sums), resamples, np.random.default_rng(seed)) @ sums)
    return _interval(value, drawn)


def accuracy_interval(correct: Sequence[bool], groups: Sequence[str], seed: int) -> Interval:
    """Share of right answers.

    Where all answers are right, or none, resampling shows no spread; the exact binomial interval over the groups takes
    its place, because few questions prove little.
    """
    columns = np.stack([np.asarray(correct, float), np.ones(len(correct))], axis=1)
    found = bootstrap(columns, groups, ratio, seed)
    if found.value not in (0.0, 1.0):
        return found
    count = len(set(groups))
    exact = binomtest(round(found.value * count), count).proportion_ci(LEVEL, method="exact")
    return Interval(found.value, float(exact.low), float(exact.high))


def difference_interval(first: Sequence[bool], second: Sequence[bool], groups: Sequence[str], seed: int) -> Interval:
    """Accuracy of the first minus accuracy of the second, on the same questions."""
    difference = np.asarray(first, float) - np.asarray(second, float)
    return bootstrap(np.stack([difference, np.ones(len(first))], axis=1), groups, ratio, seed)


def draws_interval(draws: Array, groups: Sequence[str], seed: int, against: Sequence[bool] | None = None) -> Interval:
    """Mean accuracy of several draws of a chance control; draws and groups of questions are both resampled.

    Args:
        draws: [num_draws, num_rows], 1 where the answer is right.
        groups: of the rows.
        seed: of the resampling.
        against: take the accuracy of these answers minus the mean of the draws.
    """
    rng = np.random.default_rng(seed)
    sums = _by_group(draws.T, groups)
    counts = _by_group(np.ones((draws.shape[1], 1)), groups)[:, 0]
    base = np.zeros(len(counts)) if against is None else _by_group(np.asarray(against, float)[:, None], groups)[:, 0]
    sign = 1.0 if against is None else -1.0
    value = float((base.sum() + sign * sums.mean(1).sum()) / counts.sum())
    groups_drawn = _weights(len(counts), RESAMPLES, rng)
    draws_drawn = _weights(len(draws), RESAMPLES, rng) / len(draws)
    means = np.einsum("rg,gd,rd->r", groups_drawn, sums, draws_drawn)
    return _interval(value, (groups_drawn @ base + sign * means) / (groups_drawn @ counts))


def rank_p_value(value: float, draws: Sequence[float]) -> float:
    """One-sided p-value of a figure among draws of chance: (1 + draws at least as high) / (1 + draws)."""
    return (1 + sum(draw >= value for draw in draws)) / (1 + len(draws))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """Exact McNemar test of two lists of answers to the same questions."""
    pairs = list(zip(first, second, strict=True))
    first_only, second_only = pairs.count((True, False)), pairs.count((False, True))
    disagreeing = first_only + second_only
    p_value = float(binomtest(first_only, disagreeing).pvalue) if disagreeing else 1.0
    return McNemar(first_only, second_only, p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: controls the chance of any false finding in the family."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def ratio(sums: Array) -> Array:
    """First column over the second; NaN where the second is 0."""
    numerator, denominator = sums[..., 0], sums[..., 1]
    result: Array = np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator != 0)
    return result


def _by_group(columns: Array, groups: Sequence[str]) -> Array:
    """Sums [num_groups, num_columns] of rows [num_rows, num_columns]; the order of the groups is alphabetical."""
    names, places = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.zeros((len(names), columns.shape[1]))
    np.add.at(sums, places, columns)
    return sums


def _weights(count: int, resamples: int, rng: np.random.Generator) -> Array:
    """How often each of `count` items occurs in each resample, [resamples, count]."""
    return rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(float)


def _interval(value: float, drawn: Array) -> Interval:
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return Interval(value, value, value)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))
