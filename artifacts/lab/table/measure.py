"""Measure every row of the lab's table for one target."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from artifacts.aligner.affine import AffineMap
from artifacts.aligner.autoencoder import fit_autoencoder
from artifacts.aligner.axes import principal_axes
from artifacts.lab.choice import Bench, Candidate, Choice
from artifacts.lab.corpus import CLERK_PROMPTS, Split, facts
from artifacts.lab.directions import Reading, encoded_candidates, mapped_candidates, own_candidates
from artifacts.lab.model import LabModel
from artifacts.lab.recipe import Recipe
from artifacts.lab.table.row import Kind, Row, answer_matrix, judged_row

_RANDOM_SEED: Final = 3
_UNTRAINED_SEED: Final = 11


@dataclass(frozen=True)
class Draws:
    """How often a row that has chance in it is drawn: initialisations of experts and encoders, random directions."""

    untrained: int = 5
    encoders: int = 15
    random: int = 30


QUICK: Final = Draws(untrained=2, encoders=2, random=4)


@dataclass(frozen=True)
class Expert:
    """What the rows of one expert need, whatever the target.

    Attributes:
        reading: states of the trained expert.
        untrained: states of fresh initialisations of the same shape with the same tokenizer.
        encoders: per initialisation one encoder per expert layer, fitted to reconstruct the expert's mapping states.
    """

    reading: Reading
    untrained: tuple[Reading, ...]
    encoders: tuple[tuple[AffineMap, ...], ...]


def prepare_expert(
    expert: LabModel,
    recipe: Recipe,
    draws: Draws,
    width: int,
) -> Expert:
    """Read an expert, its untrained controls and its encoders.

    Args:
        expert: the trained model.
        recipe: that it was trained with, for the shape of untrained ones.
        draws: how many of each.
        width: of the targets, to which the encoders map.
    """
    reading = Reading.of(expert)
    axes = [principal_axes(states, max_rank=states.shape[1]) for states in reading.mapping.unbind(1)]
    return Expert(
        reading,
        tuple(Reading.of(_untrained(expert, recipe, draw)) for draw in range(draws.untrained)),
        tuple(
            tuple(fit_autoencoder(each, torch.zeros(width), draw).encoder for each in axes)
            for draw in range(draws.encoders)
        ),
    )


def measure_target(name: str, target: LabModel, experts: Mapping[str, Expert], draws: Draws) -> Iterator[Row]:
    """Every row of one target; those of all experts before the random ones of its own."""
    rows = _Rows(name, target)
    test = facts(Split.TEST)
    yield Row(Kind.OFF, name, None, answer_matrix([rows.unsteered]))
    yield Row(Kind.PROMPT, name, None, answer_matrix([target.answers_truly(test, system_prompt=CLERK_PROMPTS[0])]))
    yield rows.row(Kind.OWN, None, [own_candidates(rows.reading.difference)])
    for expert_name, expert in experts.items():
        yield from _expert_rows(rows, expert_name, expert, draws)
    num_pairs = max(expert.reading.num_layers for expert in experts.values())
    yield rows.row(Kind.RANDOM_CHOSEN, None, _random_sets(rows.bench, draws.random, num_pairs))


class _Rows:
    """A target with its bench; makes rows."""

    def __init__(self, name: str, target: LabModel) -> None:
        self.name = name
        self.bench = Bench(target)
        self.reading = Reading.of(target)
        self.unsteered = target.answers_truly(facts(Split.TEST))

    def row(self, kind: Kind, expert: str | None, draws: Sequence[Sequence[Candidate]]) -> Row:
        """Choose for every draw among its candidates on the tune facts, and answer the test facts."""
        return self.judged(kind, expert, [self.bench.choose(candidates) for candidates in draws])

    def judged(self, kind: Kind, expert: str | None, choices: Sequence[Choice | None]) -> Row:
        """Answer the test facts under each choice."""
        return judged_row(self.bench, kind, self.name, expert, choices, self.unsteered)


def _expert_rows(rows: _Rows, name: str, expert: Expert, draws: Draws) -> Iterator[Row]:
    for same_texts, trained, untrained in (
        (True, Kind.EXPERT_A, Kind.UNTRAINED_A),
        (False, Kind.EXPERT_B, Kind.UNTRAINED_B),
    ):
        steered = rows.row(trained, name, [mapped_candidates(expert.reading, rows.reading, same_texts=same_texts)])
        yield steered
        controls = [mapped_candidates(each, rows.reading, same_texts=same_texts) for each in expert.untrained]
        yield rows.row(untrained, name, controls)
    # `steered` is (B) now, the row that credits the expert: chance is given its layer and norm.
    encoded = [encoded_candidates(encoders, expert.reading, rows.reading) for encoders in expert.encoders]
    yield rows.row(Kind.AUTOENCODER, name, encoded)
    yield rows.judged(Kind.RANDOM, name, _random_choices(rows.bench, steered.choices[0], draws.random))


def _random_choices(bench: Bench, like: Choice | None, count: int) -> list[Choice | None]:
    if like is None:
        return [None] * count
    layer = like.candidate.layer
    return [like._replace(candidate=Candidate(layer, each)) for each in bench.random_directions(count, _RANDOM_SEED)]


def _random_sets(bench: Bench, count: int, per_layer: int) -> list[list[Candidate]]:
    """`count` times as many candidates as an expert of `per_layer` layers offers."""
    directions = iter(bench.random_directions(count * per_layer * bench.num_layers, _RANDOM_SEED + 1))
    return [
        [Candidate(layer, next(directions)) for _ in range(per_layer) for layer in range(bench.num_layers)]
        for _ in range(count)
    ]


def _untrained(expert: LabModel, recipe: Recipe, draw: int) -> LabModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_UNTRAINED_SEED + draw)
        return LabModel(recipe.untrained_model(len(expert.tokenizer)).eval(), expert.tokenizer)
