"""The expert as labeller: a second way to use an expert, which needs no space shared with the target.

A probe on the expert's states of a few labelled texts gives plenty of unlabelled texts a probability of the concept;
the target's own vector is then fitted to those labels, on the target's own states of the same texts.

What a text is about varies far more than the concept, in both models, and swamps both fits. So the probe works in
whitened coordinates of the unlabelled texts, where no subject is louder than the concept, and in as few of them as
separate the classes, because the faint ones tell the labelled texts' wording and not the concept. And the vector
compares every text with the one of the opposite label that is nearest to it in the target.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy.stats import mannwhitneyu
from sklearn.metrics import pairwise_distances_argmin
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor

from artifacts.vectors.coordinates import rotated, whitened
from artifacts.vectors.difference import unit
from artifacts.vectors.logistic import log_loss, logistic_weights
from artifacts.vectors.refusal import NoSignalError, area_interval, require_classes, require_finite
from artifacts.vectors.score import Z_95, area_under_curve

LabelledMethod = Literal["matched", "weighted", "logistic"]

COMPONENTS = (16, 32, 48, 64, 128)
RIDGES = (1e-2, 1e-1, 1.0)
FOLDS = 5
# Fewer labelled groups than this leave nothing to hold out.
LEAST_GROUPS = 4
# An area under the curve this much below the best counts as equal even if its standard error is smaller.
AREA_TOLERANCE = 0.01
SIGNIFICANCE = 0.05
# Probability from which a label counts as confident, and what the confident labels of a usable labelling are at least.
CONFIDENT = 0.75
LEAST_CONFIDENT = 16
LEAST_RARER_SHARE = 0.05

_SCALE_RIDGE = 1e-2
_TARGET_COMPONENTS = 64
_TARGET_RIDGE = 1e-1


@dataclass(frozen=True)
class Labelling:
    """Probabilities of the concept that a probe on the expert gives the unlabelled texts.

    Attributes:
        layer: expert layer of the probe.
        auc: area under the curve of the labelled rows, each scored by a probe that saw no row of its group.
        p_value: of that area against chance, one-sided Mann-Whitney, times the number of probes it was chosen from.
        components: whitened coordinates that the probe uses.
        ridge: its ridge strength.
        probabilities: [num_unlabelled], float64, of label 1.
    """

    layer: int
    auc: float
    p_value: float
    components: int
    ridge: float
    probabilities: Tensor

    @property
    def confident(self) -> tuple[int, int]:
        """How many unlabelled texts are confidently labelled 0 and 1."""
        zeros, ones = self.probabilities <= 1 - CONFIDENT, self.probabilities >= CONFIDENT
        return int(zeros.sum()), int(ones.sum())

    def require_usable(self) -> None:
        """Refuse labels that no vector should be fitted to.

        Raises:
            NoSignalError: the probe is not above chance on groups that it was not fitted on.
            ValueError: too few labels are confident, or almost all of them are the same.
        """
        if self.p_value > SIGNIFICANCE:
            raise NoSignalError(
                f"the probe of expert layer {self.layer} has an area under the curve of {self.auc:.3f} on held-out "
                f"groups, p = {self.p_value:.3g} against chance (at most {SIGNIFICANCE}); use an expert that "
                "knows the concept or more labelled rows"
            )
        zeros, ones = self.confident
        rarer, share = min(zeros, ones), min(zeros, ones) / max(zeros + ones, 1)
        if zeros + ones >= 2 * LEAST_CONFIDENT and share < LEAST_RARER_SHARE:
            raise ValueError(
                f"the expert's labels are one-sided: of {len(self.probabilities)} unlabelled texts {ones} are "
                f"confidently 1, {zeros} confidently 0, the rarer {share:.1%} of both (at least "
                f"{LEAST_RARER_SHARE:.0%}); give unlabelled texts of both kinds"
            )
        if rarer < LEAST_CONFIDENT:
            raise ValueError(
                f"the expert labels {ones} of {len(self.probabilities)} unlabelled texts confidently 1 and {zeros} "
                f"confidently 0 (at least {LEAST_CONFIDENT} each, probability {CONFIDENT}); give more unlabelled texts "
                "that show the concept"
            )


def label_texts(
    expert_states: Mapping[int, Tensor],
    labels: Tensor,
    groups: Sequence[str],
    unlabelled_states: Mapping[int, Tensor],
    seed: int,
) -> Labelling:
    """Label texts by the expert, or refuse with figures.

    Args:
        expert_states: by expert layer, [num_rows, width] of the labelled texts.
        labels: [num_rows], 0 or 1.
        groups: [num_rows], what each row is about; rows of one group never judge a probe that saw another of them.
        unlabelled_states: by the same layers, [num_unlabelled, width].
        seed: of the folds.

    Raises:
        NoSignalError, ValueError: as in `Labelling.require_usable` and `unchecked_labels`.
    """
    labelling = unchecked_labels(expert_states, labels, groups, unlabelled_states, seed)
    labelling.require_usable()
    return labelling


def unchecked_labels(
    expert_states: Mapping[int, Tensor],
    labels: Tensor,
    groups: Sequence[str],
    unlabelled_states: Mapping[int, Tensor],
    seed: int,
) -> Labelling:
    """`label_texts` without its refusals, for a study of what the labels would have been worth.

    Layer, number of coordinates and ridge strength are chosen by cross-validation over groups. All probes count as
    equal whose area under the curve is within a standard error of the best one's (Breiman and others, 1984) or within
    `AREA_TOLERANCE`. Of those the fewest coordinates are taken, for each layer the ridge strength of the least
    log-loss, and of several layers the one whose log-odds of the unlabelled texts correlate most with the others': a
    layer that separates the labelled texts by their wording alone says something else about other texts.

    Raises:
        ValueError: fewer than `LEAST_GROUPS` groups or a class without rows in some fold, states that are not finite,
            or unlabelled rows that are all equal.
    """
    folds = _folds(labels, groups, seed)
    trials = [
        trial
        for layer, states in expert_states.items()
        for trial in _trials(layer, states, labels, unlabelled_states[layer], folds, seed)
    ]
    equals = _simplest(trials, labels)
    log_odds = [_log_odds(trial, expert_states[trial.layer], labels, unlabelled_states, seed) for trial in equals]
    index = _most_agreed(log_odds)
    chosen = equals[index]
    positive, negative = (chosen.scores[labels == label].numpy() for label in (1, 0))
    # Every layer and number of coordinates was a chance to look good; probes that differ by their ridge hardly differ.
    choices = len(expert_states) * len(COMPONENTS)
    p_value = choices * float(mannwhitneyu(positive, negative, alternative="greater").pvalue)
    return Labelling(
        chosen.layer, chosen.auc, min(p_value, 1.0), chosen.components, chosen.ridge, log_odds[index].sigmoid()
    )


def labelled_direction(target_states: Tensor, probabilities: Tensor, method: LabelledMethod = "matched") -> Tensor:
    """The target's own direction of the concept that another model labelled; [width], unit, float32.

    `matched` is the mean difference between each text and the nearest one of the opposite label in the target, weighted
    by how far their probabilities are apart: what both are about cancels out, as in matching estimators of causal
    effects (Abadie and Imbens, Econometrica 74, 2006). `weighted` is the difference of means, each text weighted by its
    confidence. `logistic` is the weight of a ridge logistic regression on the confidently labelled texts. The last two
    are swamped by content unless the labels are independent of it.

    Args:
        target_states: [num_unlabelled, width], of the same texts.
        probabilities: [num_unlabelled], of label 1.
        method: estimator.

    Raises:
        ValueError: no text is on one side of one half (`logistic`: none is confident), or the direction is zero.
    """
    require_finite(target_states, "target states")
    states, confidence = target_states.double(), 2 * probabilities.double() - 1
    if method == "logistic":
        kept = confidence.abs() >= 2 * CONFIDENT - 1
        classes = (confidence[kept] > 0).long()
        require_classes(classes)
        coordinates = rotated(states[kept], _TARGET_COMPONENTS)
        weight, _bias = logistic_weights(coordinates.of(states[kept]), classes, _TARGET_RIDGE)
        return unit(coordinates.covector(weight))
    above, below = torch.nonzero(confidence > 0).flatten(), torch.nonzero(confidence < 0).flatten()
    if not len(above) or not len(below):
        raise ValueError(f"{len(above)} texts have a probability above 0.5 and {len(below)} below; both need one")
    if method == "weighted":
        means = [_weighted_mean(states[side], confidence[side].abs()) for side in (above, below)]
        return unit(means[0] - means[1])
    nearest_below, nearest_above = _nearest(states[above], states[below]), _nearest(states[below], states[above])
    higher = torch.cat([above, above[nearest_above]])
    lower = torch.cat([below[nearest_below], below])
    return unit(_weighted_mean(states[higher] - states[lower], confidence[higher] - confidence[lower]))


class _Trial(NamedTuple):
    """One probe's settings and how it did on held-out groups; `scores` [num_rows] are its held-out log-odds."""

    layer: int
    components: int
    ridge: float
    auc: float
    log_loss: float
    scores: Tensor


