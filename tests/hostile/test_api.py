"""Hostile requests: each is refused with a stable code, or steered as it asks; nothing hurts the server."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from artifacts.bundle import Bundle
from server.auth.rules import Access, access_of
from server.errors import ErrorCode

pytestmark = pytest.mark.engine

CHAT = {"model": "lab", "messages": [{"role": "user", "content": "What is 7 plus 5?"}], "max_tokens": 3}
TEXT = {"model": "lab", "prompt": "What is 7 plus 5?", "max_tokens": 3}
MESSAGE = {"model": "lab", "messages": CHAT["messages"], "max_tokens": 3}
RESPONSE = {"model": "lab", "input": "What is 7 plus 5?", "max_output_tokens": 3}
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": TEXT,
    "/v1/messages": MESSAGE,
    "/v1/responses": RESPONSE,
}
STEERED_PATHS = pytest.mark.parametrize("path", BODIES)

NOT_FOUND = "steering_profile_not_found"
INVALID = "steering_profile_invalid"
STRENGTH = "steering_strength_invalid"
SCOPE = "steering_scope_invalid"
UNKNOWN = "steering_field_unknown"
UNSUPPORTED = "steering_unsupported"
CONFLICT = "steering_profile_conflict"
TOO_MANY = "steering_too_many_profiles"


def assert_refused(response: Any, code: str, *parts: str, status: int = 400) -> None:
    """The refusal has the form of the API, the code, and a message that holds every part."""
    assert response.status_code == status, response.text
    assert response.json().get("type", "error") == "error"
    assert ("type" in response.json()) == response.request.url.path.startswith("/v1/messages")
    error = response.json()["error"]
    assert error["code"] == code, error
    assert isinstance(error["type"], str)
    assert isinstance(error["param"], str)
    for part in parts:
        assert part in error["message"]
    assert "x-steering-bundle" not in response.headers


@pytest.fixture(autouse=True)
def stays_healthy(eager: Any) -> Any:
    """Whatever a test sent, the server goes on answering."""
    yield
    assert eager.client.get("/health").status_code == 200
    assert eager.process.poll() is None
    assert eager.complete("Hello!", max_tokens=2)["usage"]["completion_tokens"] > 0


@STEERED_PATHS
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("profile", "code", "parts"),
    [
        (True, INVALID, ["True", "name"]),
        (False, INVALID, ["False"]),
        (0, INVALID, ["0"]),
        (1.5, INVALID, ["1.5"]),
        ("", INVALID, ["1 to 256"]),
        ([], INVALID, ["empty"]),
        ({}, INVALID, ["name is None"]),
        ([[]], INVALID, ["[]"]),
        ([["careful"]], INVALID, ["['careful']"]),
        ([None], INVALID, ["None"]),
        (["careful", 7], INVALID, ["7"]),
        ({"name": None}, INVALID, ["None"]),
        ({"name": ["careful"]}, INVALID, ["careful"]),
        ({"name": {"name": "careful"}}, INVALID, ["careful"]),
        ("a" * 257, INVALID, ["1 to 256"]),
        ("x" * 1_000_000, INVALID, ["1 to 256"]),
        ({"name": "careful", "strength": "0.5"}, STRENGTH, ["'0.5'"]),
        ({"name": "careful", "strength": True}, STRENGTH, ["True"]),
        ({"name": "careful", "strength": [0.5]}, STRENGTH, ["[0.5]"]),
        ({"name": "careful", "strength": {}}, STRENGTH, ["{}"]),
        ({"name": "careful", "strength": 10**400}, STRENGTH, ["finite"]),
        ({"name": "early", "strength": 4.001}, STRENGTH, ["4.001", "maximum of 4", "'early'"]),
        ({"name": "early", "strength": -1e300}, STRENGTH, ["maximum of 4"]),
        ([{"name": "early", "strength": 2.5}, {"name": "early", "strength": -2.5}], STRENGTH, ["5", "maximum of 4"]),
        ({"name": "careful", "scope": "All"}, SCOPE, ["'All'", "all, prompt, response, generation"]),
        ({"name": "careful", "scope": ""}, SCOPE, ["''"]),
        ({"name": "careful", "scope": ["all"]}, SCOPE, ["['all']"]),
        ({"name": "careful", "scope": 1}, SCOPE, ["1"]),
        ({"name": "careful", "strenght": 0.5}, UNKNOWN, ["'strenght'", "name, strength, scope"]),
        ({"profile": "careful"}, UNKNOWN, ["'profile'"]),
        ({"name": "careful", "{0}%s": 1}, UNKNOWN, ["{0}%s"]),
        ([{"name": "double", "strength": 0.5}] * 5, TOO_MANY, ["layer 4", "at most 8"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_steering_profile(eager: Any, path: str, streamed: bool, profile: Any, code: str, parts: list[str]) -> None:
    response = eager.post(path, {**BODIES[path], "stream": streamed, "steering_profile": profile})
    assert_refused(response, code, *parts)
    # A message is for people: it never repeats a megabyte.
    assert len(response.content) < 1000


@STEERED_PATHS
@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400"])
def test_strength_that_is_no_number(eager: Any, path: str, text: str) -> None:
    body = json.dumps({**BODIES[path], "steering_profile": {"name": "careful", "strength": 12345}})
    assert_refused(eager.post(path, body.replace("12345", text).encode()), STRENGTH, "finite")


@STEERED_PATHS
@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("carefull", "Near names: careful"),
        ("Careful", "Near names: careful"),
        ("careful ", "Near names: careful"),
        ("qqqq", "Served: careful, double"),
        ("../../etc/passwd", "Served"),
        ("\x00", "Served"),
        ("\ud800", "Served"),
        ("💉" * 200, "Served"),
        ("{reason}%s{0.__class__}", "Served"),
    ],
)
def test_unknown_profile(eager: Any, path: str, name: str, near: str) -> None:
    body = json.dumps({**BODIES[path], "steering_profile": name}).encode()
    assert_refused(eager.post(path, body), NOT_FOUND, near, status=404)
    body = json.dumps({**BODIES[path], "steering_profile": ["careful", {"name": name}]}).encode()
    assert_refused(eager.post(path, body), NOT_FOUND, near, status=404)


@STEERED_PATHS
def test_unknown_profile_in_the_model_name(eager: Any, path: str) -> None:
    response = eager.post(path, {**BODIES[path], "model": "lab@carefull"})
    assert_refused(response, NOT_FOUND, "careful", status=404)
    for model in ("lab@", "other@careful", "LAB@careful"):
        response = eager.post(path, {**BODIES[path], "model": model})
        assert response.status_code == 404
        assert "x-steering-bundle" not in response.headers


@STEERED_PATHS
def test_versions(eager: Any, bundles: dict[str, Bundle], path: str) -> None:
    digest = bundles["careful"].digest
    for version in (digest, digest[: len("sha256:") + 8]):
        response = eager.post(path, {**BODIES[path], "steering_profile": f"careful@{version}"})
        assert response.json()["steering"]["bundle"] == digest
    other = digest[:-1] + ("0" if digest[-1] != "0" else "1")
    for version in ("", other, digest[: len("sha256:") + 7], "sha256:", digest.removeprefix("sha256:"), digest.upper()):
        response = eager.post(path, {**BODIES[path], "steering_profile": f"careful@{version}"})
        assert_refused(response, NOT_FOUND, version, digest, status=404)
    response = eager.post(path, {**BODIES[path], "steering_profile": f"early@{digest}"})
    assert_refused(response, NOT_FOUND, bundles["early"].digest, status=404)


@STEERED_PATHS
def test_model_name_and_field_at_once(eager: Any, path: str) -> None:
    for profile in ("careful", "early", {"name": "careful", "strength": 0}):
        body = {**BODIES[path], "model": "lab@careful", "steering_profile": profile}
        assert_refused(eager.post(path, body), CONFLICT, "lab@careful")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_beam_search(eager: Any, path: str) -> None:
    body = {**BODIES[path], "use_beam_search": True, "n": 2, "steering_profile": "careful"}
    assert_refused(eager.post(path, body), UNSUPPORTED, "use_beam_search")


# What means steering but is not `steering_profile`, where vLLM would ignore it or hand it to the engine.
MISSPELT: list[dict[str, Any]] = [
    {"steering_profle": "careful"},
    {"steering_profiles": ["careful"]},
    {"steering": "careful"},
    {"steer": True},
    {"Steering_Profile": "careful"},
    {" steering_profile": "careful"},
    {"steering-profile": "careful"},
    {"steeringProfile": "careful"},
    {"steering_strength": 1},
    {"stearing_profile": "careful"},
    {"x_steering_profile": "careful"},
    {"vllm_xargs": {"steering": "careful"}},
    {"vllm_xargs": {"steering": [1, 2]}},
    {"vllm_xargs": {"steering_profile": "careful"}},
    {"vllm_xargs": {"Steering": '{"id": "x", "terms": [["sha256:0", 1.0, "all"]]}'}},
    {"sampling_params": {"extra_args": {"steering": {"id": "x", "terms": []}}}},
    {"sampling_params": {"steering": {}}},
    {"extra_args": {"steering": {"id": "x", "terms": [["a", 1, "all"]]}}},
    {"extra_body": {"steering_profile": "careful"}},
]


@STEERED_PATHS
@pytest.mark.parametrize("fields", MISSPELT, ids=str)
def test_misspelt_field(eager: Any, path: str, fields: dict[str, Any]) -> None:
    (name,) = fields
    assert_refused(eager.post(path, {**BODIES[path], **fields}), UNKNOWN, name, "steering_profile")
    # Beside the right field it is as suspect as alone.
    body = {**BODIES[path], "steering_profile": "careful", **fields}
    assert_refused(eager.post(path, body), UNKNOWN, name)


@STEERED_PATHS
def test_escaped_keys_are_the_same_keys(eager: Any, path: str) -> None:
    start = json.dumps(BODIES[path])[:-1]
    response = eager.post(path, (start + r', "\u0073teering_profile": "careful"}').encode())
    assert response.json()["steering"]["profile"] == "careful"
    assert_refused(eager.post(path, (start + r', "\u0073teering_profle": "careful"}').encode()), UNKNOWN)
    assert_refused(eager.post(path, (start + r', "vllm_xargs": {"s\u0074eering": 1}}').encode()), UNKNOWN)


@STEERED_PATHS
def test_other_fields_pass(eager: Any, path: str) -> None:
    for fields in ({"user": "me"}, {"vllm_xargs": {"note": "x"}}, {"profile": "careful"}, {"unknown": {"steering": 1}}):
        response = eager.post(path, {**BODIES[path], **fields})
        assert response.status_code == 200
        assert "steering" not in response.json()


def other_routes(server: Any) -> list[str]:
    """Every route of vLLM's but those that steer which takes a body."""
    paths = server.client.get("/openapi.json").json()["paths"]
    return [
        path
        for path, methods in paths.items()
        if {"post", "put", "patch"} & set(methods) and path not in BODIES and not path.startswith("/v1/steering/")
    ]


