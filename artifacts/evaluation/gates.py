"""Declared bounds of an evaluation, such as `on - random.mean >= 0.2`.

A gate is two sums with `>=`, `<=`, `>` or `<` between them. A sum is numbers and names of figures with ` + ` or ` - `
between them; the spaces are needed, because names contain hyphens.
"""

import difflib
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from artifacts.evaluation.schema import GateResult

_OPERATORS: Final[Mapping[str, Callable[[float, float], bool]]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_COMPARISON: Final = re.compile(r"\s*(.+?)\s*(>=|<=|>|<)\s*(.+?)\s*")
_NUMBER: Final = re.compile(r"-?(\d+\.?\d*|\.\d+)(e-?\d+)?")
_NAME: Final = re.compile(r"[a-z][a-z0-9._-]*")
_FORM: Final = "a gate is like `on >= 0.6`, `on - random.mean >= 0.2` or `on > untrained`"
_MAX_LENGTH: Final = 500


@dataclass(frozen=True)
class Term:
    """A number, or a figure by name, added or subtracted."""

    sign: int
    name: str | None
    number: float = 0.0

    def value(self, figures: Mapping[str, float]) -> float:
        return self.sign * (self.number if self.name is None else figures[self.name])


@dataclass(frozen=True)
class Gate:
    """A bound on figures."""

    text: str
    left: tuple[Term, ...]
    comparison: str
    right: tuple[Term, ...]

    def check(self, figures: Mapping[str, float]) -> GateResult:
        """Hold the gate against figures; one that was not measured fails it."""
        for term in (*self.left, *self.right):
            if term.name is not None and term.name not in figures:
                alike = difflib.get_close_matches(term.name, figures, n=3)
                hint = f"; close to it: {', '.join(alike)}" if alike else ""
                return GateResult(gate=self.text, passed=False, reason=f"{term.name} was not measured{hint}")
        left, right = (sum(term.value(figures) for term in side) for side in (self.left, self.right))
        return GateResult(gate=self.text, figure=left, bound=right, passed=_OPERATORS[self.comparison](left, right))


def parse_gate(text: str) -> Gate:
    """Read a gate.

    Raises:
        ValueError: it is none.
    """
    found = _COMPARISON.fullmatch(text) if len(text) <= _MAX_LENGTH else None
    if found is None:
        raise ValueError(f"{text[:_MAX_LENGTH]!r} has no comparison; {_FORM}")
    gate = Gate(" ".join(text.split()), _parse_sum(found[1], text), found[2], _parse_sum(found[3], text))
    if all(term.name is None for term in (*gate.left, *gate.right)):
        raise ValueError(f"{text!r} names no figure; {_FORM}")
    return gate


def check_gates(gates: Sequence[Gate], figures: Mapping[str, float]) -> tuple[GateResult, ...]:
    """Results of all gates, in order."""
    return tuple(gate.check(figures) for gate in gates)


def _parse_sum(text: str, gate: str) -> tuple[Term, ...]:
    words = text.split()
    if len(words) % 2 == 0 or any(word not in ("+", "-") for word in words[1::2]):
        raise ValueError(f"{text!r} in {gate!r} is no sum of figures; put ` + ` or ` - ` between them; {_FORM}")
    signs = [1, *(1 if word == "+" else -1 for word in words[1::2])]
    return tuple(_parse_term(sign, word, gate) for sign, word in zip(signs, words[::2], strict=True))


def _parse_term(sign: int, word: str, gate: str) -> Term:
    if _NUMBER.fullmatch(word) and math.isfinite(float(word)):
        return Term(sign, None, float(word))
    if _NAME.fullmatch(word):
        return Term(sign, word)
    raise ValueError(f"{word!r} in {gate!r} is neither a number nor the name of a figure; {_FORM}")