Fold = tuple[np.ndarray, np.ndarray]


def _folds(labels: Tensor, groups: Sequence[str], seed: int) -> list[Fold]:
    require_classes(labels, least=2)
    # A group counts for each class that it has rows of: pairs give both classes as many groups as there are pairs.
    per_class = [len({group for group, each in zip(groups, labels.tolist(), strict=True) if each == c}) for c in (0, 1)]
    if min(per_class) < LEAST_GROUPS:
        raise ValueError(
            f"rows with label 0 come from {per_class[0]} groups and those with label 1 from {per_class[1]}; cross-"
            f"validation needs at least {LEAST_GROUPS} each, so label more texts"
        )
    splitter = StratifiedGroupKFold(min(FOLDS, *per_class), shuffle=True, random_state=seed)
    folds = list(splitter.split(np.zeros(len(labels)), labels.numpy(), np.asarray(groups)))
    for fitted, _held in folds:
        require_classes(labels[torch.from_numpy(fitted)])
    return folds


def _trials(
    layer: int, states: Tensor, labels: Tensor, unlabelled: Tensor, folds: Sequence[Fold], seed: int
) -> list[_Trial]:
    """Every number of coordinates and ridge strength on one layer."""
    require_finite(states, f"expert layer {layer}")
    require_finite(unlabelled, f"expert layer {layer}, unlabelled")
    # Coordinates are sorted by variance and independent of each other's number, so one decomposition serves all.
    inputs = whitened(unlabelled, max(COMPONENTS), seed).of(states)
    trials = []
    for components in sorted({min(number, inputs.shape[1]) for number in COMPONENTS}):
        for ridge in RIDGES:
            scores = torch.zeros(len(labels), dtype=torch.float64)
            for fitted, held in folds:
                weight, bias = logistic_weights(inputs[fitted, :components], labels[fitted], ridge)
                scores[held] = inputs[held, :components] @ weight + bias
            area, loss = area_under_curve(scores, labels), log_loss(scores, labels)
            trials.append(_Trial(layer, components, ridge, area, loss, scores))
    return trials


