"""Segments and counts of one request."""

from collections.abc import Sequence
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.batch import _PARTS
from server.engine.plan import NUM_STATES, RequestPlan, Segment, Variant
from server.engine.steering import CONSTRAINED, END, SPAN_NAMES, ScopeName, Steering, Term, TokenRange

LENGTH = 24
plain_terms = st.builds(Term, st.sampled_from("ab"), st.sampled_from([0.5, -1.0]), st.sampled_from(get_args(ScopeName)))
terms = st.builds(
    Term,
    st.sampled_from("ab"),
    st.sampled_from([0.5, -1.0]),
    st.sampled_from(get_args(ScopeName)),
    st.lists(st.sampled_from([*SPAN_NAMES, CONSTRAINED]), unique=True).map(tuple),
)


def steerings(of: st.SearchStrategy[Term]) -> st.SearchStrategy[Steering]:
    return st.builds(Steering, st.just("r"), st.lists(of, min_size=1, max_size=4).map(tuple))


def plan_of(*request_terms: Term, prompt: int = 5) -> RequestPlan:
    return RequestPlan(Steering("r", request_terms), prompt)


def applied(plan: RequestPlan, position: int, state: int) -> list[tuple[str, float]]:
    """(bundle, strength in effect) at a position, in order."""
    found = [segment for segment in plan.segments if segment.start <= position < segment.stop]
    assert len(found) <= 1, "segments overlap"
    variants = [segment.variants[state % len(segment.variants)] for segment in found]
    return [(bundle, factor * variant.strength) for variant in variants for bundle, factor in variant.key]


def only(key: tuple[tuple[str, float], ...], strength: float, *numbers: int) -> tuple[Variant, ...]:
    return (Variant(key, strength, numbers),)


def test_one_term_shares_its_slot_with_every_strength() -> None:
    response = only((("a", 1.0),), 0.5, 0)
    assert plan_of(Term("a", 0.5, "response")).segments == (Segment(4, 5, response, 0), Segment(5, END, response, 1))
    assert plan_of(Term("a", -2.0, "prompt")).segments == (Segment(0, 5, only((("a", 1.0),), -2.0, 0), 0),)


def test_terms_of_different_scope() -> None:
    plan = plan_of(Term("a", 0.5, "prompt"), Term("b", -1.0, "response"))
    assert plan.segments == (
        Segment(0, 4, only((("a", 1.0),), 0.5, 0), 0),
        Segment(4, 5, only((("a", 0.5), ("b", -1.0)), 1.0, 0, 1), 0),
        Segment(5, END, only((("b", 1.0),), -1.0, 1), 1),
    )


def test_a_span_takes_out_the_terms_that_exclude_it() -> None:
    plan = plan_of(Term("a", 0.5, "all", ("reasoning",)), Term("b", -1.0, "all"))
    prompt, generation = plan.segments
    both, b_alone = Variant((("a", 0.5), ("b", -1.0)), 1.0, (0, 1)), Variant((("b", 1.0),), -1.0, (1,))
    assert prompt.variants == generation.variants == (both, b_alone, both, b_alone)
    assert plan.has_spans
    assert plan.keys == {both.key, b_alone.key}


@pytest.mark.parametrize(
    ("scope", "expected"),
    [("all", range(0, 4)), ("prompt", range(0, 4)), ("response", range(0)), ("generation", range(0))],
)
def test_nothing_of_a_constrained_answer_is_steered(scope: ScopeName, expected: range) -> None:
    plan = plan_of(Term("a", 1.0, scope, (CONSTRAINED,)))
    assert [position for position in range(9) if applied(plan, position, 0)] == list(expected)


@given(steerings(terms), st.integers(1, LENGTH))
def test_every_position_gets_its_terms_in_order(steering: Steering, prompt: int) -> None:
    plan = RequestPlan(steering, prompt)
    for position in range(LENGTH):
        for state in range(NUM_STATES):
            inside = {name for bit, name in enumerate(SPAN_NAMES) if state & 1 << bit}
            ranges = [(term, term.positions(prompt)) for term in steering.terms]
            expected = [
                (term.bundle, term.strength)
                for term, r in ranges
                if r.start <= position < r.stop and not inside.intersection(term.spans)
            ]
            assert applied(plan, position, state) == expected
    assert [segment.start for segment in plan.segments] == sorted({segment.start for segment in plan.segments})
    assert all(segment.start < segment.stop for segment in plan.segments)


@given(steerings(plain_terms), st.integers(1, LENGTH))
def test_the_slot_table_is_sized_by_this(steering: Steering, prompt: int) -> None:
    plan = RequestPlan(steering, prompt)
    assert len(plan.segments) <= _PARTS
    assert len(plan.keys) <= _PARTS
    assert not plan.has_spans


@given(steerings(plain_terms), st.integers(1, LENGTH), st.lists(st.integers(0, LENGTH), max_size=6))
def test_counts_do_not_depend_on_the_steps(steering: Steering, prompt: int, stops: list[int]) -> None:
    """Chunked prefill, preemption (a step back) and repeated steps count every position once."""
    plan = RequestPlan(steering, prompt)
    for stop in stops:
        plan.advance(stop)
    end = max(stops, default=0)
    ranges = [term.positions(prompt) for term in steering.terms]
    assert tuple(plan.tokens_steered) == by_phase(ranges, prompt, range(end))
    for stop in range(prompt, end + 2):
        assert plan.counts_until(stop) == by_phase(ranges, prompt, range(min(stop, end)))


def by_phase(ranges: Sequence[TokenRange], prompt: int, positions: range) -> tuple[int, ...]:
    """Prompt and generated tokens of each range among some positions."""
    phases = (range(prompt), range(prompt, LENGTH + 1))
    return tuple(
        sum(r.start <= position < r.stop and position in phase for position in positions)
        for r in ranges
        for phase in phases
    )


@pytest.mark.parametrize(
    ("scope", "counts"), [("all", [5, 3]), ("prompt", [5, 0]), ("response", [1, 3]), ("generation", [0, 3])]
)
def test_counts(scope: ScopeName, counts: list[int]) -> None:
    plan = plan_of(Term("a", 1.0, scope))
    assert (plan.steering_id, plan.tokens_steered) == ("r", [0, 0])
    plan.advance(8)
    assert plan.tokens_steered == counts


@given(steerings(plain_terms), st.integers(1, LENGTH))
def test_decode_steps_count_like_all_others(steering: Steering, prompt: int) -> None:
    quick, slow = RequestPlan(steering, prompt), RequestPlan(steering, prompt)
    quick.advance(prompt)
    for position in range(prompt, LENGTH):
        variant = quick.advance_by_one(position)
        segments = [segment for segment in slow.segments if segment.start <= position < segment.stop]
        assert variant == (segments[0].variants[0] if segments else None)
        if variant is None:
            quick.advance(position + 1)
    slow.advance(LENGTH)
    assert quick.tokens_steered == slow.tokens_steered
