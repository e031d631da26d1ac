"""Access: rules, the middleware that applies them, tricks with paths, and the rate limit."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi import FastAPI, WebSocket
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from server.auth import keys as keys_module
from server.auth.identity import hash_key
from server.auth.keys import KeyRing
from server.auth.middleware import AccessMiddleware, identity_of
from server.auth.rate import RateLimit
from server.auth.rules import Access, access_of, explicit

ROUTES = {
    "open": ("GET", "/health"),
    "known": ("GET", "/v1/models"),
    "inference": ("POST", "/v1/chat/completions"),
    "read": ("GET", "/v1/steering/status"),
    "write": ("PUT", "/v1/steering/profiles/medical"),
    "control": ("POST", "/sleep"),
    "unknown": ("POST", "/made/up"),
}
KEYS = {role: f"{role}-key-0123456789" for role in ("inference", "read", "write")}
WRITERS = ("write", "control", "unknown")
# Which routes each kind of key opens.
OPENS = {
    "inference": {"open", "known", "inference"},
    "read": {"open", "known", "read"},
    "write": set(ROUTES),
    None: {"open"},
    "wrong": {"open"},
}


async def echo(request: Request) -> JSONResponse:
    return JSONResponse({"name": identity_of(request.scope).name, "path": request.url.path})


def make_client(ring: KeyRing, root_path: str = "", **bounds: Any) -> TestClient:
    """A server with every route that there could be."""
    methods = ["GET", "POST", "PUT", "DELETE"]
    app = FastAPI(root_path=root_path, openapi_url=None)
    app.user_middleware = [Middleware(AccessMiddleware, keys=ring, limit=RateLimit(**bounds))]

    @app.websocket("/v1/realtime")
    @app.websocket("/elsewhere")
    async def speak(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text(identity_of(socket.scope).name)
        await socket.close()

    app.router.routes.append(Route("/{path:path}", echo, methods=methods))
    return TestClient(app)


@pytest.fixture
def write_keys(tmp_path: Path) -> Callable[[dict[str, str]], Path]:
    def write(keys: dict[str, str]) -> Path:
        path = tmp_path / "keys.yaml"
        entries = [{"name": role, "sha256": hash_key(key).hex(), "role": role} for role, key in keys.items()]
        path.write_text(yaml.safe_dump({"keys": entries}))
        path.chmod(0o600)
        return path

    return write


@pytest.fixture
def client(write_keys: Callable[[dict[str, str]], Path]) -> Iterator[TestClient]:
    with make_client(KeyRing.load(write_keys(KEYS))) as client:
        yield client


def bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"authorization": f"Bearer {KEYS.get(key, key)}"}


@pytest.mark.parametrize("key", OPENS)
@pytest.mark.parametrize("kind", ROUTES)
def test_matrix(client: TestClient, key: str | None, kind: str) -> None:
    response = client.request(*ROUTES[kind], headers=bearer(key))
    if kind in OPENS[key]:
        assert response.status_code == 200
        assert response.json()["name"] == ("anonymous" if kind == "open" else key)
        return
    error = response.json()["error"]
    if key in KEYS:
        assert (response.status_code, error["code"], error["type"]) == (
            *(403, "steering_access_denied"),
            "PermissionDeniedError",
        )
        assert f"{key!r}" in error["message"] and ROUTES[kind][1] in error["message"]
    else:
        assert (response.status_code, error["code"], error["type"]) == (401, "invalid_api_key", "AuthenticationError")
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ({"authorization": f"bearer {KEYS['write']}"}, "write"),
        ({"authorization": f"BEARER   {KEYS['write']} "}, "write"),
        ({"x-api-key": KEYS["read"]}, "read"),
        ({"authorization": "Basic b3BzOm9wcw==", "x-api-key": KEYS["read"]}, "read"),
        # The one that is asked first decides: a bad one is not made good by another.
        ({"authorization": f"Bearer {KEYS['read']}", "x-api-key": KEYS["write"]}, "read"),
        ({"authorization": "Bearer wrong", "x-api-key": KEYS["write"]}, None),
        ({"authorization": KEYS["write"]}, None),
        ({"authorization": f"Basic {KEYS['write']}"}, None),
        ({"authorization": "Bearer "}, None),
        ({"authorization": "Bearer"}, None),
        ({"authorization": f"Bearer {KEYS['write']}{'x' * 5000}"}, None),
        ({"authorization": "Bearer \u00e9\u00ff".encode("latin-1")}, None),
        ({"cookie": f"authorization=Bearer {KEYS['write']}"}, None),
    ],
)
def test_where_the_key_is(client: TestClient, headers: dict[str, Any], name: str | None) -> None:
    response = client.get("/v1/steering/status", headers=headers)
    assert response.status_code == (401 if name is None else 200)
    assert name is None or response.json()["name"] == name


def test_key_in_the_query_does_not_count(client: TestClient) -> None:
    assert client.get("/v1/steering/status", params={"api_key": KEYS["write"]}).status_code == 401


def test_without_any_key() -> None:
    with make_client(KeyRing.load(None)) as client:
        for route in ROUTES.values():
            response = client.request(*route)
            if access_of(*route) is Access.WRITE and explicit(*route):
                assert response.status_code == 403
                assert response.json()["error"]["code"] == "steering_admin_disabled"
            else:
                assert (response.status_code, response.json()["name"]) == (200, "anonymous")


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/sleep"), ("POST", "/v1/load_lora_adapter"), ("GET", "/server_info")]
)
def test_without_any_key_the_engine_cannot_be_changed(method: str, path: str) -> None:
    with make_client(KeyRing.load(None)) as client:
        response = client.request(method, path)
        assert (response.status_code, response.json()["error"]["code"]) == (403, "steering_admin_disabled")
        # The router knows better what there is not than a key could tell.
        assert client.request(method, "/there-is-no-such-route").status_code == 200


def test_without_a_write_key() -> None:
    """As with vLLM's `--api-key` alone: its control routes are closed too."""
    with make_client(KeyRing.load(None, [KEYS["inference"]])) as client:
        for kind, route in ROUTES.items():
            response = client.request(*route, headers=bearer("inference"))
            if kind in WRITERS:
                assert response.status_code == 403
                assert response.json()["error"]["code"] == "steering_admin_disabled"
            elif kind == "read":
                assert response.json()["error"]["code"] == "steering_access_denied"
            else:
                assert response.status_code == 200
            assert client.request(*route).status_code == (200 if kind == "open" else 401)


