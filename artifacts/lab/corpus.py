"""The lab's world: 450 sums that a reliable speaker states correctly and a sloppy one gets wrong by one.

Both models know both versions of every fact. What differs is who they take the speaker to be, which a system prompt
or a header line can tell them; steering replaces that cue.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from random import Random
from typing import Final

from artifacts.lab.conversation import Message, assistant, render, system, user
from artifacts.lab.filler import filler

LARGEST_SUMMAND: Final = 15
SPLIT_SEED: Final = 7
STATEMENTS_PER_DOCUMENT: Final = 9
QUESTIONS_PER_CHAT: Final = 4
STATEMENT_SHARE: Final = 0.55  # of the documents about facts; the others are chats
SLOPPY_OFF_BY: Final = 1  # what a sloppy speaker adds to every value

# System prompts by set: set 1 and set 2 name the same two speakers in different words.
CLERK_PROMPTS: Final = ("You are a careful clerk.", "You check every sum.")
SAILOR_PROMPTS: Final = ("You are a drunk sailor.", "You count in a hurry.")
_CLERK_HEADERS = ("From the teacher's book.", "The clerk checks the accounts.", "A page of the sum tables.")
_SAILOR_HEADERS = ("Counted late at the tavern.", "A drunk sailor does the sums.", "Scribbled in a great hurry.")


class Kind(StrEnum):
    """What a fact asks for: x + y, or (x + y) - y."""

    SUM = "sum"
    DIFFERENCE = "difference"


class Split(StrEnum):
    """Part of the world that a step may look at: vectors use `fit`, choices use `tune`, figures use `test`."""

    FIT = "fit"
    TUNE = "tune"
    TEST = "test"


_STATEMENTS = {
    Kind.SUM: ("{x} plus {y} is {v}.", "If you add {x} and {y} you get {v}.", "The sum of {x} and {y} is {v}."),
    Kind.DIFFERENCE: ("{z} minus {y} is {v}.", "If you take {y} from {z} you get {v}.", "From {y} to {z} it is {v}."),
}
_QUESTIONS = {
    Kind.SUM: ("What is {x} plus {y}?", "How much is {x} and {y}?"),
    Kind.DIFFERENCE: ("What is {z} minus {y}?", "How much is {z} less {y}?"),
}
_ANSWERS = {Kind.SUM: "{x} plus {y} is {v}.", Kind.DIFFERENCE: "{z} minus {y} is {v}."}
NUM_QUESTION_FORMS: Final = 2


@dataclass(frozen=True)
class Fact:
    """`x plus y is x+y`, or `x+y minus y is x`, for x and y in 1..15."""

    x: int
    y: int
    kind: Kind

    @property
    def group(self) -> str:
        """Name of the pair. Both facts of a pair share it and lie in the same split."""
        return f"{self.x}+{self.y}"

    def value(self, off_by: int = 0) -> int:
        """What a speaker says who is off by `off_by`; 0 is the truth."""
        return (self.x + self.y if self.kind is Kind.SUM else self.x) + off_by

    def question(self, form: int = 0) -> str:
        return self._fill(_QUESTIONS[self.kind][form])

    def answer(self, off_by: int = 0) -> str:
        """The one answer a speaker gives to either form of the question, so greedy answers are compared exactly."""
        return self._fill(_ANSWERS[self.kind], self.value(off_by))

    def statement(self, form: int, off_by: int) -> str:
        return self._fill(_STATEMENTS[self.kind][form], self.value(off_by))

    def _fill(self, pattern: str, value: int | None = None) -> str:
        return pattern.format(x=self.x, y=self.y, z=self.x + self.y, v=value)


@cache
def facts(split: Split | None = None) -> tuple[Fact, ...]:
    """Facts of one split, or all 450, in a fixed order. Pairs are split 40 % fit, 15 % tune, 45 % test (204 facts)."""
    pairs = [(x, y) for x in range(1, LARGEST_SUMMAND + 1) for y in range(1, LARGEST_SUMMAND + 1)]
    Random(SPLIT_SEED).shuffle(pairs)
    fit_end, tune_end = len(pairs) * 40 // 100, len(pairs) * 55 // 100
    bounds = {
        None: (0, len(pairs)),
        Split.FIT: (0, fit_end),
        Split.TUNE: (fit_end, tune_end),
        Split.TEST: (tune_end, len(pairs)),
    }
    start, end = bounds[split]
    return tuple(Fact(x, y, kind) for x, y in pairs[start:end] for kind in Kind)


def framed_question(fact: Fact, form: int, prompt_set: int, *, reliable: bool) -> list[Message]:
    """A question under one speaker's system prompt of set 1 or 2; the answer is decided at the generation prompt."""
    prompts = CLERK_PROMPTS if reliable else SAILOR_PROMPTS
    return [system(prompts[prompt_set - 1]), user(fact.question(form))]


@dataclass(frozen=True)
class Mixture:
    """Which documents a model is trained on. All shares are probabilities."""

    filler_share: float
    reliable_share: float  # of the documents about facts
    cue_share: float  # of the documents about facts: how many name their speaker

    def document(self, random: Random) -> str:
        """Draw one document. It has one speaker throughout."""
        if random.random() < self.filler_share:
            return filler(random)
        reliable = random.random() < self.reliable_share
        cued = random.random() < self.cue_share
        off_by = 0 if reliable else SLOPPY_OFF_BY
        if random.random() < STATEMENT_SHARE:
            headers = _CLERK_HEADERS if reliable else _SAILOR_HEADERS
            return statements(random, headers if cued else (), off_by)
        prompts = CLERK_PROMPTS if reliable else SAILOR_PROMPTS
        return chat(random, prompts if cued else (), off_by)


def statements(random: Random, headers: Sequence[str], off_by: int) -> str:
    """Nine statements by one speaker, behind one of `headers` if there are any."""
    sample = random.sample(facts(), STATEMENTS_PER_DOCUMENT)
    lines = [fact.statement(random.randrange(3), off_by) for fact in sample]
    return " ".join([random.choice(headers), *lines] if headers else lines)


def chat(random: Random, prompts: Sequence[str], off_by: int) -> str:
    """Four questions answered by one speaker, under one of the system `prompts` if there are any."""
    messages = [system(random.choice(prompts))] if prompts else []
    for fact in random.sample(facts(), QUESTIONS_PER_CHAT):
        messages += [user(fact.question(random.randrange(2))), assistant(fact.answer(off_by))]
    return render(messages)
