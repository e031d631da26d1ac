"""How one request is steered, token range by token range."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from server.engine.slot_table import SlotKey
from server.engine.steering import END, SPAN_NAMES, Steering, Term, TokenRange

NUM_STATES = 2 ** len(SPAN_NAMES)


class Variant(NamedTuple):
    """What some tokens get: a slot key (empty: nothing), a strength, and the numbers of the terms behind them."""

    key: SlotKey
    strength: float
    terms: tuple[int, ...]


class Segment(NamedTuple):
    """Tokens of a request to which the same terms apply: positions [start, stop), all prompt or all generation.

    Attributes:
        variants: one, or `NUM_STATES` by the spans that a token lies in: bit i of the index stands for SPAN_NAMES[i].
        phase: 0 for the prompt, 1 for the generation.
    """

    start: int
    stop: int
    variants: tuple[Variant, ...]
    phase: int


class RequestPlan:
    """Segments of one request and the count of its steered tokens.

    A single term shares its slot with every strength of its bundle, because strength travels per token; a combination
    keeps its strengths in the slot.

    Attributes:
        steering_id: id under which the count is reported.
        segments: in order of position; tokens in none are unsteered.
        has_spans: whether what a token gets depends on the tokens before it.
        steady: the segment that goes on for ever and holds most decode steps; None where there is none.
        tokens_steered: positions steered so far, each counted once: of the first term those of the prompt and those of
            the generation, of the second term likewise, and so on. Cached prompt tokens count, because their KV was
            made under the same steering; recomputation after a preemption does not count again.
    """

    def __init__(self, steering: Steering, num_prompt_tokens: int) -> None:
        self.steering_id = steering.request_id
        self.has_spans = any(term.spans for term in steering.terms)
        ranges = [term.positions(num_prompt_tokens) for term in steering.terms]
        self.segments = tuple(_segments(steering.terms, ranges, num_prompt_tokens))
        is_endless = bool(self.segments) and self.segments[-1].stop == END
        self.steady = self.segments[-1] if is_endless and not self.has_spans else None
        self.tokens_steered = [0] * (2 * len(ranges))
        # What a decode step of the steady segment counts up.
        steady_terms = self.steady.variants[0].terms if self.steady else ()
        self._steady_counters = [2 * term + 1 for term in steady_terms]
        self._num_seen = 0
        # Of requests with spans: (position up to which they were counted, counts) of the last two steps that were read.
        self._settled = ((0, tuple(self.tokens_steered)),) * 2

    @property
    def keys(self) -> set[SlotKey]:
        """Slots that it may need in one step."""
        return {variant.key for segment in self.segments for variant in segment.variants if variant.key}

    def advance(self, stop: int) -> None:
        """Count the steered tokens among the positions up to `stop` (exclusive) that were not counted before."""
        assert not self.has_spans
        first = self.see(stop)
        for segment in self.segments:
            self.count(segment, segment.variants[0], max(0, min(stop, segment.stop) - max(first, segment.start)))

    def advance_by_one(self, position: int) -> Variant | None:
        """Count one token and say what it gets, where that is quick: a decode step. None where it is not."""
        if self.steady is None or position < self.steady.start or position != self._num_seen:
            return None
        self._num_seen = position + 1
        for counter in self._steady_counters:
            self.tokens_steered[counter] += 1
        return self.steady.variants[0]

    def see(self, stop: int) -> int:
        """Take the positions up to `stop` (exclusive) as counted; returns the first that was not counted before."""
        first = self._num_seen
        self._num_seen = max(first, stop)
        return first

    def count(self, segment: Segment, variant: Variant, num_tokens: int) -> None:
        """Add tokens of a segment that were steered as `variant`, one of its own, says."""
        for term in variant.terms:
            self.tokens_steered[2 * term + segment.phase] += num_tokens

    def settle(self, stop: int) -> None:
        """Remember the counts of a request with spans once those of the step up to `stop` (exclusive) are in."""
        self._settled = (self._settled[1], (stop, tuple(self.tokens_steered)))

    def counts_until(self, stop: int) -> tuple[int, ...]:
        """The counts without positions from `stop` on, computed before anybody knew that the answer ends there.

        With spans, what those got is known of a whole step only: there is one such step at most, with one token.
        """
        if self.has_spans:
            return next((counts for end, counts in reversed(self._settled) if end <= stop), self._settled[0][1])
        counts = list(self.tokens_steered)
        for segment in self.segments:
            surplus = max(0, min(self._num_seen, segment.stop) - max(stop, segment.start))
            for term in segment.variants[0].terms:
                counts[2 * term + segment.phase] -= surplus
        return tuple(counts)


def _segments(terms: Sequence[Term], ranges: Sequence[TokenRange], num_prompt_tokens: int) -> Iterator[Segment]:
    edges = sorted({edge for bounds in ranges for edge in bounds} | {0, num_prompt_tokens, END})
    for start, stop in pairwise(edges):
        phase = int(start >= num_prompt_tokens)
        numbers = [number for number, bounds in enumerate(ranges) if bounds.start <= start and stop <= bounds.stop]
        if not numbers:
            continue
        if any(terms[number].spans for number in numbers):
            yield Segment(start, stop, tuple(_variant(terms, numbers, state) for state in range(NUM_STATES)), phase)
        else:
            yield Segment(start, stop, (_variant(terms, numbers, 0),), phase)


def _variant(terms: Sequence[Term], numbers: Sequence[int], state: int) -> Variant:
    inside = {name for bit, name in enumerate(SPAN_NAMES) if state >> bit & 1}
    kept = tuple(number for number in numbers if inside.isdisjoint(terms[number].spans))
    if len(kept) == 1:
        term = terms[kept[0]]
        return Variant(((term.bundle, 1.0),), term.strength, kept)
    return Variant(tuple((terms[number].bundle, terms[number].strength) for number in kept), 1.0, kept)