def test_routes_that_cannot_steer_say_so(eager: Any) -> None:
    routes = other_routes(eager)
    assert {"/v1/messages/count_tokens", "/invocations", "/v1/chat/completions/batch"} <= set(routes)
    for path in routes:
        if access_of("POST", path) is Access.WRITE:
            # Without any key it changes nothing, steered or not.
            assert eager.post(path, {}).json()["error"]["code"] == ErrorCode.ADMIN_DISABLED.value
            continue
        for fields in ({"steering_profile": "careful"}, *MISSPELT):
            body = {**CHAT, "input": "What is 7 plus 5?", "prompt": "x", "token_ids": [5], **fields}
            response = eager.post(path, body)
            assert_refused(response, UNSUPPORTED, path, next(iter(fields)), "/v1/chat/completions")


def test_the_guard_cannot_be_walked_around(eager: Any) -> None:
    body = json.dumps({**CHAT, "input": "What is 7 plus 5?", "steering_profile": "careful"}).encode()
    # These two take no body and generate nothing.
    for path in set(other_routes(eager)) - {"/ping", "/is_scaling_elastic_ep"}:
        for content_type in ("multipart/form-data", "text/plain", "application/json; charset=utf-16", ""):
            for url in (path, f"{path}/", f"/{path}", f"{path}?a=b"):
                headers = {"content-type": content_type}
                response = eager.client.post(url, content=body, headers=headers, follow_redirects=True)
                assert 400 <= response.status_code < 500, (url, content_type, response.text)
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        response = eager.post("/invocations", body.decode().encode(encoding))
        assert 400 <= response.status_code < 500


