"""How well a direction separates two classes, and which way it points."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Two-sided 95 % interval of a normal variable.
Z_95 = 1.959964


class SignError(ValueError):
    """The projection on a direction does not correlate with the labels, so the direction has no sign."""


class SignedCorrelation(NamedTuple):
    """Pearson correlation of a projection with the labels and its 95 % interval (Fisher's z)."""

    value: float
    low: float
    high: float


def area_under_curve(projection: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve of `projection` [num_rows] for `labels` (0 or 1): the Mann-Whitney statistic, ties half.

    Raises:
        ValueError: a class has no row.
    """
    positive, negative = projection[labels == 1].double(), projection[labels == 0].double()
    if not len(positive) or not len(negative):
        raise ValueError(f"{len(positive)} rows with label 1 and {len(negative)} with label 0; both need at least one")
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive)
    not_above = torch.searchsorted(ordered, positive, right=True)
    return float((below + not_above).double().mean() / 2 / len(negative))


def signed_correlation(projection: Tensor, labels: Tensor) -> SignedCorrelation:
    """Correlation of a projection [num_rows] with its labels and the 95 % interval."""
    num_rows = len(labels)
    if num_rows < 4:
        raise ValueError(f"{num_rows} rows give no interval for a correlation; at least 4 are needed")
    x, y = projection.double(), labels.double()
    x, y = x - x.mean(), y - y.mean()
    scale = float(x.norm() * y.norm())
    value = float(x @ y) / scale if scale > 0 else 0.0
    value = max(-1.0, min(1.0, value))
    centre = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, value)))
    half = Z_95 / math.sqrt(num_rows - 3)
    return SignedCorrelation(value, math.tanh(centre - half), math.tanh(centre + half))


def direction_sign(projection: Tensor, labels: Tensor, given: int | None = None) -> int:
    """+1 or -1 so that the signed projection grows with the label.

    Args:
        projection: [num_rows], states on the direction.
        labels: [num_rows], 0 or 1.
        given: used when the data show no sign: +1 takes the direction along which the weak correlation of these rows
            is positive, -1 the opposite one. Counted from the correlation, because the direction itself may come from
            an eigenvector, whose own sign is an accident.

    Raises:
        SignError: the interval of the correlation covers 0 and no sign is given.
    """
    correlation = signed_correlation(projection, labels)
    if correlation.low <= 0 <= correlation.high:
        if given is None:
            raise SignError(
                f"correlation with the labels {correlation.value:+.3f}, 95 % interval "
                f"[{correlation.low:+.3f}, {correlation.high:+.3f}] covers 0: the direction has no sign; "
                "give one with vectors.sign or use more contrast rows"
            )
        return given if correlation.value >= 0 else -given
    return 1 if correlation.value > 0 else -1
