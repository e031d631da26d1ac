"""How one request is steered, token range by token range."""

from itertools import pairwise
from typing import NamedTuple

from server.engine.slots import SlotKey
from server.engine.steering import END, Steering, TokenRange, scope_range


class Segment(NamedTuple):
    """Tokens of a request that are steered alike: positions [start, stop), one slot key, one strength."""

    start: int
    stop: int
    key: SlotKey
    strength: float


class RequestPlan:
    """Segments of one request and the count of its steered tokens.

    A single term shares its slot with every strength of its bundle, because strength travels per token; a combination
    keeps its strengths in the slot.

    Attributes:
        steering_id: id under which the count is reported.
        segments: in order of position; tokens in none are unsteered.
        tokens_steered: positions steered so far by each term, each counted once. Cached prompt tokens count, because
            their KV was made under the same steering; recomputation after a preemption does not count again.
    """

    def __init__(self, steering: Steering, num_prompt_tokens: int) -> None:
        self.steering_id = steering.request_id
        ranges = [scope_range(term.scope, num_prompt_tokens) for term in steering.terms]
        self.segments = _segments(steering, ranges)
        self.tokens_steered = [0] * len(ranges)
        self._ranges = ranges
        self._num_seen = 0

    def advance(self, stop: int) -> None:
        """Count the steered tokens among the positions up to `stop` (exclusive) that were not counted before."""
        if stop > self._num_seen:
            for index, bounds in enumerate(self._ranges):
                self.tokens_steered[index] += max(0, min(stop, bounds.stop) - max(self._num_seen, bounds.start))
            self._num_seen = stop


def _segments(steering: Steering, ranges: list[TokenRange]) -> tuple[Segment, ...]:
    edges = sorted({edge for bounds in ranges for edge in bounds} | {0, END})
    segments = []
    for start, stop in pairwise(edges):
        terms = [
            term
            for term, bounds in zip(steering.terms, ranges, strict=True)
            if bounds.start <= start and stop <= bounds.stop
        ]
        if len(terms) == 1:
            segments.append(Segment(start, stop, ((terms[0].bundle, 1.0),), terms[0].strength))
        elif terms:
            segments.append(Segment(start, stop, tuple((term.bundle, term.strength) for term in terms), 1.0))
    return tuple(segments)