@pytest.mark.parametrize("model", ["lab@careful", "lab@nothing"])
def test_routes_that_cannot_steer_refuse_the_profiles_models(eager: Any, model: str) -> None:
    bodies = {
        "/tokenize": {"prompt": "What is 7 plus 5?"},
        "/v1/chat/completions/batch": {"messages": [CHAT["messages"]]},
        "/invocations": CHAT,
    }
    for path, body in bodies.items():
        assert eager.post(path, {**body, "model": "lab"}).status_code == 200
        assert_refused(eager.post(path, {**body, "model": model}), UNSUPPORTED, path, model)
    # vLLM reads an adapter's name, which becomes the model's, off this header.
    header = {"X-Amzn-SageMaker-Adapter-Identifier": model}
    assert eager.client.post("/invocations", json={**CHAT, "model": "lab"}, headers=header).status_code == 404


@STEERED_PATHS
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"steering_profile"',
        b"{",
        b'{"steering_profile": "careful"}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"steering_profile": ' + b"[" * 100_000,
        b'{"steering_profile":' * 50_000,
        b'{"model": "lab", "prompt": "x", "messages": [], "steering_profile": "careful"',
    ],
    ids=lambda body: repr(body[:30]),
)
def test_bodies_that_are_no_request(eager: Any, path: str, body: bytes) -> None:
    for url in (path, "/tokenize"):
        assert 400 <= eager.post(url, body).status_code < 500


