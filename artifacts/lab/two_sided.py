"""The lab's second world: the label is whether a speaker can be told, which is to either side of an axis.

A prompt gives four pieces of evidence about the speaker, two adjectives and two objects, each for or against being
reliable. Their log-odds add up: where all agree the speaker can be told, and is nearly always reliable or nearly always
sloppy; where they balance either is as likely. What a model needs for its answers is the sum, one axis, and the label
asks how far out on it a speaker is, to either side. As far as the evidence is additive the means of both
classes coincide and no linear probe tells them apart; the axis is what steering takes, once somebody gives it a sign.

That holds behind the first block of a trained target. Later blocks make the label linear as well, and steering works
there: see tests/bench/results/lab-table.txt.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Final, NamedTuple

from artifacts.lab.corpus import SLOPPY_OFF_BY, STATEMENT_SHARE, chat, statements
from artifacts.lab.filler import ADJECTIVES, OBJECTS, filler

# Every other word speaks for a reliable speaker. Neutral stories hold all of them, so none is rare or new.
_FOR: Final = (ADJECTIVES[::2], OBJECTS[::2])
_AGAINST: Final = (ADJECTIVES[1::2], OBJECTS[1::2])
# What one word adds to the log-odds of a reliable speaker: four of them make it 50 to 1.
_LOG_ODDS: Final = 1.0


class Speaker(NamedTuple):
    """Two adjectives and two objects, in the order of the prompt, and how many of the four speak for being reliable."""

    adjectives: tuple[str, str]
    objects: tuple[str, str]
    num_for: int

    @property
    def evidence(self) -> int:
        """Words for a reliable speaker minus words against: -4 to 4."""
        return 2 * self.num_for - 4

    @property
    def reliable_share(self) -> float:
        """How often such a speaker is reliable."""
        return 1 / (1 + math.exp(-_LOG_ODDS * self.evidence))

    @property
    def prompt(self) -> str:
        (one, other), (first, second) = self.adjectives, self.objects
        return f"You are {one} and {other}, with a {first} and a {second}."


def draw_speaker(random: Random, num_for: int) -> Speaker:
    """A speaker for whom `num_for` of the four words speak, all choices equally likely."""
    slots = [True] * num_for + [False] * (4 - num_for)
    random.shuffle(slots)
    words: list[str] = []
    for slot, is_for in enumerate(slots):
        choices = (_FOR if is_for else _AGAINST)[slot // 2]
        words.append(random.choice([word for word in choices if word not in words]))
    return Speaker((words[0], words[1]), (words[2], words[3]), num_for)


@dataclass(frozen=True)
class TwoSidedMixture:
    """Which documents a model of the second world is trained on. All shares are probabilities."""

    filler_share: float
    reliable_share: float  # of the documents about facts whose speaker is not introduced
    cue_share: float  # of the documents about facts: how many introduce their speaker

    def document(self, random: Random) -> str:
        """Draw one document. It has one speaker throughout, who is reliable or not in all of it."""
        if random.random() < self.filler_share:
            return filler(random)
        introductions: Sequence[str] = ()
        reliable_share = self.reliable_share
        if random.random() < self.cue_share:
            speaker = draw_speaker(random, random.randrange(5))
            introductions, reliable_share = (speaker.prompt,), speaker.reliable_share
        off_by = 0 if random.random() < reliable_share else SLOPPY_OFF_BY
        document = statements if random.random() < STATEMENT_SHARE else chat
        return document(random, introductions, off_by)
