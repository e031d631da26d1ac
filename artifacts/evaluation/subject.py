"""What is evaluated: a model that can be asked under named steering."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from artifacts.jobs.data import Text
from artifacts.jobs.measure import AnswerLikelihood

Likelihood = AnswerLikelihood


class Condition(NamedTuple):
    """Steering of a subject: `strength` times the vector that the subject knows as `name`; None is unsteered."""

    name: str | None = None
    strength: float = 0.0


UNSTEERED = Condition()


class Subject(Protocol):
    """A model that answers. Answers come in the order of the questions; BuildError when it cannot answer."""

    def generate(self, prompts: Sequence[Text], steering: Condition, max_new_tokens: int) -> list[str]:
        """Greedy answers, without special tokens, stripped."""
        ...

    def log_likelihoods(
        self, prompts: Sequence[Text], continuations: Sequence[str], steering: Condition
    ) -> list[Likelihood]:
        """How likely each continuation is right after its prompt.

        `greedy` says whether greedy decoding gives exactly its tokens and, after a chat, then stops.
        """
        ...

    def text_log_likelihoods(self, texts: Sequence[Text], steering: Condition) -> list[Likelihood]:
        """How likely each plain text is, given its first token; at most `MAX_NEUTRAL_TOKENS` of it count."""
        ...
