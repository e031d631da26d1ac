"""First principal component of what separates the classes (LAT, "linear artificial tomography").

Zou and others, "Representation Engineering" (2023): the direction along which paired states differ most. It reads the
labels only to form the pairs and to choose the sign.
"""

import numpy as np
import torch
from scipy.sparse.linalg import svds
from torch import Tensor

from artifacts.vectors.difference import unit
from artifacts.vectors.refusal import require_classes, require_finite
from artifacts.vectors.score import direction_sign

# One difference is a direction, and only more of them have a common one.
MIN_PAIRS = 2


def fit_pca(states: Tensor, labels: Tensor, groups: Tensor, seed: int = 0, sign: int | None = None) -> Tensor:
    """First principal direction, [width], unit, float32, signed by the labels.

    Where at least two groups hold both labels: of the paired differences d_g = mean of the group's rows labelled 1 -
    mean of those labelled 0, taken about zero (the first eigenvector of sum d_g d_g^T), because a difference that all
    pairs share is the concept and not an offset to remove. Otherwise: of the states about the midpoint of both class
    means, which does not move when one class has more rows.

    Args:
        states: [num_rows, width]; labels: [num_rows], 0 or 1.
        groups: [num_rows], int64, equal for rows on the same content.
        seed: of the start of the iteration.
        sign: of the correlation with the labels, used when the data show none.

    Raises:
        SignError: the direction has no sign and none is given.
        ValueError: states that are not finite, a class without rows, or no difference at all.
    """
    require_finite(states)
    require_classes(labels)
    spread = paired_differences(states, labels, groups)
    if len(spread) < MIN_PAIRS:
        midpoint = (states[labels == 1].double().mean(0) + states[labels == 0].double().mean(0)) / 2
        spread = states.double() - midpoint
    direction = _first_axis(spread, seed)
    return unit(direction * direction_sign(states.double() @ direction, labels, sign))


def paired_differences(states: Tensor, labels: Tensor, groups: Tensor) -> Tensor:
    """Mean of the rows labelled 1 minus mean of those labelled 0 within each group that holds both.

    Returns:
        [num_pairs, width], float64, in the order of the group numbers.
    """
    names, index = groups.unique(return_inverse=True)
    sums = torch.zeros(2, len(names), states.shape[1], dtype=torch.float64, device=states.device)
    counts = torch.zeros(2, len(names), dtype=torch.float64, device=states.device)
    for label in (0, 1):
        chosen = labels == label
        sums[label].index_add_(0, index[chosen], states[chosen].double())
        counts[label] += torch.bincount(index[chosen], minlength=len(names))
    both = (counts > 0).all(0)
    means = sums[:, both] / counts[:, both, None]
    return means[1] - means[0]


def _first_axis(rows: Tensor, seed: int) -> Tensor:
    """First right singular vector of rows [num_rows, width], not centred; [width], float64."""
    if not float(rows.norm()) > 0:
        raise ValueError(f"all {len(rows)} differences are zero: the states do not depend on the label")
    _, _, axes = svds(rows.cpu().numpy(), k=1, rng=np.random.default_rng(seed))
    return torch.from_numpy(axes[0].copy()).to(rows.device)
