"""Examples whose label a probe that never saw them doubts.

Confident learning (Northcutt, Jiang and Chuang, JAIR 2021): probabilities come from cross-validated fits, and an
example is suspected when its probability of the other label reaches what examples of that other label have on average.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor

from artifacts.vectors.coordinates import rotated
from artifacts.vectors.logistic import RIDGE_GRID, log_loss, logistic_weights
from artifacts.vectors.refusal import require_classes, require_finite

MAX_FOLDS = 5


class Suspects(NamedTuple):
    """Suspected labels, the most doubtful first.

    Attributes:
        rows: [num_suspects], int64, row indices.
        probability: [num_suspects], float64, out-of-fold probability of the given label.
        all_probabilities: [num_rows], float64, the same for every row.
    """

    rows: Tensor
    probability: Tensor
    all_probabilities: Tensor


def suspected_labels(
    states: Tensor, labels: Tensor, groups: Tensor, components: int, seed: int, threshold: float | None = None
) -> Suspects:
    """Find examples that are probably mislabelled.

    Args:
        states: [num_rows, width]; labels: [num_rows], 0 or 1.
        groups: [num_rows], int64; a group is never on both sides of a fold.
        components: principal coordinates of the probe.
        seed: of the folds.
        threshold: suspect where the probability of the given label lies below it, in (0, 1); None takes the rule of
            confident learning.

    Raises:
        ValueError: states that are not finite, or too few rows or groups of a class for two folds.
    """
    require_finite(states)
    require_classes(labels, least=2)
    # Labels play no part in the coordinates, so they may be those of all rows.
    inputs = rotated(states, components, seed).of(states)
    probability = _out_of_fold(inputs, labels, groups, seed).sigmoid()
    given = torch.where(labels == 1, probability, 1 - probability)
    doubtful = _confidently_other(given, labels) if threshold is None else given < threshold
    rows = torch.nonzero(doubtful).flatten()
    rows = rows[given[rows].argsort(stable=True)]
    return Suspects(rows, given[rows], given)


def _confidently_other(given: Tensor, labels: Tensor) -> Tensor:
    """Whether the other label is likelier, and as likely as for the rows that carry it; [num_rows], bool."""
    usual = torch.stack([given[labels == label].mean() for label in (0, 1)])
    return (given < 0.5) & (1 - given >= usual[1 - labels])


def _out_of_fold(inputs: Tensor, labels: Tensor, groups: Tensor, seed: int) -> Tensor:
    """Log-odds of label 1 from probes fitted without the row's fold, at the ridge of least log-loss; [num_rows]."""
    folds = _folds(labels, groups, seed)
    candidates = []
    for ridge in RIDGE_GRID:
        log_odds = inputs.new_zeros(len(inputs))
        for fitted, left_out in folds:
            weight, bias = logistic_weights(inputs[fitted], labels[fitted], ridge)
            log_odds[left_out] = inputs[left_out] @ weight + bias
        candidates.append(log_odds)
    return min(candidates, key=lambda log_odds: log_loss(log_odds, labels))


def _folds(labels: Tensor, groups: Tensor, seed: int) -> Sequence[tuple[Tensor, Tensor]]:
    """Row indices to fit on and to leave out, for up to five folds with both classes on the fitted side."""
    classes = [groups[labels == label].unique().numel() for label in (0, 1)]
    rarest = min(int((labels == label).sum()) for label in (0, 1))
    count = min(MAX_FOLDS, groups.unique().numel(), *classes, rarest)
    if count < 2:
        raise ValueError(
            f"{classes[1]} groups with label 1 and {classes[0]} with label 0; cross-validation needs at least 2 of each"
        )
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    rows = np.zeros((len(labels), 1))
    folds = [
        (torch.from_numpy(fitted), torch.from_numpy(left_out))
        for fitted, left_out in splitter.split(rows, labels.cpu().numpy(), groups.cpu().numpy())
    ]
    for fitted, _ in folds:
        require_classes(labels[fitted])
    return folds
