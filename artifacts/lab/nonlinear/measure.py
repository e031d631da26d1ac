"""Steer a target of the second world with what every estimator found, layer by layer and with the layer chosen."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import Final

from torch import Tensor

from artifacts.lab.choice import STRENGTHS, Bench, Candidate
from artifacts.lab.corpus import Split, facts
from artifacts.lab.model import LabModel
from artifacts.lab.nonlinear.contrast import draw_contrast
from artifacts.lab.nonlinear.layer import Directions, Readability, read_layer
from artifacts.lab.table.row import Row, answer_matrix, judged_row
from artifacts.lab.two_sided import draw_speaker

_QUADRUPLES: Final = 360
_HELD_QUADRUPLES: Final = 120
_SEED: Final = 5
_RANDOM_SEED: Final = 3


class Way(StrEnum):
    """What a row steers with, in the order of the table. Both signs of every direction are tried."""

    OFF = "no steering"
    PROMPT = "system prompt that speaks for it (ceiling)"
    AXIS = "axis between both extremes (told the side)"
    DIFFERENCE = "difference of means"
    LOGISTIC = "logistic regression"
    RFM = "RFM, displacement"
    RFM_COVECTOR = "RFM, covector"
    RANDOM = "random directions, chosen alike"


@dataclass(frozen=True)
class LayerRecord:
    """One layer of one target: readability, and test accuracy when steering is confined to this layer.

    Attributes:
        accuracy: by way; the unsteered one where nothing kept within the perplexity budget.
    """

    target: str
    layer: int
    readability: Readability
    accuracy: dict[Way, float]


@dataclass(frozen=True)
class Measured:
    """Rows with the layer chosen on the tune facts, and every layer by itself."""

    rows: list[Row]
    layers: list[LayerRecord]


_FITTED: Final = {
    Way.AXIS: "axis",
    Way.DIFFERENCE: "difference",
    Way.LOGISTIC: "logistic",
    Way.RFM: "rfm",
    Way.RFM_COVECTOR: "rfm_covector",
}


def measure_target(name: str, target: LabModel, num_random: int, strengths: Sequence[float] = STRENGTHS) -> Measured:
    """Every row and every layer of one target, `num_random` draws of the random row; `strengths` as of a bench."""
    bench = Bench(target, strengths)
    unsteered = target.answers_truly(facts(Split.TEST))
    prompt = draw_speaker(Random(_SEED), 4).prompt
    prompted = target.answers_truly(facts(Split.TEST), system_prompt=prompt)
    found = _read(target)
    rows = [
        Row(Way.OFF, name, None, answer_matrix([unsteered])),
        Row(Way.PROMPT, name, None, answer_matrix([prompted])),
    ]
    for way, candidates in _candidates([directions for directions, _readability in found]).items():
        rows.append(judged_row(bench, way, name, None, [bench.choose(candidates)], unsteered))
    chance = [bench.choose(candidates) for candidates in _random(bench, num_random)]
    rows.append(judged_row(bench, Way.RANDOM, name, None, chance, unsteered))
    layers = [
        LayerRecord(name, layer, readability, _by_way(bench, layer, directions, unsteered))
        for layer, (directions, readability) in enumerate(found)
    ]
    return Measured(rows, layers)


def _read(target: LabModel) -> list[tuple[Directions, Readability]]:
    random = Random(_SEED)
    contrast = draw_contrast(random, _QUADRUPLES)
    held = draw_contrast(random, _HELD_QUADRUPLES, frozenset(contrast.texts))
    states, held_states = target.last_states(contrast.texts), target.last_states(held.texts)
    return [
        read_layer(states[:, layer], contrast, held_states[:, layer], held, _SEED) for layer in range(states.shape[1])
    ]


def _candidates(directions: Sequence[Directions]) -> dict[Way, list[Candidate]]:
    return {
        way: [each for layer, found in enumerate(directions) for each in _both_signs(layer, getattr(found, name))]
        for way, name in _FITTED.items()
    }


def _by_way(bench: Bench, layer: int, directions: Directions, unsteered: Tensor) -> dict[Way, float]:
    accuracy = {}
    for way, name in _FITTED.items():
        choice = bench.choose(_both_signs(layer, getattr(directions, name)))
        accuracy[way] = unsteered.double().mean().item() if choice is None else bench.accuracy(choice)
    return accuracy


def _random(bench: Bench, count: int) -> Iterator[list[Candidate]]:
    directions = iter(bench.random_directions(count * bench.num_layers, _RANDOM_SEED))
    for _ in range(count):
        yield [each for layer in range(bench.num_layers) for each in _both_signs(layer, next(directions))]


def _both_signs(layer: int, direction: Tensor) -> list[Candidate]:
    return [Candidate(layer, direction), Candidate(layer, -direction)]