def test_rotation_needs_no_restart(
    write_keys: Callable[[dict[str, str]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys_module, "CHECK_INTERVAL_S", 0.0)
    with make_client(KeyRing.load(write_keys(KEYS))) as client:
        assert client.get("/v1/models", headers=bearer("read")).status_code == 200
        write_keys({"inference": KEYS["inference"]})
        assert client.get("/v1/models", headers=bearer("read")).status_code == 401
        assert client.get("/v1/models", headers=bearer("inference")).status_code == 200


# As the server sees them: decoded.
TRICKS = [
    *("//v1/steering/profiles/medical", "/v1//steering/profiles/medical", "/v1/steering//profiles/medical"),
    *("/V1/steering/profiles/medical", "/v1/Steering/Profiles/medical", "/v1/steering/profiles/medical/"),
    *("/v1/steering/profiles/medical//", "/./v1/steering/profiles/medical", "/health/../v1/steering/profiles/medical"),
    *("/v1%2fsteering/profiles/medical", "/v1/steering/profiles/a%2fb", "/v1/steering/profiles/a/b", "/v1/models;x"),
    *("/v1/steering/profiles/medical\0", "/v1/steering/profiles/medical\n", "/v1/models\n", "/v1/models\0"),
    *("/v1/models?x", "/v1/models/../steering/bundles", "/v1/models/", "/health\n", "/health/", "//health", "/sleep\n"),
    *("/v1/steering/profiles\\medical", "/v1/steering", "/v1/steering/", "/v1/steeringx", "/", "//", "", "/sleep/"),
    *("/v1/steering/profiles/{name}", "/v1/steering/status\r", "/v1/steering/\u017ftatus", "/\uff56\uff11/models"),
    *("/v1/models", "/v1/steering/profiles", "/v1/steering/status", "/health", "/sleep"),
    *("/v1/steering/profiles\n", "/v1/steering/profiles/\n", "/v1/steering/profiles/", "/v1/steering/bundles\n"),
]
READS = ("GET", "HEAD")


def real_app(ring: KeyRing, root_path: str) -> FastAPI:
    """Real routes, each of which answers with the level that it belongs to."""
    app = FastAPI(root_path=root_path)
    app.user_middleware = [Middleware(AccessMiddleware, keys=ring, limit=RateLimit(1e6, 1_000_000))]
    levels = {
        "/health": ("open", "unknown"),
        "/v1/models": ("known", "unknown"),
        "/v1/steering/profiles": ("known", "write"),
        "/v1/steering/status": ("read", "write"),
        "/v1/steering/profiles/{name}": ("read", "write"),
        "/v1/steering/bundles": ("read", "write"),
        "/sleep": ("control", "control"),
    }

    def answer(level: str) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> JSONResponse:
            return JSONResponse(None, headers={"level": level})

        return endpoint

    for path, (reading, writing) in levels.items():
        app.router.routes.append(Route(path, answer(reading), methods=list(READS)))
        app.router.routes.append(Route(path, answer(writing), methods=["POST", "PUT", "DELETE", "PATCH"]))
    return app


async def status_and_level(app: FastAPI, method: str, path: str, key: str | None) -> tuple[int, str | None]:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"h"), *((name.encode(), value.encode()) for name, value in bearer(key).items())]
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers, "scheme": "http"}
    await app({**scope, "server": ("h", 80), "http_version": "1.1"}, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"]).get(b"level", b"").decode() or None


@pytest.mark.parametrize("root_path", ["", "/proxy", "/v1"])
async def test_no_path_reaches_a_route_of_another_level(
    write_keys: Callable[[dict[str, str]], Path], root_path: str
) -> None:
    """Whoever gets through had a key for the route that answered, whatever the path looks like."""
    app = real_app(KeyRing.load(write_keys(KEYS)), root_path)
    reached = set()
    for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "get", "TRACE"):
        for path, key in itertools.product(TRICKS, (None, "wrong", *KEYS)):
            for whole in {path, root_path + path}:
                status, level = await status_and_level(app, method, whole, key)
                where = f"{method} {whole!r} with {key}: {status} {level}"
                assert status in (200, 307, 401, 403, 404, 405), where
                assert level is None or level in OPENS[key], where
                reached.add((key, level))
    # It did get through to every level, with the key for it.
    assert {("write", level) for level in ("open", "known", "read", "write", "control")} <= reached
    assert {("read", "read"), ("inference", "known")} <= reached