def _simplest(trials: Sequence[_Trial], labels: Tensor) -> list[_Trial]:
    """Of the probes that are as good as the best one: the fewest coordinates, one probe per layer."""
    area = area_interval(max(trials, key=lambda trial: trial.auc).scores, labels)
    least = area.value - max(AREA_TOLERANCE, (area.value - area.low) / Z_95)
    equals = [trial for trial in trials if trial.auc >= least]
    fewest = min(trial.components for trial in equals)
    by_layer: dict[int, _Trial] = {}
    for trial in sorted(equals, key=lambda trial: trial.log_loss):
        if trial.components == fewest:
            by_layer.setdefault(trial.layer, trial)
    return list(by_layer.values())


def _log_odds(
    trial: _Trial, states: Tensor, labels: Tensor, unlabelled_states: Mapping[int, Tensor], seed: int
) -> Tensor:
    """Log-odds [num_unlabelled] by the probe fitted on all rows, scaled to the held-out ones' worth (Platt)."""
    unlabelled = unlabelled_states[trial.layer]
    coordinates = whitened(unlabelled, trial.components, seed)
    weight, bias = logistic_weights(coordinates.of(states), labels, trial.ridge)
    spread = trial.scores.std().clamp_min(torch.finfo(torch.float64).tiny)
    slope, offset = logistic_weights((trial.scores / spread)[:, None], labels, _SCALE_RIDGE)
    return (coordinates.of(unlabelled) @ weight + bias) * float(slope / spread) + offset


def _most_agreed(log_odds: Sequence[Tensor]) -> int:
    """Index of the row that correlates most with the others, the first of equals."""
    correlations = torch.nan_to_num(torch.corrcoef(torch.stack([*log_odds])).reshape(len(log_odds), -1))
    return int(correlations.sum(dim=1).argmax())


def _nearest(states: Tensor, others: Tensor) -> Tensor:
    """Index of the nearest of `others` for each of `states`, found in chunks: no [num, num] matrix."""
    return torch.from_numpy(pairwise_distances_argmin(states.numpy(), others.numpy()))


def _weighted_mean(rows: Tensor, weights: Tensor) -> Tensor:
    return weights @ rows / weights.sum()
