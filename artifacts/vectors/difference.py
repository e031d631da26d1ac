"""Difference of means: the direction from the negative to the positive class."""

from torch import Tensor


def difference_of_means(states: Tensor, labels: Tensor) -> Tensor:
    """Unit vector from the mean of the rows labelled 0 to the mean of those labelled 1, [width], float32.

    Args:
        states: [num_rows, width].
        labels: [num_rows], 0 or 1.

    Raises:
        ValueError: a class has no row, or both means are equal.
    """
    positive, negative = states[labels == 1].double(), states[labels == 0].double()
    if not len(positive) or not len(negative):
        raise ValueError(f"{len(positive)} rows with label 1 and {len(negative)} with label 0; both need at least one")
    return unit(positive.mean(0) - negative.mean(0))


def unit(vector: Tensor) -> Tensor:
    """`vector` [width] at norm 1, float32.

    Raises:
        ValueError: its norm is zero or not finite.
    """
    norm = vector.double().norm()
    if not 0 < float(norm) < float("inf"):
        raise ValueError(f"a direction of norm {float(norm):g} cannot be scaled to 1")
    scaled: Tensor = (vector.double() / norm).float()
    return scaled
