"""Where steering directions of the lab come from: the target itself, or an expert through a map between the models."""

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from artifacts.aligner.affine import AffineMap
from artifacts.aligner.axes import principal_axes
from artifacts.aligner.ridge import fit_ridge
from artifacts.lab.choice import Candidate
from artifacts.lab.conversation import render
from artifacts.lab.corpus import NUM_QUESTION_FORMS, Split, facts, framed_question
from artifacts.lab.dataset import mapping_texts
from artifacts.lab.model import LabModel
from artifacts.vectors.difference import unit

_DIRECTION_SET: Final = 2  # the aligner's texts hold the prompts of set 1 only
_REGULARISATION: Final = 1e-2


class Reading(NamedTuple):
    """States of one model behind every block at the last token: [num_texts, num_layers, hidden_size] fp32.

    Attributes:
        reliable, sloppy: the same questions under either speaker's prompt of set 2, in the same order.
        mapping: of texts to fit a map on, which share nothing with those.
    """

    reliable: Tensor
    sloppy: Tensor
    mapping: Tensor

    @staticmethod
    def of(model: LabModel) -> "Reading":
        reliable, sloppy = (model.last_states(framed_texts(reliable)) for reliable in (True, False))
        return Reading(reliable, sloppy, model.last_states(mapping_texts()))

    @property
    def difference(self) -> Tensor:
        """Difference of means between the two speakers, [num_layers, hidden_size] fp32."""
        return self.reliable.mean(0) - self.sloppy.mean(0)

    @property
    def num_layers(self) -> int:
        return self.mapping.shape[1]


def own_candidates(difference: Tensor) -> list[Candidate]:
    """One candidate per layer of `difference` [num_layers, hidden_size]."""
    return [Candidate(layer, unit(row)) for layer, row in enumerate(difference)]


def mapped_candidates(expert: Reading, target: Reading, *, same_texts: bool) -> list[Candidate]:
    """The expert's difference of means through a ridge map, for every pair of layers.

    Args:
        same_texts: fit the map on the very texts that the direction is read from (setting A), so that an expert is not
            needed: the target's own states bring the contrast. Otherwise on the mapping texts (setting B).
    """
    inputs, outputs = (_contrast(expert), _contrast(target)) if same_texts else (expert.mapping, target.mapping)
    return [
        Candidate(layer, unit(fit_ridge(axes, outputs[:, layer], _REGULARISATION).direction(difference)), expert_layer)
        for expert_layer, difference in enumerate(expert.difference)
        for axes in [principal_axes(inputs[:, expert_layer], max_rank=inputs.shape[-1])]
        for layer in range(target.num_layers)
    ]


def encoded_candidates(encoders: Sequence[AffineMap], expert: Reading, target: Reading) -> list[Candidate]:
    """The expert's difference of means through one encoder per expert layer, offered to every target layer.

    An encoder fitted on the expert's states alone has no target layer of its own.
    """
    return [
        Candidate(layer, unit(encoder.direction(difference)), expert_layer)
        for expert_layer, (encoder, difference) in enumerate(zip(encoders, expert.difference, strict=True))
        for layer in range(target.num_layers)
    ]


def framed_texts(reliable: bool) -> list[str]:
    """Every question of the fit facts under one speaker's prompt of set 2, up to the generation prompt."""
    return [
        render(framed_question(fact, form, _DIRECTION_SET, reliable=reliable), generation_prompt=True)
        for fact in facts(Split.FIT)
        for form in range(NUM_QUESTION_FORMS)
    ]


def _contrast(reading: Reading) -> Tensor:
    return torch.cat([reading.reliable, reading.sloppy])
