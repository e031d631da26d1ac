"""Choosing a steering vector for a lab target: every source of vectors goes through the same search.

Layer and strength are chosen by greedy accuracy on the tune facts within a perplexity budget, so that a source that
offers more candidates, or one that is mere chance, gains from the search whatever there is to gain.
"""

from collections.abc import Sequence
from functools import cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from artifacts.lab.conversation import assistant, render, user
from artifacts.lab.corpus import Split, facts
from artifacts.lab.dataset import neutral_texts
from artifacts.lab.model import LabModel
from artifacts.lab.study.effect import SteeredBlock
from artifacts.vectors.difference import unit

STRENGTHS: Final = (0.2, 0.35, 0.5, 0.75, 1.0)  # in units of the layer's median residual norm
HIGHEST_PERPLEXITY_RATIO: Final = 1.25


class Candidate(NamedTuple):
    """A unit direction [hidden_size] of the target's block `layer`, and the expert layer it comes from if any."""

    layer: int
    direction: Tensor
    expert_layer: int | None = None


class Choice(NamedTuple):
    """A candidate with the strength that the tune facts gave it and its greedy accuracy there."""

    candidate: Candidate
    strength: float
    accuracy: float


class Bench:
    """A lab target with everything that its steering is chosen and judged by. Blocks are read when first needed."""

    def __init__(self, target: LabModel, strengths: Sequence[float] = STRENGTHS) -> None:
        """`strengths` are tried for every candidate, in units of the median norm of its layer."""
        self.target = target
        self.strengths = tuple(strengths)
        self.norms = target.median_norms(
            [render([user(fact.question()), assistant(fact.answer())]) for fact in facts(Split.TUNE)]
        )
        self._block = cache(lambda layer, split: SteeredBlock(target, layer, facts(split), neutral_texts(split)))

    @property
    def num_layers(self) -> int:
        return len(self.target.blocks)

    def choose(self, candidates: Sequence[Candidate]) -> Choice | None:
        """The candidate and strength of the best tune accuracy within the budget; None where nothing is within it.

        Of equals the lowest strength, then the first candidate.
        """
        choices = [
            Choice(candidate, strength, block.accuracy(self._vector(candidate, strength)))
            for strength in self.strengths
            for candidate in candidates
            for block in [self._block(candidate.layer, Split.TUNE)]
        ]
        # Sorting is stable. The perplexity takes most of the time, so it is asked for the best ones only.
        for choice in sorted(choices, key=lambda choice: -choice.accuracy):
            if self.perplexity_ratio(choice, Split.TUNE) <= HIGHEST_PERPLEXITY_RATIO:
                return choice
        return None

    def answers_truly(self, choice: Choice) -> Tensor:
        """Whether each test fact is answered truly under a choice, [204] bool."""
        vector = self._vector(choice.candidate, choice.strength)
        return self._block(choice.candidate.layer, Split.TEST).answers_truly(vector)

    def accuracy(self, choice: Choice) -> float:
        """Share of the test facts that are answered truly under a choice."""
        return self.answers_truly(choice).double().mean().item()

    def perplexity_ratio(self, choice: Choice, split: Split = Split.TEST) -> float:
        """Perplexity of a split's neutral texts under a choice over the one without steering."""
        vector = self._vector(choice.candidate, choice.strength)
        return self._block(choice.candidate.layer, split).perplexity_ratio(vector)

    def random_directions(self, count: int, seed: int) -> list[Tensor]:
        """`count` unit directions of the target's width, evenly distributed."""
        generator = torch.Generator().manual_seed(seed)
        return [unit(row) for row in torch.randn(count, self.target.model.config.hidden_size, generator=generator)]

    def _vector(self, candidate: Candidate, strength: float) -> Tensor:
        return strength * self.norms[candidate.layer] * candidate.direction
