"""Strength of a condition: chosen on the tuning facts, in the same way for every source of a direction."""

from collections.abc import Sequence
from statistics import fmean
from typing import Final

from torch import Tensor

from artifacts.lab.study.effect import SteeredBlock
from artifacts.pairing.held_out import Trial, best_trial

STRENGTHS: Final = (0.2, 0.35, 0.5, 0.75)  # in units of the layer's median residual norm
HIGHEST_PERPLEXITY_RATIO: Final = 1.25


def choose_strength(block: SteeredBlock, directions: Sequence[Tensor], norm: float) -> Trial:
    """The strength with the best mean accuracy among those whose mean perplexity keeps within the budget.

    Not steering (strength 0) is always among them. A strength beyond the first that breaks the budget is not tried.

    Args:
        block: with the tuning facts and neutral texts.
        directions: unit, [hidden_size] each; one strength is chosen for all.
        norm: median residual norm of the layer.
    """
    trials = [Trial(0.0, block.accuracy(None), 1.0)]
    for strength in STRENGTHS:
        vectors = [strength * norm * direction for direction in directions]
        perplexity = fmean(block.perplexity_ratio(vector) for vector in vectors)
        if perplexity > HIGHEST_PERPLEXITY_RATIO:
            break
        trials.append(Trial(strength, fmean(block.accuracy(vector) for vector in vectors), perplexity))
    best = best_trial(trials)
    assert best is not None  # strength 0 is there
    return best
