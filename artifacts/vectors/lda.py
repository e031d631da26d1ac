"""Linear discriminant analysis with a shrunken covariance: the difference of means, seen through the noise.

Sigma^-1 (mean_1 - mean_0) with the pooled within-class covariance shrunk towards a multiple of the identity by the rule
of Ledoit and Wolf (2004), through scikit-learn and in principal coordinates, so that no [width, width] matrix arises.
The coordinates share one scale: whitened ones would be shrunk towards the states' own covariance instead, which leaves
axes of next to no variance free to dominate the direction.
"""

import numpy as np
import torch
from sklearn.covariance import LedoitWolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from artifacts.vectors.coordinates import rotated
from artifacts.vectors.probe import LinearProbe
from artifacts.vectors.refusal import require_classes, require_finite
from artifacts.vectors.score import direction_sign


def fit_lda(states: Tensor, labels: Tensor, components: int, seed: int = 0, sign: int | None = None) -> LinearProbe:
    """Fit the discriminant.

    Args:
        states: [num_rows, width]; labels: [num_rows], 0 or 1, at least two rows each.
        components: principal coordinates to fit in, >= 1; fewer when the states have a lower rank.
        seed: of the coordinates where they are found at random.
        sign: of the correlation with the labels, used when the data show none.

    Raises:
        SignError: the direction has no sign and none is given.
        ValueError: states that are not finite, a class with fewer than two rows, or all rows equal.
    """
    require_finite(states)
    require_classes(labels, least=2)
    coordinates = rotated(states, components, seed)
    inputs = coordinates.of(states)
    model = LinearDiscriminantAnalysis(solver="lsqr", covariance_estimator=LedoitWolf())
    model.fit(inputs.cpu().numpy(), labels.cpu().numpy().astype(np.int64))
    weight = torch.from_numpy(model.coef_[0].astype(np.float64)).to(inputs.device)
    given = direction_sign(inputs @ weight, labels, sign)
    return LinearProbe.of_coordinates(coordinates, weight, float(model.intercept_[0]), given)