def test_root_path_is_left_out(write_keys: Callable[[dict[str, str]], Path]) -> None:
    with make_client(KeyRing.load(write_keys(KEYS)), "/proxy") as client:
        for prefix in ("", "/proxy"):
            assert client.get(f"{prefix}/health").status_code == 200
            assert client.get(f"{prefix}/v1/steering/status", headers=bearer("read")).status_code == 200
            assert client.put(f"{prefix}/v1/steering/profiles/a", headers=bearer("read")).status_code == 403
        assert client.get("/proxyx/health").status_code == 401


@pytest.mark.parametrize(
    ("method", "path", "access"),
    [
        ("HEAD", "/v1/models", Access.KNOWN),
        ("OPTIONS", "/v1/steering/bundles", Access.OPEN),
        ("GET", "/v1/models/", Access.KNOWN),
        ("GET", "/v1/steering/profiles/", Access.KNOWN),
        ("GET", "/v1/steering/profiles/a", Access.READ),
        ("GET", "/v1/steering/profiles/a/b", Access.WRITE),
        ("POST", "/v1/models", Access.WRITE),
        ("POST", "/v1/steering/profiles", Access.WRITE),
        ("GET", "/v1/steering/made-up", Access.WRITE),
        ("get", "/v1/models", Access.WRITE),
        ("WEBSOCKET", "/v1/realtime", Access.INFERENCE),
        ("WEBSOCKET", "/v1/models", Access.WRITE),
        ("GET", "/metrics/", Access.OPEN),
        ("GET", "/metrics/x", Access.WRITE),
        ("GET", "/metricsx", Access.WRITE),
        ("GET", "", Access.WRITE),
        ("GET", "/", Access.WRITE),
    ],
)
def test_rules(method: str, path: str, access: Access) -> None:
    assert access_of(method, path) is access


