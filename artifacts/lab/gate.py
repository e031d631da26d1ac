"""Tell whether a trained pair is worth shipping: steering must work, and not because any push would do.

Training such small models does not always end in a steerable one, and more training can make it worse. Random
directions alone lift the accuracy of greedy answers, so "steered against unsteered" says little without them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Final, NamedTuple

import torch
from torch import Tensor

from artifacts.aligner.axes import principal_axes
from artifacts.aligner.ridge import fit_ridge
from artifacts.lab.conversation import assistant, render, user
from artifacts.lab.corpus import NUM_QUESTION_FORMS, Fact, Split, facts, framed_question
from artifacts.lab.dataset import mapping_texts, neutral_texts
from artifacts.lab.model import LabModel, Steering
from artifacts.vectors.difference import unit

HIGHEST_OFF: Final = 0.25
LOWEST_ON: Final = 0.60
HIGHEST_RANDOM: Final = 0.40
RANDOM_DIRECTIONS: Final = 32
STRENGTHS: Final = (0.2, 0.35, 0.5, 0.75, 1.0)  # in units of the layer's median residual norm
HIGHEST_PERPLEXITY_RATIO: Final = 1.25

_RANDOM_SEED: Final = 3
_DIRECTION_SET: Final = 2  # the aligner's texts hold the prompts of set 1 only
_REGULARISATION: Final = 1e-2


class GateError(ValueError):
    """The pair failed. The message holds every figure and the bound it missed."""


class Candidate(NamedTuple):
    """A unit direction [hidden_size] of the target's block `layer`."""

    source: str
    layer: int
    direction: Tensor


class Choice(NamedTuple):
    """A candidate with the strength and accuracy that validation gave it."""

    candidate: Candidate
    strength: float
    accuracy: float


@dataclass(frozen=True)
class GateFigures:
    """Greedy exact accuracy on the 204 test facts, and which steering was chosen on the validation facts.

    `off` is without steering, `on` with the chosen vector, `random_*` with directions of the same norm at the same
    layer. `own` and `expert` are the best vector of either source, None if none was within the perplexity bound.
    """

    off: float
    on: float
    random_mean: float
    random_max: float
    own: float | None
    expert: float | None
    source: str
    layer: int
    strength: float

    def __str__(self) -> str:
        expert = "none" if self.expert is None else f"{self.expert:.3f}"
        own = "none" if self.own is None else f"{self.own:.3f}"
        return (
            f"off {self.off:.3f} (at most {HIGHEST_OFF}), on {self.on:.3f} (at least {LOWEST_ON}), "
            f"mean of {RANDOM_DIRECTIONS} random directions {self.random_mean:.3f} (at most {HIGHEST_RANDOM}, "
            f"largest {self.random_max:.3f}); chosen: {self.source} at layer {self.layer}, strength {self.strength}; "
            f"target's own vector {own}, the expert's {expert}"
        )

    @property
    def passed(self) -> bool:
        return self.off <= HIGHEST_OFF and self.on >= LOWEST_ON and self.random_mean <= HIGHEST_RANDOM


def check_pair(target: LabModel, expert: LabModel | None) -> GateFigures:
    """Measure and judge a pair; a target alone is judged by its own vector. GateError with the figures if it fails."""
    figures = measure_pair(target, expert)
    if not figures.passed:
        raise GateError(f"the trained pair is not steerable: {figures}; train again with another seed or step count")
    return figures


def measure_pair(target: LabModel, expert: LabModel | None) -> GateFigures:
    """Choose layer, source and strength on the validation facts; count right answers on the test facts."""
    norms = target.median_norms([_answered(fact) for fact in facts(Split.TUNE)])
    sources = {"own": list(_own_candidates(target))}
    if expert is not None:
        sources["expert"] = list(_expert_candidates(target, expert))
    choices = {source: _choose(target, candidates, norms) for source, candidates in sources.items()}
    found = [choice for choice in choices.values() if choice is not None]
    if not found:
        raise GateError(f"no vector keeps the perplexity of neutral text under x{HIGHEST_PERPLEXITY_RATIO}")
    best = max(found, key=lambda choice: choice.accuracy)
    tested = {
        source: target.accuracy(facts(Split.TEST), _steering(choice.candidate, choice.strength, norms))
        for source, choice in choices.items()
        if choice is not None
    }
    random = _random_accuracies(target, best.candidate.layer, best.strength * norms[best.candidate.layer])
    return GateFigures(
        off=target.accuracy(facts(Split.TEST)),
        on=tested[best.candidate.source],
        random_mean=fmean(random),
        random_max=max(random),
        own=tested.get("own"),
        expert=tested.get("expert"),
        source=best.candidate.source,
        layer=best.candidate.layer,
        strength=best.strength,
    )


def own_direction(model: LabModel) -> Tensor:
    """Difference of means of the model's own states between the two speakers: [num_layers, hidden_size] fp32."""
    reliable, sloppy = (model.last_states(_framed(reliable)) for reliable in (True, False))
    return reliable.mean(dim=0) - sloppy.mean(dim=0)


def _own_candidates(target: LabModel) -> Iterator[Candidate]:
    for layer, difference in enumerate(own_direction(target)):
        yield Candidate("own", layer, unit(difference))


def _expert_candidates(target: LabModel, expert: LabModel) -> Iterator[Candidate]:
    """The expert's difference of means, mapped by ridge regression fitted on other texts than the direction's."""
    differences = own_direction(expert)
    texts = mapping_texts()
    expert_states, target_states = expert.last_states(texts), target.last_states(texts)
    for expert_layer, difference in enumerate(differences):
        axes = principal_axes(expert_states[:, expert_layer], max_rank=expert_states.shape[-1])
        for layer in range(target_states.shape[1]):
            aligner = fit_ridge(axes, target_states[:, layer], _REGULARISATION)
            yield Candidate("expert", layer, unit(aligner.direction(difference)))


def _choose(target: LabModel, candidates: list[Candidate], norms: Tensor) -> Choice | None:
    """The candidate and strength with the best validation accuracy among those that leave neutral text alone."""
    texts = neutral_texts(Split.TUNE)
    limit = target.cross_entropy(texts) + math.log(HIGHEST_PERPLEXITY_RATIO)
    best: Choice | None = None
    for candidate in candidates:
        for strength in STRENGTHS:
            steering = _steering(candidate, strength, norms)
            accuracy = target.accuracy(facts(Split.TUNE), steering)
            is_better = best is None or accuracy > best.accuracy
            if is_better and target.cross_entropy(texts, steering) <= limit:
                best = Choice(candidate, strength, accuracy)
    return best


def _random_accuracies(target: LabModel, layer: int, norm: Tensor) -> list[float]:
    generator = torch.Generator().manual_seed(_RANDOM_SEED)
    directions = torch.randn(RANDOM_DIRECTIONS, target.model.config.hidden_size, generator=generator)
    return [target.accuracy(facts(Split.TEST), Steering(layer, norm * unit(direction))) for direction in directions]


def _steering(candidate: Candidate, strength: float, norms: Tensor) -> Steering:
    return Steering(candidate.layer, strength * norms[candidate.layer] * candidate.direction)


def _framed(reliable: bool) -> list[str]:
    return [
        render(framed_question(fact, form, _DIRECTION_SET, reliable=reliable), generation_prompt=True)
        for fact in facts(Split.FIT)
        for form in range(NUM_QUESTION_FORMS)
    ]


def _answered(fact: Fact) -> str:
    return render([user(fact.question()), assistant(fact.answer())])
