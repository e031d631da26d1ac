"""Does an expert pay? Paired comparisons of its two ways with what can be had without it.

The unit is a draw of labelled examples: every source saw the same ones, and a draw's accuracy is the mean over the
targets. Intervals and tests speak of other draws, not of other targets; how many targets agree is told beside them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from artifacts.evaluation.statistics import Interval, bootstrap, holm, ratio
from artifacts.lab.study.efficiency import TargetRecord
from artifacts.lab.study.regime import REGIMES
from artifacts.lab.study.source import CONTROLS, Source

SIGNIFICANCE: Final = 0.05
# Mean of random directions, which lift greedy accuracy by themselves.
RANDOM: Final = "random directions"

_SIGN_FLIPS: Final = 20_000
_SEED: Final = 5

Accuracies = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """One way to use the expert against one rival, on the same draws.

    Attributes:
        regime, labels: where.
        route: the expert's way.
        rival: source that it is compared with, each by its chosen estimator, or `RANDOM`.
        difference: route minus rival, accuracy on the test facts, with a 95 % bootstrap interval.
        p_value: two-sided, of a sign-flip test over draws; `adjusted` by Holm over all comparisons of the study.
        targets_ahead: targets on which the mean difference is above 0.
    """

    regime: str
    labels: int
    route: Source
    rival: str
    difference: Interval
    p_value: float
    adjusted: float
    targets_ahead: int

    @property
    def better(self) -> bool:
        return self.adjusted <= SIGNIFICANCE and self.difference.value > 0

    @property
    def worse(self) -> bool:
        return self.adjusted <= SIGNIFICANCE and self.difference.value < 0


def chosen_estimator(records: Sequence[TargetRecord], regime: str, labels: int, source: Source) -> str | None:
    """Estimator of a source in a regime, by mean accuracy on the tuning facts; None where the source was not tried.

    One choice serves all targets and numbers of labels. A choice for each point would rest on the few draws that tune
    its strength, and one unlucky choice would pass for a difference between the sources.
    """
    tried = [each for record in records for each in record.conditions if (each.regime, each.source) == (regime, source)]
    # Not every estimator is tried with the fewest labels, so only numbers at which all are count.
    estimators = list(dict.fromkeys(each.estimator for each in tried))
    full = {each.labels for each in tried if {e.estimator for e in tried if e.labels == each.labels} == {*estimators}}
    here = {each.estimator for each in tried if each.labels == labels}
    return max(
        (each for each in estimators if each in here),
        key=lambda name: fmean(each.tune_accuracy for each in tried if each.estimator == name and each.labels in full),
        default=None,
    )


def accuracies(records: Sequence[TargetRecord], regime: str, labels: int, source: Source) -> Accuracies | None:
    """[num_targets, num_draws] of a source by its chosen estimator, None where it was not tried."""
    estimator = chosen_estimator(records, regime, labels, source)
    rows = [
        each.accuracies
        for record in records
        for each in record.conditions
        if (each.regime, each.labels, each.source, each.estimator) == (regime, labels, source, estimator)
    ]
    return np.array(rows) if rows else None


def mean_interval(values: Accuracies) -> Interval:
    """Mean over draws with its 95 % bootstrap interval; values [num_targets, num_draws]."""
    draws = values.mean(axis=0)
    columns = np.stack([draws, np.ones(len(draws))], axis=1)
    return bootstrap(columns, [f"{index:04d}" for index in range(len(draws))], ratio, _SEED)


def sign_flip_p_value(differences: Accuracies) -> float:
    """Two-sided p-value of a mean difference [num_draws] if each draw's sign were a coin's."""
    generator = np.random.default_rng(_SEED)
    signs = generator.choice([-1.0, 1.0], size=(_SIGN_FLIPS, len(differences)))
    flipped = np.abs(signs @ differences)
    # A sum that is equal but for rounding counts as equal.
    return float((1 + (flipped >= abs(differences.sum()) - 1e-9).sum()) / (1 + _SIGN_FLIPS))


def compare(records: Sequence[TargetRecord]) -> list[Comparison]:
    """Every comparison of the study.

    Args:
        records: one per target, with equally many draws.
    """
    found = {pair: difference for pair in _pairs() if (difference := _differences(records, pair)) is not None}
    p_values = [sign_flip_p_value(difference.mean(axis=0)) for difference in found.values()]
    return [
        Comparison(
            regime=pair.regime,
            labels=pair.labels,
            route=pair.route,
            rival=pair.rival,
            difference=mean_interval(difference),
            p_value=p_value,
            adjusted=adjusted,
            targets_ahead=int((difference.mean(axis=1) > 0).sum()),
        )
        for pair, difference, p_value, adjusted in zip(found, found.values(), p_values, holm(p_values), strict=True)
    ]


class _Pair(NamedTuple):
    regime: str
    labels: int
    route: Source
    rival: str


def _pairs() -> list[_Pair]:
    return [
        _Pair(regime.name, labels, route, rival)
        for regime in REGIMES
        for labels in regime.counts
        for route, controls in CONTROLS.items()
        for rival in (Source.OWN, *controls, RANDOM)
    ]


def _differences(records: Sequence[TargetRecord], pair: _Pair) -> Accuracies | None:
    """[num_targets, num_draws], None where one of the two was not tried."""
    ours = accuracies(records, pair.regime, pair.labels, pair.route)
    if pair.rival == RANDOM:
        theirs: Accuracies | None = np.array([[fmean(record.random)] for record in records])
    else:
        theirs = accuracies(records, pair.regime, pair.labels, Source(pair.rival))
    return None if ours is None or theirs is None else ours - theirs
