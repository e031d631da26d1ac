"""Held-out pairing: layer pairs ranked by what steering through them gains on the tuning split.

Neither mutual information nor CKA predicts where steering works, so a pair is scored by trying it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Objective = Literal["exact", "likelihood"]


class Trial(NamedTuple):
    """One strength tried on the tuning split.

    Attributes:
        strength: in units of the layer's median norm.
        accuracy: share of questions answered exactly.
        perplexity_ratio: of neutral text, steered over unsteered.
        log_likelihood: mean log-likelihood per token of the right answers, in nats.
        retention: accuracy on questions that steering should leave alone, steered over unsteered.
    """

    strength: float
    accuracy: float
    perplexity_ratio: float
    log_likelihood: float = 0.0
    retention: float = 1.0

    def score(self, objective: Objective) -> float:
        """What is maximised."""
        return self.accuracy if objective == "exact" else self.log_likelihood


@dataclass(frozen=True)
class PairScore:
    """What one (expert layer, target layer) pair gained.

    Attributes:
        expert, target: layer indices.
        gain: best objective within the budget minus the unsteered one; None when no strength kept within the budget.
        best: the trial of that objective.
        trials: everything that was measured.
    """

    expert: int
    target: int
    gain: float | None
    best: Trial | None
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class Budget:
    """What steering may cost: perplexity ratio of neutral text, and share of the retention accuracy."""

    perplexity: float
    retention: float = 1.0

    def keeps(self, trial: Trial) -> bool:
        """Whether a trial is within the budget."""
        return trial.perplexity_ratio <= self.perplexity and trial.retention >= 1 - self.retention


def safe_trials(trials: Sequence[Trial], budget: Budget) -> tuple[Trial, ...]:
    """Trials from the smallest strength up to the first that breaks the budget.

    A larger strength that happens to fall back within the budget is left out: everything up to a maximum strength has
    to be safe, because a request may ask for any of it.
    """
    safe = []
    for trial in sorted(trials):
        if not budget.keeps(trial):
            break
        safe.append(trial)
    return tuple(safe)


def best_trial(trials: Sequence[Trial], objective: Objective = "exact") -> Trial | None:
    """Highest objective; among equals the lowest perplexity, then the lowest strength."""
    return min(
        trials, key=lambda trial: (-trial.score(objective), trial.perplexity_ratio, trial.strength), default=None
    )


def score_pair(
    expert: int,
    target: int,
    trials: Sequence[Trial],
    unsteered: Trial,
    budget: Budget,
    objective: Objective = "exact",
) -> PairScore:
    """Score one pair by its trials."""
    best = best_trial(safe_trials(trials, budget), objective)
    gain = None if best is None else best.score(objective) - unsteered.score(objective)
    return PairScore(expert, target, gain, best, tuple(sorted(trials)))


def rank_pairs(scores: Sequence[PairScore]) -> list[PairScore]:
    """Usable pairs, best gain first; among equals the lower perplexity, then the lower layers."""
    usable = [(score, score.gain, score.best) for score in scores if score.gain is not None and score.best is not None]
    usable.sort(key=lambda item: (-item[1], item[2].perplexity_ratio, item[0].target, item[0].expert))
    return [item[0] for item in usable]
