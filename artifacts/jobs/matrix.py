"""Figures of every layer pair of a build, as plain JSON."""

from typing import Any

from artifacts.jobs.align import AlignScore, align_scores
from artifacts.jobs.build import Build
from artifacts.jobs.pair import information_of, load_information, pair_scores
from artifacts.pairing.held_out import PairScore
from artifacts.pairing.select import LayerPair

# More digits are noise and would hide that two builds agree.
DIGITS = 6


def layer_matrix(build: Build) -> list[dict[str, Any]]:
    """One entry per pair of captured layers: what aligned, what it shares, what it gained where it was tried."""
    scores = {(each.expert, each.target): each for each in pair_scores(build)}
    information = load_information(build)
    return [
        {
            "expert": each.expert,
            "target": each.target,
            "accepted": each.accepted,
            **_figures(
                each,
                scores.get((each.expert, each.target)),
                information_of(build, information, LayerPair(each.expert, each.target)),
            ),
        }
        for each in align_scores(build)
    ]


def _figures(aligned: AlignScore, score: PairScore | None, information: dict[str, float]) -> dict[str, float]:
    """Scores of one layer pair; those of the tuning split are missing where the pair was not tried or not usable."""
    figures = {**aligned.figures, **information}
    if score is not None and score.gain is not None and score.best is not None:
        figures["held_out"] = score.gain
        figures["held_out_strength"] = score.best.strength
        figures["held_out_perplexity_ratio"] = score.best.perplexity_ratio
    plain: dict[str, float] = rounded(figures)
    return plain


def rounded(value: Any) -> Any:
    """The same JSON value with every float at `DIGITS` significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return value
