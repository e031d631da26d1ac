"""One estimator of a direction on one set of states, by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from artifacts.jobs.config import VectorSettings
from artifacts.vectors.difference import difference_of_means
from artifacts.vectors.lda import fit_lda
from artifacts.vectors.logistic import fit_logistic
from artifacts.vectors.pca import fit_pca
from artifacts.vectors.rfm import fit_rfm

METHODS: Final = ("diffmean", "rfm", "logistic", "pca", "lda")
# Principal coordinates of the linear classifiers: more than the RFM's, because a ridge penalty guards them.
CLASSIFIER_COMPONENTS: Final = 256


@dataclass(frozen=True)
class Examples:
    """Labelled rows of some states.

    Attributes:
        labels: [num_rows], 0 or 1.
        groups: [num_rows], int64, equal for rows on the same content.
        fit, choose: row indices to fit on, and to choose a hyper-parameter or an iteration with; repeats are allowed.
    """

    labels: Tensor
    groups: Tensor
    fit: Sequence[int]
    choose: Sequence[int]

    @property
    def known(self) -> list[int]:
        """All rows that a method without anything to choose is fitted on."""
        return sorted([*self.fit, *self.choose])


def estimate(
    method: str, states: Tensor, examples: Examples, settings: VectorSettings, seed: int, sign: int | None
) -> Mapping[str, Tensor]:
    """Unit directions [width], float32, by part: one part named "" but for `rfm`.

    Args:
        method: of `METHODS`.
        states: [num_rows, width].
        examples: which rows teach what.
        settings: components and iterations.
        seed: of what is drawn at random.
        sign: of the correlation with the labels, used when the data show none.

    Raises:
        SignError: the direction has no sign and none is given.
        ValueError: a class without rows, or states without variance.
    """
    labels, known = examples.labels, examples.known
    if method == "diffmean":
        return {"": difference_of_means(states[known], labels[known])}
    if method == "pca":
        return {"": fit_pca(states[known], labels[known], examples.groups[known], seed, sign)}
    if method == "lda":
        return {"": fit_lda(states[known], labels[known], CLASSIFIER_COMPONENTS, seed, sign).direction}
    fit, choose = list(examples.fit), list(examples.choose)
    parts = states[fit], labels[fit], states[choose], labels[choose]
    if method == "logistic":
        return {"": fit_logistic(*parts, CLASSIFIER_COMPONENTS, seed, sign).probe.direction}
    vectors = fit_rfm(*parts, settings.components, settings.iterations, seed, sign)
    return {"covector": vectors.covector, "displacement": vectors.displacement, "eigenvalues": vectors.eigenvalues}
