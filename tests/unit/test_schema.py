"""The request fields: what is understood, and that nothing that means steering is overlooked."""

import json
import math
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, ValidationError

from artifacts.manifest import Scope
from server.errors import ErrorCode
from server.schema import FIELD, ProfileRef, SteeringFields, steering_key


class _Vllm(BaseModel):
    """Like vLLM's request models: accepts and ignores what it does not know."""

    model_config = ConfigDict(extra="allow")
    model: str | None = None
    vllm_xargs: dict[str, Any] | None = None


class Request(SteeringFields, _Vllm):
    pass


def refs(value: Any) -> list[ProfileRef]:
    """From JSON, as a server gets it."""
    return Request.model_validate(json.loads(json.dumps({FIELD: value}))).profile_refs


def refusal(body: dict[str, Any]) -> tuple[str, str]:
    """Code and reason."""
    with pytest.raises(ValidationError) as caught:
        Request.model_validate(body)
    (error,) = caught.value.errors()
    assert error["type"] in list(ErrorCode)
    return error["type"], error["ctx"]["reason"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, []),
        ("a", [ProfileRef(name="a")]),
        ("a@sha256:0123abcd", [ProfileRef(name="a@sha256:0123abcd")]),
        ({"name": "a"}, [ProfileRef(name="a")]),
        ({"name": "a", "strength": None, "scope": None}, [ProfileRef(name="a")]),
        ({"name": "a", "strength": 0}, [ProfileRef(name="a", strength=0.0)]),
        ({"name": "a", "strength": -1.5, "scope": "prompt"}, [ProfileRef(name="a", strength=-1.5, scope=Scope.PROMPT)]),
        (["b", {"name": "a"}], [ProfileRef(name="b"), ProfileRef(name="a")]),
        (["a", "a"], [ProfileRef(name="a"), ProfileRef(name="a")]),
        ("n" * 256, [ProfileRef(name="n" * 256)]),
    ],
)
def test_accepts(value: Any, expected: list[ProfileRef]) -> None:
    assert refs(value) == expected


def test_absent_is_unsteered() -> None:
    assert Request.model_validate({"model": "m"}).profile_refs == []


@pytest.mark.parametrize(
    ("value", "code", "words"),
    [
        (7, ErrorCode.PROFILE_INVALID, "steering_profile is 7, expected a name"),
        (True, ErrorCode.PROFILE_INVALID, "steering_profile is True"),
        ([], ErrorCode.PROFILE_INVALID, "empty list"),
        (["a", None], ErrorCode.PROFILE_INVALID, "steering_profile is None"),
        ([["a"]], ErrorCode.PROFILE_INVALID, "steering_profile is ['a']"),
        ("", ErrorCode.PROFILE_INVALID, "name is '', expected 1 to 256"),
        ("n" * 257, ErrorCode.PROFILE_INVALID, "expected 1 to 256"),
        ({}, ErrorCode.PROFILE_INVALID, "name is None"),
        ({"name": 3}, ErrorCode.PROFILE_INVALID, "name is 3"),
        ({"name": "a", "strenght": 1}, ErrorCode.FIELD_UNKNOWN, "unknown key 'strenght'; known: name, strength, scope"),
        ({"name": "a", "strength": "1"}, ErrorCode.STRENGTH_INVALID, "strength is '1', expected a number"),
        ({"name": "a", "strength": True}, ErrorCode.STRENGTH_INVALID, "strength is True"),
        ({"name": "a", "strength": [1]}, ErrorCode.STRENGTH_INVALID, "strength is [1]"),
        ({"name": "a", "strength": math.nan}, ErrorCode.STRENGTH_INVALID, "strength is nan, expected a finite"),
        ({"name": "a", "strength": -math.inf}, ErrorCode.STRENGTH_INVALID, "strength is -inf"),
        ({"name": "a", "strength": 10**400}, ErrorCode.STRENGTH_INVALID, "strength is inf"),
        ({"name": "a", "scope": "answer"}, ErrorCode.SCOPE_INVALID, "one of: all, prompt, response, generation"),
        ({"name": "a", "scope": ["all"]}, ErrorCode.SCOPE_INVALID, "scope is ['all']"),
        ({"name": "a", "scope": ""}, ErrorCode.SCOPE_INVALID, "scope is ''"),
    ],
)
def test_refuses(value: Any, code: ErrorCode, words: str) -> None:
    found, reason = refusal({FIELD: value})
    assert found == code
    assert words in reason


def test_braces_in_a_message_are_text() -> None:
    assert "{reason} {0}" in refusal({FIELD: {"name": "a", "scope": "{reason} {0}"}})[1]


