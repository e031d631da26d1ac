"""Access over every route of a running server: each key opens what its role says, and nothing else."""

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from server.auth.rules import Access, access_of, explicit

pytestmark = pytest.mark.engine

FLAG_KEY, ADMIN_KEY = "flag-key-0123456789", "admin-key-0123456789"
FILE_KEYS: list[dict[str, Any]] = [
    {"name": role, "role": role, "key": f"{role}-key-0123456789"} for role in ("inference", "read", "write")
]
CLINIC = {
    "name": "clinic",
    "role": "inference",
    "sha256": hashlib.sha256(b"clinic-key-0123456789").hexdigest(),
    "profiles": ["care*"],
    "maximum_strength": 0.5,
}
# By name: the key, and the access levels that it has.
CALLERS: dict[str, tuple[str | None, set[Access]]] = {
    "no key": (None, {Access.OPEN}),
    "wrong": ("wrong-key-0123456789", {Access.OPEN}),
    "inference": (FILE_KEYS[0]["key"], {Access.OPEN, Access.KNOWN, Access.INFERENCE}),
    "flag": (FLAG_KEY, {Access.OPEN, Access.KNOWN, Access.INFERENCE}),
    "read": (FILE_KEYS[1]["key"], {Access.OPEN, Access.KNOWN, Access.READ}),
    "write": (FILE_KEYS[2]["key"], set(Access)),
    "admin": (ADMIN_KEY, set(Access)),
}
# What the interactive reference does not list.
HIDDEN = [
    *(("GET", "/docs"), ("GET", "/redoc"), ("GET", "/openapi.json"), ("GET", "/metrics"), ("GET", "/made/up")),
    *(("POST", "/made/up"), ("POST", "/v1/models"), ("GET", "/v1/steering"), ("PATCH", "/v1/steering/profiles/x")),
]
# vLLM's routes that change the engine are only shown to be closed: open, they would do it.
_CHANGES_THE_ENGINE = re.compile(r"/v1/steering/|/made/|/v1/models")
_ROTATION_S = 10


def bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.yaml"


@pytest.fixture(scope="module")
def write_keys(keys_file: Path) -> Callable[[object], None]:
    """Replace the file of keys."""

    def write(content: object) -> None:
        temporary = keys_file.with_suffix(".new")
        temporary.write_text(content if isinstance(content, str) else yaml.safe_dump({"keys": content}))
        temporary.chmod(0o600)
        temporary.replace(keys_file)

    return write


