"""Figures of merit of answers. Pure functions; none of them samples."""

import math
import re
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from scipy.stats import spearmanr

from artifacts.evaluation.subject import Likelihood

# A model that falls apart gives infinite perplexity, which no report can hold.
MAX_LOG_RATIO = 50.0
MIN_TOKEN_LOG_LIKELIHOOD = -1e3
MAX_JUDGE_SCORE = 2


class Correlation(NamedTuple):
    """Spearman's rank correlation with its two-sided p-value."""

    rho: float
    p_value: float


def exact_match(answer: str, expected: str) -> bool:
    """Whether an answer is the expected text, white space around both apart."""
    return answer.strip() == expected.strip()


def pattern_match(answer: str, pattern: str) -> bool:
    """Whether an answer contains a match of a regular expression."""
    return re.search(pattern, answer) is not None


def per_token(likelihood: Likelihood) -> float:
    """Length-normalised log-likelihood in nats per token; finite even where the model falls apart."""
    if not math.isfinite(likelihood.total):
        return MIN_TOKEN_LOG_LIKELIHOOD
    return max(likelihood.total / likelihood.num_tokens, MIN_TOKEN_LOG_LIKELIHOOD)


def likeliest(choices: Sequence[Likelihood]) -> int:
    """Index of the choice with the highest length-normalised log-likelihood, the first of equals."""
    return max(range(len(choices)), key=lambda index: per_token(choices[index]))


def perplexity_ratio(steered: Sequence[Likelihood], unsteered: Sequence[Likelihood]) -> float:
    """Perplexity of the same texts, steered over unsteered: exp of the difference of mean negative log-likelihoods.

    Raises:
        ValueError: the texts have different numbers of tokens, so they are not the same.
    """
    if [each.num_tokens for each in steered] != [each.num_tokens for each in unsteered]:
        raise ValueError("steered and unsteered texts differ in their tokens; measure the same texts with both")
    tokens = sum(each.num_tokens for each in steered)
    loss = sum((per_token(off) - per_token(on)) * on.num_tokens for on, off in zip(steered, unsteered, strict=True))
    return math.exp(min(loss / tokens, MAX_LOG_RATIO))


def retention(steered: Sequence[bool], unsteered: Sequence[bool]) -> float | None:
    """Accuracy on unrelated questions, steered over unsteered; None when the unsteered model answers none of them."""
    return fmean(steered) / fmean(unsteered) if any(unsteered) else None


def clas(behaviour: float, quality: float) -> float:
    """CLaS-Bench: harmonic mean 2ab / (a + b) of success at the behaviour and quality of the answer, both in [0, 1].

    Raises:
        ValueError: one of them is outside.
    """
    for value in (behaviour, quality):
        if not 0 <= value <= 1:
            raise ValueError(f"{value} is outside [0, 1]; give shares")
    return 2 * behaviour * quality / (behaviour + quality) if behaviour + quality else 0.0


def axbench(concept: float, instruction: float, fluency: float) -> float:
    """AxBench: harmonic mean of a judge's three scores in [0, 2]; 0 if any is 0.

    Raises:
        ValueError: a score is outside.
    """
    scores = (concept, instruction, fluency)
    for score in scores:
        if not 0 <= score <= MAX_JUDGE_SCORE:
            raise ValueError(f"score {score} is outside [0, {MAX_JUDGE_SCORE}]")
    return 0.0 if 0 in scores else len(scores) / sum(1 / score for score in scores)


def gap_closed(steered: float, unsteered: float, ceiling: float) -> float | None:
    """Share of the gap to a ceiling that steering closes; None when the ceiling is not above the unsteered model."""
    return (steered - unsteered) / (ceiling - unsteered) if ceiling > unsteered else None


def dose_response(strengths: Sequence[float], accuracies: Sequence[float]) -> Correlation | None:
    """Spearman's correlation of strength and accuracy; None for fewer than three strengths or one accuracy only."""
    if len(strengths) < 3 or len(set(accuracies)) < 2 or len(set(strengths)) < 2:
        return None
    rho, p_value = spearmanr(strengths, accuracies)
    return Correlation(float(rho), float(p_value))