def test_messages_are_bounded() -> None:
    for value in ("x" * 10**6, list(range(10**5)), {"x" * 10**6: 1}):
        assert len(refusal({FIELD: {"name": "a", "strength": value}})[1]) < 300
        assert len(refusal({"steer" + "x" * 10**6: value})[1]) < 300


def parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        return None


def test_deep_nesting_is_refused_or_ignored() -> None:
    """As deep as the JSON parser goes, up to the interpreter's recursion limit."""
    depths = range(sys.getrecursionlimit() - 300, sys.getrecursionlimit())
    lists = [deep for depth in depths if (deep := parsed("[" * depth + "]" * depth)) is not None]
    objects = [deep for depth in depths if (deep := parsed('{"vllm_xargs":' * depth + "{}" + "}" * depth)) is not None]
    assert 0 < len(lists) < len(depths) and 0 < len(objects) < len(depths)
    for deep in lists[-12:]:
        for key in ("strength", "scope", "name"):
            with pytest.raises(ValidationError):
                SteeringFields.model_validate({FIELD: {"name": "a", key: deep}})
    for deep in objects[-12:]:
        deep["a"] = 1
        assert steering_key(deep, ()) is None


@pytest.mark.parametrize(
    "key",
    [
        *("steering", "steer", "Steering_Profile", "steering_profle", "steering-profile", "steeringProfile"),
        *("stearing_profile", "sterring_profile", " steering_profile", "steering_profile ", "STEERING_PROFILE"),
        *("steering_strength", "steered", "x_steering_profile"),
    ],
)
def test_misspelt_keys_are_refused_everywhere(key: str) -> None:
    code, reason = refusal({key: "a"})
    assert code == ErrorCode.FIELD_UNKNOWN
    assert repr(key) in reason and "did you mean 'steering_profile'?" in reason
    for parent in ("vllm_xargs", "sampling_params", "extra_args", "extra_body"):
        assert repr(f"{parent}.{key}") in refusal({parent: {"other": 1, key: "a"}})[1]
    assert steering_key({"sampling_params": {"extra_args": {key: 1}}}, ()) == f"sampling_params.extra_args.{key}"


def test_the_right_key_in_the_wrong_place() -> None:
    assert "vllm_xargs.steering_profile" in refusal({"vllm_xargs": {FIELD: "a"}})[1]


@pytest.mark.parametrize("key", ["store", "stream", "steps", "profile", "user", "service_tier", "system_profile", "s"])
def test_other_unknown_keys_are_vllms_affair(key: str) -> None:
    Request.model_validate({key: "a", "vllm_xargs": {key: 1}})


def test_declared_fields_are_known() -> None:
    assert steering_key({"steering_note": 1}, {"steering_note"}) is None
    assert steering_key({"vllm_xargs": {"steering_note": 1}}, {"steering_note"}) == "vllm_xargs.steering_note"


def test_every_field_of_vllm_passes() -> None:
    """Names that OpenAI clients send must not look like a slip of the pen."""
    for name in ("prompt_logprobs", "response_format", "reasoning_effort", "stop_token_ids", "structured_outputs"):
        assert steering_key({name: 1}, ()) is None


def test_schema_shows_the_field() -> None:
    shown = Request.model_json_schema()
    described = shown["properties"][FIELD]
    assert {"type": "string"} in described["anyOf"] and {"$ref": "#/$defs/ProfileRef"} in described["anyOf"]
    assert "receipt" in described["description"]
    assert set(shown["$defs"]["ProfileRef"]["properties"]) == {"name", "strength", "scope"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "strength", "scope", "x"]), inner, max_size=4)
    ),
    max_leaves=9,
)


@given(json_values)
def test_any_value_is_understood_or_refused_with_a_code(value: Any) -> None:
    try:
        found = Request.model_validate({FIELD: value}).profile_refs
    except ValidationError as error:
        assert [entry["type"] in list(ErrorCode) for entry in error.errors()] == [True]
        return
    assert (found == []) == (value is None)
    for ref in found:
        assert 0 < len(ref.name) <= 256
        assert ref.strength is None or (type(ref.strength) is float and math.isfinite(ref.strength))


@given(st.dictionaries(st.text(max_size=20), json_values, max_size=4))
def test_any_body_is_checked_without_an_exception(body: dict[str, Any]) -> None:
    name = steering_key(body, ())
    assert name is None or isinstance(name, str)


def test_so_many_unknown_keys_are_not_compared() -> None:
    """Each comparison takes as long as a step of the engine takes a hundredth of."""
    many = {f"{number:016d}": 0 for number in range(100_000)}
    assert steering_key(many) == f"{256:016d}"
    assert steering_key(many, known=many) is None
    assert steering_key({f"{number:040d}": 0 for number in range(1000)}) is None, "these are none that are misspelt"
    assert steering_key({"vllm_xargs": many}) == f"vllm_xargs.{256:016d}"
