"""Labelled introductions of the second world, in quadruples of the same words: two told speakers, two balanced ones."""

from random import Random
from typing import NamedTuple

from torch import Tensor, tensor

from artifacts.lab.conversation import render, system
from artifacts.lab.two_sided import Speaker, draw_speaker

QUADRUPLE = 4


class Contrast(NamedTuple):
    """Introductions, read at their last token.

    Attributes:
        texts: one system prompt each, quadruples together.
        labels: [num_texts] int64, 1 where the speaker can be told.
        evidence: [num_texts] int64, -4 or 4 where it can, else 0.
    """

    texts: list[str]
    labels: Tensor
    evidence: Tensor


def draw_contrast(random: Random, count: int, known: frozenset[str] = frozenset()) -> Contrast:
    """`count` quadruples that hold none of the `known` texts.

    A speaker for whom all words speak and one against whom all do swap two of their words: what every word brings by
    itself is the same in both classes, so the means can differ by what words do together only.
    """
    texts: list[str] = []
    evidence: list[int] = []
    while len(texts) < count * QUADRUPLE:
        quadruple = _quadruple(random)
        prompts = [render([system(speaker.prompt)]) for speaker in quadruple]
        if known.isdisjoint(prompts):
            texts += prompts
            evidence += [speaker.evidence for speaker in quadruple]
    return Contrast(texts, (tensor(evidence) != 0).long(), tensor(evidence))


def _quadruple(random: Random) -> list[Speaker]:
    for_it, against = draw_speaker(random, 4), draw_speaker(random, 0)
    # Either the objects change hands, or one adjective and one object.
    if random.random() < 0.5:
        mixed = [(for_it.adjectives, against.objects), (against.adjectives, for_it.objects)]
    else:
        mixed = [
            ((one.adjectives[0], other.adjectives[1]), (one.objects[0], other.objects[1]))
            for one, other in ((for_it, against), (against, for_it))
        ]
    return [for_it, against, *(Speaker(adjectives, objects, 2) for adjectives, objects in mixed)]