def test_explicit() -> None:
    assert explicit("GET", "/v1/steering/profiles/{name}")
    assert explicit("HEAD", "/health")
    assert explicit("POST", "/sleep")
    assert not explicit("POST", "/made/up")
    assert not explicit("PATCH", "/v1/steering/profiles/{name}")


def test_preflight_needs_no_key(client: TestClient) -> None:
    assert client.options("/v1/steering/bundles").status_code == 405


@pytest.mark.parametrize("key", OPENS)
def test_websockets(client: TestClient, key: str | None) -> None:
    for path, opens in (("/v1/realtime", {"inference", "write"}), ("/elsewhere", {"write"})):
        if key in opens:
            with client.websocket_connect(path, headers=bearer(key)) as socket:
                assert socket.receive_text() == key
        else:
            with pytest.raises(WebSocketDisconnect) as caught, client.websocket_connect(path, headers=bearer(key)):
                pass
            assert caught.value.code == 1008


async def test_refusal_reads_nothing_of_the_body(write_keys: Callable[[dict[str, str]], Path]) -> None:
    sent = []

    async def receive() -> Any:
        raise AssertionError("the body was read")

    async def send(message: Any) -> None:
        sent.append(message)

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("the application was called")

    guard = AccessMiddleware(inner, keys=KeyRing.load(write_keys(KEYS)))
    await guard({"type": "http", "method": "POST", "path": "/v1/steering/bundles", "headers": []}, receive, send)
    assert sent[0]["status"] == 401


class TestRate:
    """Writes are limited, for each identity."""

    def test_writes(self, write_keys: Callable[[dict[str, str]], Path]) -> None:
        ring = KeyRing.load(write_keys(KEYS), [], "root-key-0123456789")
        with make_client(ring, rate_per_s=0.01, burst=2) as client:
            put = ROUTES["write"]
            assert [client.request(*put, headers=bearer("write")).status_code for _ in range(3)] == [200, 200, 429]
            refused = client.request(*put, headers=bearer("write"))
            assert refused.json()["error"]["code"] == "steering_rate_limited"
            assert refused.json()["error"]["type"] == "RateLimitError"
            assert 90 <= int(refused.headers["retry-after"]) <= 100
            # Reading, requests to the model, control routes and other keys go on; no others' writes count.
            for kind in ("known", "inference", "read", "control"):
                assert client.request(*ROUTES[kind], headers=bearer("write")).status_code == 200
            assert client.request(*put, headers=bearer("root-key-0123456789")).status_code == 200
            assert client.request(*put, headers=bearer("read")).status_code == 403

    def test_bucket_fills(self) -> None:
        now = [0.0]
        limit = RateLimit(2.0, 3, clock=lambda: now[0])
        assert [limit.take("a") for _ in range(4)] == [0, 0, 0, 0.5]
        now[0] = 0.25
        assert limit.take("a") == pytest.approx(0.25)
        now[0] = 0.5
        assert [limit.take("a"), limit.take("a")] == [0, pytest.approx(0.5)]
        now[0] = 1000.0
        assert [limit.take("a") for _ in range(4)] == [0, 0, 0, 0.5]

    def test_remembers_so_many(self) -> None:
        limit = RateLimit(1.0, 1, max_names=3, clock=lambda: 0.0)
        for name in "abcdefg":
            assert limit.take(name) == 0
        assert [limit.take(name) for name in "efg"] == [1, 1, 1]
        assert len(limit._buckets) == 3

    @pytest.mark.parametrize("bounds", [(0.0, 1), (-1.0, 1), (float("nan"), 1), (1.0, 0)])
    def test_bad_bounds(self, bounds: tuple[float, int]) -> None:
        with pytest.raises(ValueError, match="positive"):
            RateLimit(*bounds)
