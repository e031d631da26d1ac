"""The measurement: what a few labelled examples are worth to each source, for one target and one expert."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from artifacts.lab.study.estimator import Estimator
from artifacts.lab.study.layers import Bench
from artifacts.lab.study.regime import LABEL_COUNTS, REGIMES, Draw, Regime
from artifacts.lab.study.source import Source, Sources, all_labels, estimators, least_labels
from artifacts.lab.study.strength import choose_strength
from artifacts.pairing.held_out import Trial
from artifacts.vectors.difference import unit
from artifacts.vectors.score import area_under_curve

DRAWS: Final = 20
RANDOM_DIRECTIONS: Final = 30
# Draws whose directions choose the strength of a condition, on the tuning facts.
_TUNING_DRAWS: Final = 4
_RANDOM_SEED: Final = 11


@dataclass(frozen=True)
class Condition:
    """One source, estimator, regime and number of labels, over all draws.

    Attributes:
        labels: labelled examples in all, half of each class.
        strength: chosen on the tuning facts, in median norms; `tune_accuracy` and `perplexity_ratio` belong to it.
        accuracies: [num_draws] on the test facts; a draw without a direction counts as not steered.
        cosine: mean with the target's own direction from all labels; None where no draw gave a direction.
        auc: mean area under the curve of the target's states of the contrast texts that the draw does not hold.
        refused: share of draws that the labeller's guard rails would have refused, or that gave no direction.
    """

    regime: str
    labels: int
    source: str
    estimator: str
    strength: float
    tune_accuracy: float
    perplexity_ratio: float
    accuracies: list[float]
    cosine: float | None
    auc: float | None
    refused: float


@dataclass(frozen=True)
class TargetRecord:
    """Everything about one target.

    Attributes:
        target, expert: names.
        layers: steered block, and by source the layer of the other model.
        unsteered: accuracy on the test facts.
        own_all, mapped_all: the same with all 720 labels, from the target itself and the expert mapped.
        random: of random directions, at the strength chosen for them in the same way.
        conditions: see there.
    """

    target: str
    expert: str
    layers: dict[str, int]
    unsteered: float
    own_all: float
    mapped_all: float
    random: list[float]
    conditions: list[Condition]


def measure(
    names: tuple[str, str],
    bench: Bench,
    sources: Sources,
    regimes: tuple[Regime, ...] = REGIMES,
    draws: int = DRAWS,
    random_directions: int = RANDOM_DIRECTIONS,
    progress: bool = True,
) -> TargetRecord:
    """Measure every condition.

    Args:
        names: of target and expert.
        bench: of the target.
        sources: at fixed layers.
        regimes: which to try.
        draws: labelled sets per condition; the same ones for every source.
        random_directions: of the baseline.
        progress: bar on stderr.
    """
    generator = torch.Generator().manual_seed(_RANDOM_SEED)
    random = [unit(each) for each in torch.randn(random_directions, len(bench.full), generator=generator)]
    mapped = sources.mappers[Source.MAPPED].direction(Estimator.DIFFERENCE, all_labels(), REGIMES[0].wording)
    layers = {"target": sources.layer}
    layers |= {str(source): mapper.layer for source, mapper in sources.mappers.items()}
    layers |= {str(source): labeller.layer for source, labeller in sources.labellers.items()}
    cases = _cases(regimes)
    bar = tqdm(cases, desc=f"{names[0]}, {names[1]}", unit="condition", disable=not progress)
    return TargetRecord(
        target=names[0],
        expert=names[1],
        layers=layers,
        unsteered=bench.test.accuracy(None),
        own_all=_tuned_accuracies(bench, [bench.full])[0],
        mapped_all=_tuned_accuracies(bench, [mapped])[0],
        random=_tuned_accuracies(bench, random),
        conditions=[_condition(bench, sources, case, draws) for case in bar],
    )


class _Case(NamedTuple):
    regime: Regime
    labels: int
    source: Source
    estimator: Estimator


def _cases(regimes: Sequence[Regime]) -> list[_Case]:
    """Every condition that a source can try; the machine needs the rows of a labeller to see more than noise."""
    return [
        _Case(regime, labels, source, estimator)
        for regime in regimes
        for labels in regime.counts
        for source in Source
        for estimator in estimators(source)
        if estimator in (Estimator.DIFFERENCE, Estimator.LOGISTIC) or labels >= least_labels()
        if estimator in (Estimator.DIFFERENCE, Estimator.MATCHED) or regime.counts == LABEL_COUNTS
    ]


def _condition(bench: Bench, sources: Sources, case: _Case, draws: int) -> Condition:
    regime, labels, source, estimator = case
    drawn = [regime.draw(labels, seed) for seed in range(draws)]
    found = [
        sources.find(source, estimator, (regime.name, labels, seed), draw, regime.wording)
        for seed, draw in enumerate(drawn)
    ]
    tuned = [each.direction for each in found if each.direction is not None][:_TUNING_DRAWS]
    trial = choose_strength(bench.tune, tuned, bench.norm) if tuned else Trial(0.0, bench.tune.accuracy(None), 1.0)
    pairs = [(each.direction, draw) for each, draw in zip(found, drawn, strict=True) if each.direction is not None]
    states = sources.target.labelled[regime.wording][:, sources.layer]
    return Condition(
        regime=regime.name,
        labels=labels,
        source=str(source),
        estimator=str(estimator),
        strength=trial.strength,
        tune_accuracy=trial.accuracy,
        perplexity_ratio=trial.perplexity_ratio,
        accuracies=_accuracies(bench, [each.direction for each in found], trial.strength),
        cosine=_mean([float(direction @ bench.full) for direction, _draw in pairs]),
        auc=_mean([_unseen_area(direction, draw, states) for direction, draw in pairs]),
        refused=fmean(each.refused for each in found),
    )


def _unseen_area(direction: Tensor, draw: Draw, states: Tensor) -> float:
    unseen = torch.ones(len(states), dtype=torch.bool)
    unseen[draw.rows] = False
    return area_under_curve(states[unseen] @ direction, all_labels().labels[unseen])


def _tuned_accuracies(bench: Bench, directions: Sequence[Tensor]) -> list[float]:
    """Test accuracy of each direction at the one strength that the tuning facts give all of them."""
    return _accuracies(bench, directions, choose_strength(bench.tune, directions, bench.norm).strength)


def _accuracies(bench: Bench, directions: Sequence[Tensor | None], strength: float) -> list[float]:
    if strength == 0:
        return [bench.test.accuracy(None)] * len(directions)
    return [bench.test.accuracy(None if each is None else strength * bench.norm * each) for each in directions]


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
