"""What a request carries into the engine."""

import json
from types import SimpleNamespace
from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts.manifest import ExcludedSpan, Scope
from server.engine.steering import CONSTRAINED, END, EXTRA_ARGS_KEY, SPAN_NAMES, ScopeName, Steering, Term, scope_range

scopes = st.sampled_from(get_args(ScopeName))
strengths = st.floats(-1e4, 1e4).filter(bool)
excludes = st.lists(st.sampled_from([*SPAN_NAMES, CONSTRAINED]), unique=True).map(tuple)
steerings = st.builds(
    Steering,
    st.text(min_size=1, max_size=40),
    st.lists(st.builds(Term, st.text(max_size=80), strengths, scopes, excludes), min_size=1, max_size=4).map(tuple),
)


def test_scopes_are_those_of_the_manifest() -> None:
    assert set(get_args(ScopeName)) == set(Scope)
    assert {*SPAN_NAMES, CONSTRAINED} == set(get_args(ExcludedSpan))


def test_only_a_constrained_answer_is_left_alone() -> None:
    free = Steering("r", (Term("a", 1.0, "all"), Term("b", 1.0, "all", ("reasoning",))))
    steering = Steering("r", (free.terms[0], Term("b", 1.0, "all", ("reasoning", CONSTRAINED))))
    assert steering.for_answer(constrained=True) == steering
    assert steering.for_answer(constrained=False) == free


@pytest.mark.parametrize(
    ("scope", "steered"),
    [("all", range(0, 9)), ("prompt", range(0, 5)), ("response", range(4, 9)), ("generation", range(5, 9))],
)
def test_scope_range(scope: ScopeName, steered: range) -> None:
    bounds = scope_range(scope, 5)
    assert [position for position in range(9) if bounds.start <= position < bounds.stop] == list(steered)


def test_response_of_an_empty_prompt_starts_at_zero() -> None:
    assert scope_range("response", 0) == (0, END)


@given(steerings)
def test_survives_the_way_to_the_engine(steering: Steering) -> None:
    for travelled in (
        msgspec.msgpack.decode(msgspec.msgpack.encode(steering.to_extra_args())),
        json.loads(json.dumps(steering.to_extra_args())),
    ):
        assert Steering.from_sampling_params(SimpleNamespace(extra_args=travelled)) == steering


def test_other_extra_arguments_are_none_of_our_business() -> None:
    steering = Steering("r", (Term("sha256:ab", 0.5, "all"),))
    params = SimpleNamespace(extra_args={"other": 1, **steering.to_extra_args()})
    assert Steering.from_sampling_params(params) == steering


@pytest.mark.parametrize(
    "params", [None, SimpleNamespace(), *(SimpleNamespace(extra_args=value) for value in (None, {}, {"other": 1}))]
)
def test_unsteered(params: object) -> None:
    assert Steering.from_sampling_params(params) is None


def test_strength_is_a_float_after_json() -> None:
    data = {EXTRA_ARGS_KEY: {"id": "r", "terms": [["b", 1, "all", []]]}}
    steering = Steering.from_sampling_params(SimpleNamespace(extra_args=data))
    assert steering is not None
    # The prefix-cache key spells the strength out: 1 and 1.0 must not differ.
    assert repr(steering.terms[0].strength) == "1.0"
