"""Held-out pairing: layer pairs ranked by what steering through them gains on the tuning split.

Neither mutual information nor CKA predicts where steering works, so a pair is scored by trying it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Trial(NamedTuple):
    """One strength tried on the tuning split.

    Attributes:
        strength: in units of the layer's median norm.
        accuracy: share of questions answered exactly.
        perplexity_ratio: of neutral text, steered over unsteered.
    """

    strength: float
    accuracy: float
    perplexity_ratio: float


@dataclass(frozen=True)
class PairScore:
    """What one (expert layer, target layer) pair gained.

    Attributes:
        expert, target: layer indices.
        gain: best accuracy within the perplexity budget minus the unsteered accuracy; None when no strength kept
            within the budget.
        best: the trial of that accuracy.
        trials: everything that was measured.
    """

    expert: int
    target: int
    gain: float | None
    best: Trial | None
    trials: tuple[Trial, ...]


def safe_trials(trials: Sequence[Trial], perplexity_budget: float) -> tuple[Trial, ...]:
    """Trials from the smallest strength up to the first that breaks the budget.

    A larger strength that happens to fall back under the budget is left out: everything up to a maximum strength has
    to be safe, because a request may ask for any of it.
    """
    safe = []
    for trial in sorted(trials):
        if trial.perplexity_ratio > perplexity_budget:
            break
        safe.append(trial)
    return tuple(safe)


def best_trial(trials: Sequence[Trial]) -> Trial | None:
    """Highest accuracy; among equals the lowest perplexity, then the lowest strength."""
    return min(trials, key=lambda trial: (-trial.accuracy, trial.perplexity_ratio, trial.strength), default=None)


def score_pair(
    expert: int, target: int, trials: Sequence[Trial], unsteered_accuracy: float, perplexity_budget: float
) -> PairScore:
    """Score one pair by its trials."""
    best = best_trial(safe_trials(trials, perplexity_budget))
    gain = None if best is None else best.accuracy - unsteered_accuracy
    return PairScore(expert, target, gain, best, tuple(sorted(trials)))


def rank_pairs(scores: Sequence[PairScore]) -> list[PairScore]:
    """Usable pairs, best gain first; among equals the lower perplexity, then the lower layers."""
    usable = [(score, score.gain, score.best) for score in scores if score.gain is not None and score.best is not None]
    usable.sort(key=lambda item: (-item[1], item[2].perplexity_ratio, item[0].target, item[0].expert))
    return [item[0] for item in usable]
