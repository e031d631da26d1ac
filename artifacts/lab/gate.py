"""Tell whether a trained pair is worth shipping: steering must work, and not because any push would do.

Training such small models does not always end in a steerable one, and more training can make it worse. Random
directions alone lift the accuracy of greedy answers, so "steered against unsteered" says little without them.
"""

from dataclasses import dataclass
from statistics import fmean
from typing import Final

from artifacts.lab.choice import HIGHEST_PERPLEXITY_RATIO, STRENGTHS, Bench, Candidate, Choice
from artifacts.lab.corpus import Split, facts
from artifacts.lab.directions import Reading, mapped_candidates, own_candidates
from artifacts.lab.model import LabModel

HIGHEST_OFF: Final = 0.25
LOWEST_ON: Final = 0.60
HIGHEST_RANDOM: Final = 0.40
RANDOM_DIRECTIONS: Final = 32

_RANDOM_SEED: Final = 3


class GateError(ValueError):
    """The pair failed. The message holds every figure and the bound it missed."""


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
    bench = Bench(target, STRENGTHS)
    choices = {source: bench.choose(candidates) for source, candidates in _sources(target, expert).items()}
    found = {source: choice for source, choice in choices.items() if choice is not None}
    if not found:
        raise GateError(f"no vector keeps the perplexity of neutral text under x{HIGHEST_PERPLEXITY_RATIO}")
    source = max(found, key=lambda source: found[source].accuracy)
    tested = {source: bench.accuracy(choice) for source, choice in found.items()}
    random = _random_accuracies(bench, found[source])
    return GateFigures(
        off=target.accuracy(facts(Split.TEST)),
        on=tested[source],
        random_mean=fmean(random),
        random_max=max(random),
        own=tested.get("own"),
        expert=tested.get("expert"),
        source=source,
        layer=found[source].candidate.layer,
        strength=found[source].strength,
    )


def _sources(target: LabModel, expert: LabModel | None) -> dict[str, list[Candidate]]:
    reading = Reading.of(target)
    sources = {"own": own_candidates(reading.difference)}
    if expert is not None:
        sources["expert"] = mapped_candidates(Reading.of(expert), reading, same_texts=False)
    return sources


def _random_accuracies(bench: Bench, choice: Choice) -> list[float]:
    directions = bench.random_directions(RANDOM_DIRECTIONS, _RANDOM_SEED)
    candidates = [Candidate(choice.candidate.layer, direction) for direction in directions]
    return [bench.accuracy(Choice(candidate, choice.strength, choice.accuracy)) for candidate in candidates]
