"""Tokens by term and phase, from the counts that workers report."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple


class PhaseTokens(NamedTuple):
    """Tokens steered in each phase of a request."""

    prompt: int = 0
    generation: int = 0

    def plus(self, other: "PhaseTokens") -> "PhaseTokens":
        """Sum by phase."""
        return PhaseTokens(self.prompt + other.prompt, self.generation + other.generation)

    def minus(self, other: "PhaseTokens") -> "PhaseTokens":
        """Difference by phase."""
        return PhaseTokens(self.prompt - other.prompt, self.generation - other.generation)

    def at_least(self, other: "PhaseTokens") -> "PhaseTokens":
        """The larger number by phase."""
        return PhaseTokens(max(self.prompt, other.prompt), max(self.generation, other.generation))


def sum_choices(counts: Mapping[str, Sequence[int]], num_terms: int) -> list[PhaseTokens]:
    """Tokens of each term over all choices of an answer.

    Args:
        counts: prompt and generation tokens of each term in turn, by engine request id. May grow meanwhile.
        num_terms: terms with a strength other than 0; those without a count yet get zeros.
    """
    # One copy first: the event loop adds choices while another thread renders.
    columns = [sum(column) for column in zip(*list(counts.values()), strict=True)] or [0] * (2 * num_terms)
    return [PhaseTokens(*pair) for pair in zip(columns[::2], columns[1::2], strict=True)]


def total(tokens: Iterable[PhaseTokens]) -> PhaseTokens:
    """Sum over terms."""
    result = PhaseTokens()
    for each in tokens:
        result = result.plus(each)
    return result
