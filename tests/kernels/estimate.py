"""Exact results together with a bound on what fp32 arithmetic may make of them."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
# Twice the unit roundoff of fp32: room for functions that are not rounded correctly.
UNIT = 2.0**-23
# A bound that allows everything, and whose powers are still finite.
ANYTHING = 1e30


class Estimate(NamedTuple):
    """What exact arithmetic gives, and how far fp32 may be from it; scalars or rows.

    Running error analysis: Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, section 3.3.
    """

    value: Array
    bound: Array

    def plus(self, other: "Estimate") -> "Estimate":
        value = self.value + other.value
        return Estimate(value, self.bound + other.bound + UNIT * abs(value))

    def minus(self, other: "Estimate") -> "Estimate":
        return self.plus(Estimate(-other.value, other.bound))

    def times(self, other: "Estimate") -> "Estimate":
        value = self.value * other.value
        bound = abs(self.value) * other.bound + abs(other.value) * self.bound + self.bound * other.bound
        return Estimate(value, bound + UNIT * abs(value))

    def over(self, other: "Estimate") -> "Estimate":
        """By a scalar. Where the divisor may be zero the result may be anything."""
        value, least = self.value / other.value, abs(other.value) - other.bound
        if least <= 0:
            return Estimate(value, np.full_like(value, ANYTHING))
        return Estimate(value, (self.bound + abs(value) * other.bound) / least + UNIT * abs(value))

    def through(self, function: Callable[..., Array], slope: float, unit: float = 4 * UNIT) -> "Estimate":
        """A function with that greatest slope, computed with an error of `unit`."""
        return Estimate(function(self.value), slope * self.bound + unit)

    def sum(self) -> "Estimate":
        """Rounding errors of the partial sums, whose sizes hardly depend on the order, add up like a random walk."""
        rounding = 4 * UNIT * np.sqrt((np.cumsum(self.value) ** 2).sum())
        return Estimate(self.value.sum(), self.bound.sum() + rounding)

    def norm(self) -> "Estimate":
        square = self.times(self).sum()
        value = np.sqrt(square.value)
        return Estimate(value, square.bound / (2 * value) + UNIT * value if value > 0 else np.sqrt(square.bound))


def exactly(value: float | Array | Tensor) -> Estimate:
    array = value.double().numpy() if isinstance(value, Tensor) else np.asarray(value, np.float64)
    return Estimate(array, np.zeros_like(array))
