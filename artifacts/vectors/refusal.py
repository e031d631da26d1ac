"""Data that no direction should be fitted on: states that are not numbers, one class, an expert without signal."""

from typing import NamedTuple

import torch
from scipy.optimize import brentq
from scipy.stats import norm
from torch import Tensor

from artifacts.vectors.score import area_under_curve

_EDGE = 1e-9


class NoSignalError(ValueError):
    """A probe tells the classes of held-out rows apart no better than chance."""


class AreaInterval(NamedTuple):
    """Area under the ROC curve and its two-sided interval."""

    value: float
    low: float
    high: float

    @property
    def above_chance(self) -> bool:
        """Whether the whole interval lies above one half."""
        return self.low > 0.5


def require_finite(states: Tensor, name: str = "states") -> None:
    """Refuse states [num_rows, width] that hold NaN or an infinity.

    Raises:
        ValueError: with the number of such rows and the first of them.
    """
    bad = torch.nonzero(~torch.isfinite(states).all(dim=1)).flatten()
    if bad.numel():
        raise ValueError(
            f"{name}: {bad.numel()} of {len(states)} rows hold NaN or infinity, the first is row {int(bad[0])}; "
            "capture in float32 or bfloat16 (float16 overflows at 65504) or drop these texts"
        )


def require_classes(labels: Tensor, least: int = 1) -> None:
    """Refuse labels [num_rows] other than 0 and 1, and a class with fewer than `least` rows.

    Raises:
        ValueError: with the count of each class.
    """
    positive, negative = int((labels == 1).sum()), int((labels == 0).sum())
    if positive + negative != len(labels):
        raise ValueError(f"{len(labels) - positive - negative} of {len(labels)} labels are neither 0 nor 1")
    if min(positive, negative) < least:
        raise ValueError(
            f"{positive} rows with label 1 and {negative} with label 0; both need at least {least}, "
            "so add rows of the rarer label"
        )


def area_interval(projection: Tensor, labels: Tensor, confidence: float = 0.95) -> AreaInterval:
    """Area under the ROC curve with a score interval that stays honest at 1 and with few rows.

    Hanley and McNeil (Radiology, 1982) give the variance of the area, Newcombe (Statistics in Medicine 25, 2006,
    method 5) evaluates it at each limit instead of at the estimate, so that perfect separation of three rows from
    three does not pass for certainty.

    Args:
        projection: [num_rows], larger for label 1.
        labels: [num_rows], 0 or 1.
        confidence: of the interval, in (0, 1); 1 - 0.05 / k where the best of k probes is looked at (Bonferroni).

    Raises:
        ValueError: a class has no row.
    """
    value = area_under_curve(projection, labels)
    positive, negative = int((labels == 1).sum()), int((labels == 0).sum())

    z = float(norm.ppf((1 + confidence) / 2))

    def excess(limit: float) -> float:
        return (value - limit) ** 2 - z**2 * _area_variance(limit, positive, negative)

    # At 0 and 1 themselves the variance vanishes and `excess` with it: the limits sought lie further in.
    low = 0.0 if value <= 0 else float(brentq(excess, 0.0, min(value, 1 - _EDGE)))
    high = 1.0 if value >= 1 else float(brentq(excess, max(value, _EDGE), 1.0))
    return AreaInterval(value, low, high)


def require_signal(projection: Tensor, labels: Tensor, name: str, confidence: float = 0.95) -> AreaInterval:
    """Refuse a probe whose area under the curve on rows that it was not fitted on is not above chance.

    Args:
        projection: [num_rows], scores of held-out rows.
        labels: [num_rows], 0 or 1.
        name: whose states were probed, for the message.
        confidence: of the interval.

    Raises:
        NoSignalError: the interval reaches down to one half.
    """
    area = area_interval(projection, labels, confidence)
    if not area.above_chance:
        raise NoSignalError(
            f"{name}: a probe on {len(labels)} held-out rows has an area under the curve of {area.value:.3f}, "
            f"{100 * confidence:g} % interval [{area.low:.3f}, {area.high:.3f}], which is not above chance (0.5); use "
            "an expert or layers that know the concept, or more rows"
        )
    return area


def _area_variance(area: float, positive: int, negative: int) -> float:
    """Variance of the Mann-Whitney area under exponential scores, both class sizes at their mean (Newcombe 2006)."""
    others = (positive + negative) / 2 - 1
    spread = 1 + others * ((1 - area) / (2 - area) + area / (1 + area))
    return area * (1 - area) * spread / (positive * negative)
