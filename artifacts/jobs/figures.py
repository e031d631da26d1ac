"""The figures of a build as the manifest keeps them: plain JSON, six digits."""

from typing import Any

from pydantic import JsonValue

from artifacts.jobs.align import AlignScore, align_scores
from artifacts.jobs.build import Build
from artifacts.jobs.evaluate import Evaluation, load_evaluation
from artifacts.jobs.pair import pair_scores
from artifacts.jobs.tune import Tuned
from artifacts.jobs.vectors import RFM_BACK_MAPS, load_directions
from artifacts.pairing.held_out import PairScore, Trial

# More digits are noise and would hide that two builds agree.
DIGITS = 6


def evaluation_figures(build: Build, tuned: Tuned) -> dict[str, JsonValue]:
    """The manifest's `evaluation`: test split with controls, tuning split, every layer pair, separation by vector."""
    evaluation, directions = load_evaluation(build), load_directions(build)
    scores = {(each.expert, each.target): each for each in pair_scores(build)}
    pairs = [
        {
            "expert": each.expert,
            "target": each.target,
            "accepted": each.accepted,
            **pair_figures(each, scores.get((each.expert, each.target))),
        }
        for each in align_scores(build)
    ]
    figures: dict[str, Any] = {
        "test": _test_figures(evaluation),
        "tune": {
            "off": tuned.unsteered_accuracy,
            "recommended": tuned.recommended._asdict(),
            "trials": [trial._asdict() for trial in tuned.trials],
            "candidates": {each.key: each.best._asdict() for each in tuned.candidates},
        },
        "pairs": pairs,
        "held_out_auc": directions.auc,
        "refused": directions.refused,
        "vectors": [each.key for each in tuned.chosen],
        "rfm_back_map": back_map(tuned),
        "aligner_and_direction_disjoint": evaluation.overlap.mapping_and_contrast == 0,
        "splits_disjoint": evaluation.overlap.splits_disjoint,
    }
    rounded: dict[str, JsonValue] = _rounded(figures)
    return rounded


def pair_figures(aligned: AlignScore, score: PairScore | None) -> dict[str, float]:
    """Scores of one layer pair; those of the tuning split are missing where the pair was not usable."""
    figures = {"r2": aligned.r2, "r2_permuted_95": aligned.permuted_95}
    if score is not None and score.gain is not None and score.best is not None:
        figures["held_out"] = score.gain
        figures["held_out_strength"] = score.best.strength
        figures["held_out_perplexity_ratio"] = score.best.perplexity_ratio
    return {name: round(value, DIGITS) for name, value in figures.items()}


def back_map(tuned: Tuned) -> str:
    """The better way back from the RFM's whitened space, by the tuning split."""
    for candidate in tuned.candidates:
        for name in RFM_BACK_MAPS:
            if candidate.kind == f"rfm-{name}":
                return name
    # Nothing of the RFM competed: the way that the states themselves move.
    return "displacement"


def _test_figures(evaluation: Evaluation) -> dict[str, Any]:
    def optional(trial: Trial | None) -> dict[str, float] | None:
        return None if trial is None else trial._asdict()

    return {
        "questions": evaluation.num_questions,
        "off": evaluation.off,
        "on": evaluation.on._asdict(),
        "negated": evaluation.negated._asdict(),
        "random": {
            "count": evaluation.random.count,
            "mean": evaluation.random.mean,
            "maximum": evaluation.random.maximum,
        },
        "own_difference_of_means": optional(evaluation.own),
        "untrained_expert": optional(evaluation.untrained),
    }


def _rounded(value: Any) -> Any:
    """The same JSON value with every float at `DIGITS` digits."""
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return value