@pytest.fixture(scope="module")
def server(
    start_server: Callable[..., Any],
    keys_file: Path,
    write_keys: Callable[[object], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    """A server with keys of every kind and all of vLLM's routes."""
    write_keys([*FILE_KEYS, CLINIC])
    flags = ("--steering-keys", str(keys_file), "--api-key", FLAG_KEY, "--enforce-eager", "--max-num-seqs", "8")
    # Few enough that requests soon come faster, however slow the machine is.
    flags += ("--steering-write-rate", "10")
    registry = ("--steering-registry", str(tmp_path_factory.mktemp("registry")))
    registry += ("--steering-bundle-root", str(tmp_path_factory.mktemp("root")))
    environment = {"EXPERTSTEER_ADMIN_KEY": ADMIN_KEY, "VLLM_SERVER_DEV_MODE": "1"}
    with start_server("access", *flags, *registry, **environment) as server:
        yield server


@pytest.fixture(scope="module")
def routes(server: Any) -> list[tuple[str, str]]:
    paths = server.client.get("/openapi.json").json()["paths"]
    listed = [(method.upper(), path) for path, methods in paths.items() for method in methods]
    assert {("POST", "/sleep"), ("POST", "/invocations"), ("POST", "/collective_rpc")} <= set(listed)
    return sorted(listed)


def call(server: Any, method: str, path: str, key: str | None) -> httpx.Response:
    concrete = path.replace("{digest}", f"sha256:{'0' * 64}")
    concrete = re.sub(r"{\w+}", "nobody", concrete)
    body = {"json": {}} if method in ("POST", "PUT", "PATCH") else {}
    response: httpx.Response = server.client.request(method, concrete, headers=bearer(key), **body)
    return response


def test_every_route_has_a_rule(routes: list[tuple[str, str]]) -> None:
    missing = [route for route in routes if not explicit(*route)]
    assert not missing, f"add these to server/auth/rules.py: {missing}"


@pytest.mark.parametrize("caller", CALLERS)
def test_matrix(server: Any, routes: list[tuple[str, str]], caller: str) -> None:
    key, levels = CALLERS[caller]
    wrong, num_asked = [], 0
    for method, path in [*routes, *HIDDEN]:
        access = access_of(method, path)
        if access in levels and access is Access.WRITE and not _CHANGES_THE_ENGINE.match(path):
            continue
        response = call(server, method, path, key)
        num_asked += 1
        found = response.status_code
        if access in levels:
            is_right = found not in (401, 403) and (found < 500 or found == HTTPStatus.NOT_IMPLEMENTED)
        else:
            is_right = found == (401 if caller in ("no key", "wrong") else 403)
            is_right = is_right and response.json()["error"]["code"] in ("invalid_api_key", "steering_access_denied")
        if not is_right:
            wrong.append((method, path, access.value, found, response.text[:200]))
    assert not wrong
    assert num_asked > 35
    assert server.client.get("/health").status_code == 200


def test_key_of_other_clients(server: Any) -> None:
    """Anthropic's clients send theirs in a header of its own."""
    body = {"model": "lab", "max_tokens": 2, "messages": [{"role": "user", "content": "What is 7 plus 5?"}]}
    answer = server.client.post("/v1/messages", json=body, headers={"x-api-key": FLAG_KEY})
    assert answer.status_code == 200, answer.text
    refused = server.client.post("/v1/messages", json=body, headers={"x-api-key": "wrong"})
    assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")


@pytest.mark.parametrize(
    "path",
    [
        *("//v1/steering/bundles", "/v1//steering/bundles", "/V1/STEERING/bundles", "/v1/steering/%62undles"),
        *("/v1/steering/bundles%0a", "/v1/steering/bundles%2f", "/health/%2e%2e/v1/steering/bundles", "/%2e/sleep"),
        *(
            "/health/..%2fsleep",
            "/sleep%0a",
            "/sleep;x",
            "/v1/models/..%2f..%2fsleep",
            "/docs%2f..%2fsleep",
            "/sleep%00",
        ),
    ],
)
def test_tricks_with_paths(server: Any, path: str) -> None:
    """Sent as they are, without the tidying that a client does."""
    for key in (None, CALLERS["inference"][0], CALLERS["read"][0]):
        request = httpx.Request("POST", server.url, headers={**bearer(key), "content-type": "application/json"})
        request.extensions["target"] = path.encode()
        with httpx.Client(trust_env=False, timeout=30) as client:
            response = client.send(request)
        assert response.status_code in (401, 403), response.text
    assert server.client.get("/is_sleeping", headers=bearer(ADMIN_KEY)).json() == {"is_sleeping": False}


def steered(server: Any, key: str | None, profile: object) -> httpx.Response:
    body = {"model": "lab", "prompt": "What is 7 plus 5?", "max_tokens": 2, "steering_profile": profile}
    response: httpx.Response = server.client.post("/v1/completions", json=body, headers=bearer(key))
    return response


def test_limits_of_an_inference_key(server: Any) -> None:
    clinic = "clinic-key-0123456789"
    assert steered(server, clinic, {"name": "careful", "strength": 0.5}).status_code == 200
    assert steered(server, clinic, {"name": "careful", "strength": -0.5}).status_code == 200
    assert 400 <= steered(server, clinic, {"name": "careful", "strength": -0.6}).status_code < 500
    for other in ("early", {"name": "early", "strength": 0.1}, [{"name": "careful", "strength": 0.1}, "early"]):
        assert 400 <= steered(server, clinic, other).status_code < 500
        assert steered(server, FLAG_KEY, other).status_code == 200
    seen = server.client.get("/v1/steering/profiles", headers=bearer(clinic)).json()["profiles"]
    assert [profile["name"] for profile in seen] == ["careful"]
    models = server.client.get("/v1/models", headers=bearer(clinic)).json()["data"]
    assert {card["id"] for card in models} == {"lab", "lab@careful"}


def test_rotation(server: Any, write_keys: Callable[[object], None]) -> None:
    """A new key counts and an old one does not, without a restart; a broken file changes nothing."""

    def status(key: str | None) -> int:
        code: int = server.client.get("/v1/steering/status", headers=bearer(key)).status_code
        return code

    def within(key: str, code: int) -> bool:
        deadline = time.monotonic() + _ROTATION_S
        while status(key) != code and time.monotonic() < deadline:
            time.sleep(0.2)
        return status(key) == code

    next_key = {"name": "next", "role": "read", "key": "next-key-0123456789"}
    read_key = FILE_KEYS[1]["key"]
    try:
        write_keys([*FILE_KEYS, next_key])
        assert within(next_key["key"], 200)
        assert status(read_key) == 200
        write_keys([next_key])
        assert within(read_key, 401)
        write_keys("keys: [")
        time.sleep(2)
        assert status(next_key["key"]) == 200
        assert status(ADMIN_KEY) == 200
        assert server.log.read_text(errors="replace").count("The keys stay as they were") == 1
    finally:
        write_keys([*FILE_KEYS, CLINIC])
        assert within(read_key, 200)
    text = server.log.read_text(errors="replace")
    assert not any(key in text for key, _ in CALLERS.values() if key is not None and "wrong" not in key)


def test_writes_are_limited(server: Any) -> None:
    """The last of the file: it uses up what the write key may do."""
    codes = server.map(lambda _: call(server, "PUT", "/v1/steering/profiles/{name}", FILE_KEYS[2]["key"]), range(400))
    statuses = [response.status_code for response in codes]
    assert set(statuses) <= {400, 404, 422, 429}
    assert statuses.count(429) > 100
    limited = next(response for response in codes if response.status_code == 429)
    assert limited.json()["error"]["code"] == "steering_rate_limited"
    assert int(limited.headers["retry-after"]) >= 1
    assert call(server, "GET", "/v1/steering/status", FILE_KEYS[2]["key"]).status_code == 200
    assert call(server, "PUT", "/v1/steering/profiles/{name}", ADMIN_KEY).status_code != 429
