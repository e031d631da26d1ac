"""Layers of the study: fixed once per target and expert, on the tuning facts and with every label."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor

from artifacts.lab.conversation import assistant, render, user
from artifacts.lab.corpus import Split, facts
from artifacts.lab.dataset import neutral_texts
from artifacts.lab.model import LabModel
from artifacts.lab.study.effect import SteeredBlock
from artifacts.lab.study.estimator import Estimator
from artifacts.lab.study.reading import Reading
from artifacts.lab.study.regime import REGIMES
from artifacts.lab.study.source import Labeller, Mapper, Source, Sources, all_labels
from artifacts.lab.study.strength import choose_strength
from artifacts.pairing.held_out import Trial
from artifacts.vectors.difference import difference_of_means
from artifacts.vectors.labeller import labelled_direction

Candidate = TypeVar("Candidate", Mapper, Labeller)
Labellers = dict[Source, list[Labeller]]

# Half of the neutral tuning texts: enough to see a rise of a quarter, and half the time.
_NEUTRAL_TEXTS = 12


class Bench(NamedTuple):
    """The block that is steered, with what judges it, and its own direction from all labels."""

    layer: int
    norm: float
    tune: SteeredBlock
    test: SteeredBlock
    full: Tensor


def target_bench(target: LabModel, reading: Reading) -> Bench:
    """The block where the target's own direction from all labels steers best."""
    norms = target.median_norms(
        [render([user(fact.question()), assistant(fact.answer())]) for fact in facts(Split.TUNE)]
    )
    draw, states = all_labels(), reading.labelled[REGIMES[0].wording]
    found: list[tuple[Trial, int, SteeredBlock, Tensor]] = []
    for layer in range(reading.num_layers - 1):  # behind the last block there is nothing left that could react
        block = SteeredBlock(target, layer, facts(Split.TUNE), neutral_texts(Split.TUNE)[:_NEUTRAL_TEXTS])
        direction = difference_of_means(states[draw.rows, layer], draw.labels)
        found.append((choose_strength(block, [direction], float(norms[layer])), layer, block, direction))
    _trial, layer, block, direction = max(found, key=lambda item: item[0].accuracy)
    return Bench(layer, float(norms[layer]), block, SteeredBlock(target, layer, facts(Split.TEST), ()), direction)


def fixed_sources(bench: Bench, target: Reading, models: dict[Source, Reading], labellers: Labellers) -> Sources:
    """Each source at the layer where its direction from all labels steers the bench best.

    Args:
        bench: of the target.
        target: its states.
        models: states of the model behind each mapped source.
        labellers: one per layer of the model behind each labelling source.
    """
    draw, wording = all_labels(), REGIMES[0].wording
    mapping = target.mapping[:, bench.layer]

    def mapped(mapper: Mapper) -> Tensor | None:
        return mapper.direction(Estimator.DIFFERENCE, draw, wording)

    def labelled(labeller: Labeller) -> Tensor | None:
        labelling = labeller.labelling(("all", 0, 0), draw, wording)
        return None if labelling is None else labelled_direction(mapping, labelling.probabilities)

    layers = {
        source: [Mapper(model, layer, mapping) for layer in range(model.num_layers)] for source, model in models.items()
    }
    return Sources(
        target,
        bench.layer,
        {source: _best(bench, mappers, mapped) for source, mappers in layers.items()},
        {source: _best(bench, each, labelled) for source, each in labellers.items()},
    )


def labellers_of(model: Reading) -> list[Labeller]:
    """One labeller per layer of a model."""
    return [Labeller(model, layer, {}) for layer in range(model.num_layers)]


def _best(bench: Bench, candidates: Sequence[Candidate], direction: Callable[[Candidate], Tensor | None]) -> Candidate:
    best, highest = candidates[0], -1.0
    for candidate in candidates if len(candidates) > 1 else ():
        found = direction(candidate)
        accuracy = -1.0 if found is None else choose_strength(bench.tune, [found], bench.norm).accuracy
        if accuracy > highest:
            best, highest = candidate, accuracy
    return best
