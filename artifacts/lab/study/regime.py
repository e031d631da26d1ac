"""Which labelled examples somebody has: regimes that are easy or hard for the target, and random draws from them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final, NamedTuple

import torch
from torch import Tensor

from artifacts.lab.conversation import render, system, user
from artifacts.lab.corpus import CLERK_PROMPTS, NUM_QUESTION_FORMS, SAILOR_PROMPTS, Fact, Kind, Split, facts

# Labelled examples in all, both classes together and equally many of each.
LABEL_COUNTS: Final = (2, 4, 8, 16, 32, 64)
HARD_COUNTS: Final = (8, 32)
CONFOUNDED_SHARE: Final = 0.8
FLIPPED_SHARE: Final = 0.25


class Content(NamedTuple):
    """What one matched pair of texts asks."""

    fact: Fact
    form: int


# One text per speaker of the same content; row 2c is the reliable speaker's and row 2c + 1 the sloppy one's.
CONTENTS: Final = tuple(Content(fact, form) for fact in facts(Split.FIT) for form in range(NUM_QUESTION_FORMS))

_WORDINGS: Final = {
    # Prompt set 2; the mapping texts hold set 1.
    "prompt": (CLERK_PROMPTS[1], SAILOR_PROMPTS[1]),
    # Words of the headers, which no model has seen as a system prompt.
    "unfamiliar": ("You are a teacher.", "You are late at the tavern."),
    # A header line and no system prompt at all.
    "header": ("The clerk checks the accounts.", "Counted late at the tavern."),
}


def wordings() -> tuple[str, ...]:
    """Names of the sets of texts."""
    return tuple(_WORDINGS)


def texts(wording: str) -> list[str]:
    """All texts of one wording, two per content: the reliable speaker's, then the sloppy one's."""
    result = []
    for fact, form in CONTENTS:
        for speaker in _WORDINGS[wording]:
            question = [user(fact.question(form))]
            chat = question if wording == "header" else [system(speaker), *question]
            rendered = render(chat, generation_prompt=True)
            result.append(f"{speaker}{rendered}" if wording == "header" else rendered)
    return result


class Draw(NamedTuple):
    """Labelled examples: rows [count] int64 of the texts, labels [count] int64, and the group of each."""

    rows: Tensor
    labels: Tensor
    groups: list[str]


@dataclass(frozen=True)
class Regime:
    """A way to come by labelled examples.

    Attributes:
        name: short, for tables and files.
        title: for people.
        wording: of the labelled texts.
        counts: numbers of labelled examples to try.
        contents: draws the contents of class 1 and of class 0, `count` / 2 each.
        flipped_share: of the pairs whose two labels are swapped.
    """

    name: str
    title: str
    wording: str
    counts: tuple[int, ...]
    contents: Callable[[Random, int], tuple[Sequence[int], Sequence[int]]]
    flipped_share: float = 0.0

    def draw(self, count: int, seed: int) -> Draw:
        """`count` labelled examples; the same ones for the same seed."""
        random = Random(f"{self.name} {count} {seed}")
        ones, zeros = self.contents(random, count // 2)
        rows = torch.tensor([2 * content for content in ones] + [2 * content + 1 for content in zeros])
        labels = torch.tensor([1] * len(ones) + [0] * len(zeros))
        for pair in range(round(self.flipped_share * len(ones))):
            labels[pair], labels[len(ones) + pair] = 0, 1
        return Draw(rows, labels, [CONTENTS[content].fact.group for content in [*ones, *zeros]])


def _matched(random: Random, count: int) -> tuple[Sequence[int], Sequence[int]]:
    chosen = random.sample(range(len(CONTENTS)), count)
    return chosen, chosen


def _unmatched(random: Random, count: int) -> tuple[Sequence[int], Sequence[int]]:
    return random.sample(range(len(CONTENTS)), count), random.sample(range(len(CONTENTS)), count)


def _confounded(random: Random, count: int) -> tuple[Sequence[int], Sequence[int]]:
    usual = round(CONFOUNDED_SHARE * count)
    sums, differences = (
        [index for index, content in enumerate(CONTENTS) if content.fact.kind is kind]
        for kind in (Kind.SUM, Kind.DIFFERENCE)
    )
    return (
        random.sample(sums, usual) + random.sample(differences, count - usual),
        random.sample(differences, usual) + random.sample(sums, count - usual),
    )


REGIMES: Final = (
    Regime("matched", "matched pairs", "prompt", LABEL_COUNTS, _matched),
    Regime("unmatched", "unmatched draws", "prompt", LABEL_COUNTS, _unmatched),
    Regime("confounded", "label goes with the subject in 80 %", "prompt", HARD_COUNTS, _confounded),
    Regime("flipped", "matched, 25 % of pairs mislabelled", "prompt", HARD_COUNTS, _matched, FLIPPED_SHARE),
    Regime("unfamiliar", "matched, words known from headers only", "unfamiliar", HARD_COUNTS, _matched),
    Regime("header", "matched, a header line and no system prompt", "header", HARD_COUNTS, _matched),
)
