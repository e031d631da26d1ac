"""Segments and counts of one request."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.plan import RequestPlan, Segment
from server.engine.runner import SLOTS_PER_REQUEST
from server.engine.steering import END, ScopeName, Steering, Term, scope_range

LENGTH = 24
terms = st.builds(Term, st.sampled_from("ab"), st.sampled_from([0.5, -1.0]), st.sampled_from(get_args(ScopeName)))
steerings = st.builds(Steering, st.just("r"), st.lists(terms, min_size=1, max_size=4).map(tuple))


def plan_of(*request_terms: Term, prompt: int = 5) -> RequestPlan:
    return RequestPlan(Steering("r", request_terms), prompt)


def applied(plan: RequestPlan, position: int) -> list[tuple[str, float]]:
    """(bundle, strength in effect) at a position, in order."""
    found = [segment for segment in plan.segments if segment.start <= position < segment.stop]
    assert len(found) <= 1, "segments overlap"
    return [(bundle, factor * segment.strength) for segment in found for bundle, factor in segment.key]


def test_one_term_shares_its_slot_with_every_strength() -> None:
    assert plan_of(Term("a", 0.5, "response")).segments == (Segment(4, END, (("a", 1.0),), 0.5),)
    assert plan_of(Term("a", -2.0, "prompt")).segments == (Segment(0, 5, (("a", 1.0),), -2.0),)


def test_terms_of_different_scope() -> None:
    plan = plan_of(Term("a", 0.5, "prompt"), Term("b", -1.0, "response"))
    assert plan.segments == (
        Segment(0, 4, (("a", 1.0),), 0.5),
        Segment(4, 5, (("a", 0.5), ("b", -1.0)), 1.0),
        Segment(5, END, (("b", 1.0),), -1.0),
    )


@given(steerings, st.integers(1, LENGTH))
def test_every_position_gets_its_terms_in_order(steering: Steering, prompt: int) -> None:
    plan = RequestPlan(steering, prompt)
    for position in range(LENGTH):
        ranges = [(term, scope_range(term.scope, prompt)) for term in steering.terms]
        expected = [(term.bundle, term.strength) for term, r in ranges if r.start <= position < r.stop]
        assert applied(plan, position) == expected
    assert [segment.start for segment in plan.segments] == sorted({segment.start for segment in plan.segments})
    assert all(segment.start < segment.stop for segment in plan.segments)
    # The slot table is sized by this.
    assert len(plan.segments) <= SLOTS_PER_REQUEST


@given(steerings, st.integers(1, LENGTH), st.lists(st.integers(0, LENGTH), max_size=6))
def test_counts_do_not_depend_on_the_steps(steering: Steering, prompt: int, stops: list[int]) -> None:
    """Chunked prefill, preemption (a step back) and repeated steps count every position once."""
    plan = RequestPlan(steering, prompt)
    for stop in stops:
        plan.advance(stop)
    end = max(stops, default=0)
    ranges = [scope_range(term.scope, prompt) for term in steering.terms]
    assert plan.tokens_steered == [sum(r.start <= position < r.stop for position in range(end)) for r in ranges]


@pytest.mark.parametrize(("scope", "count"), [("all", 8), ("prompt", 5), ("response", 4), ("generation", 3)])
def test_counts(scope: ScopeName, count: int) -> None:
    plan = plan_of(Term("a", 1.0, scope))
    assert (plan.steering_id, plan.tokens_steered) == ("r", [0])
    plan.advance(8)
    assert plan.tokens_steered == [count]
