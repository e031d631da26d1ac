"""One layer of a target in the second world: how the label can be read there, and which directions are found."""

from dataclasses import dataclass
from typing import Final

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import PolynomialFeatures
from torch import Tensor

from artifacts.lab.nonlinear.contrast import QUADRUPLE, Contrast
from artifacts.vectors.coordinates import whitened
from artifacts.vectors.difference import difference_of_means
from artifacts.vectors.logistic import fit_logistic
from artifacts.vectors.rfm import fit_rfm
from artifacts.vectors.score import area_under_curve

_COMPONENTS: Final = 64
_ITERATIONS: Final = 5
_FIT_SHARE: Final = 0.75  # of the labelled quadruples; the others tune ridge strength and iteration
# A quadratic probe has a weight per pair of components, so it gets the leading ones only.
_QUADRATIC_COMPONENTS: Final = 10
_QUADRATIC_INVERSE_RIDGE: Final = 0.1


@dataclass(frozen=True)
class Directions:
    """Unit directions [hidden_size] of one layer. No estimator but `axis` is told to which side a speaker errs.

    Attributes:
        axis: from the speakers against whom all words speak to those for whom all do: what steering should find.
        difference: of the means of both classes.
        logistic: weight of a ridge logistic regression.
        rfm: top direction of a Recursive Feature Machine, as a displacement.
        rfm_covector: the same direction as a gradient.
    """

    axis: Tensor
    difference: Tensor
    logistic: Tensor
    rfm: Tensor
    rfm_covector: Tensor


@dataclass(frozen=True)
class Readability:
    """Areas under the ROC curve on introductions that no estimator saw, and cosines with the axis, without sign.

    Attributes:
        difference, logistic: of the label by linear probes; 0.5 is chance.
        quadratic: of the label by a quadratic probe.
        axis: of the sign of the evidence by the axis.
        cosine_difference, cosine_logistic, cosine_rfm: of the directions found.
        cosine_rfm_difference: between the two.
        eigenvalue: share of the top eigenvalue in the RFM's gradient outer product.
    """

    difference: float
    logistic: float
    quadratic: float
    axis: float
    cosine_difference: float
    cosine_logistic: float
    cosine_rfm: float
    cosine_rfm_difference: float
    eigenvalue: float


def read_layer(
    states: Tensor, contrast: Contrast, held_states: Tensor, held: Contrast, seed: int
) -> tuple[Directions, Readability]:
    """Fit every estimator on one layer.

    Args:
        states: [num_texts, hidden_size] of `contrast`; directions and probes are fitted on them.
        held_states: [num_held, hidden_size] of `held`; the readability is measured on them.
        seed: of the estimators.
    """
    labels = contrast.labels
    fit_end = int(len(labels) / QUADRUPLE * _FIT_SHARE) * QUADRUPLE
    parts = (states[:fit_end], labels[:fit_end], states[fit_end:], labels[fit_end:])
    # The label says nothing of a side, so the sign is a convention; whoever steers tries both.
    logistic = fit_logistic(*parts, _COMPONENTS, seed, sign=1).probe.direction
    rfm = fit_rfm(*parts, _COMPONENTS, _ITERATIONS, seed, sign=1)
    told = contrast.evidence != 0
    directions = Directions(
        axis=difference_of_means(states[told], (contrast.evidence[told] > 0).long()),
        difference=difference_of_means(states, labels),
        logistic=logistic,
        rfm=rfm.displacement,
        rfm_covector=rfm.covector,
    )
    held_told = held.evidence != 0
    return directions, Readability(
        difference=area_under_curve(held_states @ directions.difference, held.labels),
        logistic=area_under_curve(held_states @ directions.logistic, held.labels),
        quadratic=_quadratic_area(states, labels, held_states, held.labels, seed),
        axis=area_under_curve((held_states @ directions.axis)[held_told], (held.evidence[held_told] > 0).long()),
        cosine_difference=_cosine(directions.difference, directions.axis),
        cosine_logistic=_cosine(directions.logistic, directions.axis),
        cosine_rfm=_cosine(directions.rfm, directions.axis),
        cosine_rfm_difference=_cosine(directions.rfm, directions.difference),
        eigenvalue=float(rfm.eigenvalues[0]),
    )


def _quadratic_area(states: Tensor, labels: Tensor, held_states: Tensor, held_labels: Tensor, seed: int) -> float:
    coordinates = whitened(states, _QUADRATIC_COMPONENTS, seed)
    products = PolynomialFeatures(degree=2, include_bias=False)
    inputs = products.fit_transform(coordinates.of(states).numpy())
    probe = LogisticRegression(C=_QUADRATIC_INVERSE_RIDGE, max_iter=5000).fit(inputs, labels.numpy())
    scores = probe.decision_function(products.transform(coordinates.of(held_states).numpy()))
    return area_under_curve(torch.from_numpy(scores), held_labels)


def _cosine(one: Tensor, other: Tensor) -> float:
    return abs(float(one @ other))