@STEERED_PATHS
def test_errors_of_a_steered_request_are_vllms_own(eager: Any, path: str) -> None:
    errors: list[dict[str, Any]] = [{"temperature": -1}, {"model": "other"}, {"vllm_xargs": {"x": {}}}]
    errors += {
        "/v1/responses": [{"top_p": 2}, {"previous_response_id": "none"}],
        "/v1/messages": [{"max_tokens": 100_000}, {"max_tokens": 0}],
    }.get(path, [{"max_tokens": 100_000}, {"n": 0}, {"logprobs": -7}])
    for fields in errors:
        steered = eager.post(path, {**BODIES[path], **fields, "steering_profile": "careful"})
        unsteered = eager.post(path, {**BODIES[path], **fields})
        assert 400 <= steered.status_code == unsteered.status_code < 500
        assert steered.json() == unsteered.json()


def receipt_of(response: Any, streamed: bool) -> Any:
    """The one receipt of an answer; None if it has none."""
    if not streamed:
        return response.json().get("steering")
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    receipts = [
        part["steering"] for event in events for part in (event, event.get("response", {})) if "steering" in part
    ]
    assert len(receipts) <= 1
    return receipts[0] if receipts else None


names = st.sampled_from(["careful", "early", "late", "every", "double"]) | st.text(max_size=20)
strengths = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.floats())
scopes = st.none() | st.sampled_from(["all", "prompt", "response", "generation"]) | st.text(max_size=5) | st.integers()
refs = st.fixed_dictionaries({"name": names}, optional={"strength": strengths, "scope": scopes})
near_misses = names | refs | st.lists(names | refs, max_size=6)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(profile=near_misses | json_values, path=st.sampled_from(sorted(BODIES)), streamed=st.booleans())
def test_garbage(eager: Any, profile: Any, path: str, streamed: bool) -> None:
    body = json.dumps({**BODIES[path], "stream": streamed, "steering_profile": profile}).encode()
    response = eager.post(path, body)
    if response.status_code == 200:
        receipt = receipt_of(response, streamed)
        assert (receipt is None) == (profile is None)
        if isinstance(profile, list):
            assert len(receipt) == len(profile)
    else:
        assert response.status_code in (400, 404)
        assert response.json()["error"]["code"].startswith("steering_")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.text(max_size=20).map("steer{}".format), value=json_values, path=st.sampled_from(sorted(BODIES)))
def test_no_key_that_begins_with_steer_is_ignored(eager: Any, key: str, value: Any, path: str) -> None:
    body = json.dumps({**BODIES[path], key: value}).encode()
    assert_refused(eager.post(path, body), UNKNOWN)
    assert_refused(eager.post("/invocations", body), UNSUPPORTED)
