"""No route that cannot steer swallows a request for steering."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from server.guard import STEERED_PATHS, SteeringGuard
from server.profiles import ProfileTable
from server.service import SteeringService

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


async def echo(request: Request) -> Response:
    return Response(await request.body())


@pytest.fixture
def make_app(make_service: Callable[..., SteeringService]) -> Callable[[str], Starlette]:
    def make(path: str) -> Starlette:
        app = Starlette(routes=[Route(path, echo, methods=METHODS)], middleware=[Middleware(SteeringGuard)])
        app.state.steering = make_service(ProfileTable({}))
        return app

    return make


@pytest.fixture
def client(make_app: Callable[[str], Starlette]) -> TestClient:
    return TestClient(make_app("/{path:path}"))


def test_a_server_that_ends_takes_nothing_new(client: TestClient) -> None:
    client.app.state.steering.reconciler.state = "draining"  # type: ignore[attr-defined]
    response = client.post("/v1/chat/completions", json={"model": "lab"})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "steering_server_draining"
    assert response.headers["retry-after"] == "1"
    assert client.put("/v1/steering/profiles/x", json={}).status_code == 503
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("query", "sent", "is_heard"),
    [
        ("", {"type": "session.update", "model": "lab"}, True),
        ("", {"type": "input", "audio": "steer@"}, True),
        ("", {"type": "session.update", "model": "lab", "steering_profile": "x"}, False),
        ("", '{"type": "session.update", "model": "lab", "\\u0073teering_profile": "x"}', False),
        ("", {"type": "session.update", "model": "lab", "stearing_profile": "x"}, False),
        ("", {"type": "session.update", "model": "lab@x"}, False),
        ("?steering_profile=x", None, False),
    ],
)
def test_websockets(make_service: Callable[..., SteeringService], query: str, sent: Any, is_heard: bool) -> None:
    async def answer(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text(await websocket.receive_text())

    routes = [WebSocketRoute("/v1/realtime", answer)]
    app = Starlette(routes=routes, middleware=[Middleware(SteeringGuard)])
    app.state.steering = make_service(ProfileTable({}))

    def talk() -> str:
        with TestClient(app).websocket_connect(f"/v1/realtime{query}") as websocket:
            websocket.send_text(sent if isinstance(sent, str) else json.dumps(sent))
            return websocket.receive_text()

    if is_heard:
        assert json.loads(talk()) == sent
        return
    with pytest.raises(WebSocketDisconnect) as caught:
        talk()
    assert caught.value.code == 1008
    assert app.state.steering.metrics.snapshot()["refusals"]["steering_unsupported"] == 1


@pytest.mark.parametrize(
    "header",
    ['form-data; name="steering_profile"', "form-data; name=steering_profile", 'form-data; x="a"; name="steering_x"'],
)
def test_forms(client: TestClient, header: str) -> None:
    body = f"--b\r\nContent-Disposition: {header}\r\n\r\nmedical\r\n--b--\r\n"
    response = client.post("/v1/audio/transcriptions", content=body.encode())
    assert response.status_code == 400
    assert "form field" in response.json()["error"]["message"]


def assert_refused(response: Any, name: str) -> None:
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "steering_unsupported"
    assert f"by the field {name!r}; use steering_profile in the JSON body of /v1/chat/comp" in error["message"]


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
@pytest.mark.parametrize(
    "path",
    [
        "/v1/responses/render",
        "/v1/messages/render",
        "/v1/messages/count_tokens",
        "/invocations",
        "/v1/chat/completions/x",
    ],
)
def test_refuses_steering(client: TestClient, method: str, path: str) -> None:
    response = client.request(method, path, json={"model": "m", "steering_profile": "careful"})
    assert_refused(response, "steering_profile")
    assert path in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({"steering_profle": "a"}, "steering_profle"),
        ({"steering": {}}, "steering"),
        ({"steering_profile": None}, "steering_profile"),
        ({"vllm_xargs": {"steering": "{}"}}, "vllm_xargs.steering"),
        ({"sampling_params": {"extra_args": {"steering": {}}}}, "sampling_params.extra_args.steering"),
        ({"steer\ud800": 1}, "steer\ud800"),
    ],
)
def test_refuses_whatever_means_steering(client: TestClient, body: dict[str, Any], name: str) -> None:
    assert_refused(client.post("/v1/responses/render", content=json.dumps(body)), name)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-le"])
def test_refuses_in_every_encoding_that_json_has(client: TestClient, encoding: str) -> None:
    body = '{"steering_profile": "a"}'.encode(encoding)
    assert_refused(client.post("/v1/responses/render", content=body), "steering_profile")


def test_refuses_a_profile_in_the_model_name(client: TestClient) -> None:
    response = client.post("/invocations", json={"model": "lab@careful"})
    assert response.status_code == 400
    assert "/invocations does not support steering" in response.json()["error"]["message"]
    assert "by the model 'lab@careful'" in response.json()["error"]["message"]


def test_counting_tokens_heeds_the_model_and_no_field(client: TestClient) -> None:
    """A client has one model name for all of Anthropic's routes; the route itself looks for the profile."""
    path = "/v1/messages/count_tokens"
    assert client.post(path, json={"model": "lab@careful"}).json() == {"model": "lab@careful"}
    assert_refused(client.post(path, json={"model": "lab@careful", "steering_profile": "a"}), "steering_profile")
    assert client.post("/v1/messages/render", json={"model": "lab@careful"}).status_code == 400


@pytest.mark.parametrize(
    ("path", "kind"), [("/v1/messages/render", "invalid_request_error"), ("/v1/responses/render", "BadRequestError")]
)
def test_refusals_have_the_form_of_the_api(client: TestClient, path: str, kind: str) -> None:
    body = client.post(path, json={"steering_profile": "a"}).json()
    assert body["error"]["type"] == kind
    assert body.get("type") == ("error" if kind == "invalid_request_error" else None)
    client.app.state.steering.reconciler.state = "draining"  # type: ignore[attr-defined]
    body = client.post(path, json={}).json()
    assert body["error"]["type"] == ("overloaded_error" if "type" in body else "ServiceUnavailableError")


@pytest.mark.parametrize("model", ["lab", "other@careful", "labs@careful", 7, None, ["lab@careful"]])
def test_other_models_pass(client: TestClient, model: Any) -> None:
    assert client.post("/invocations", json={"model": model}).json() == {"model": model}


def test_long_names_are_not_echoed(client: TestClient) -> None:
    response = client.post("/v1/responses/render", json={"steer" * 10**5: 1})
    assert response.status_code == 400
    assert len(response.content) < 1000


@pytest.mark.parametrize("path", sorted(STEERED_PATHS))
def test_steered_routes_check_for_themselves(client: TestClient, path: str) -> None:
    assert client.post(path, json={"steering_profile": "a"}).json() == {"steering_profile": "a"}


def test_steered_routes_behind_a_prefix(make_app: Callable[[str], Starlette]) -> None:
    client = TestClient(make_app("/v1/completions"), root_path="/gateway")
    assert client.post("/gateway/v1/completions", json={"steering_profile": "a"}).status_code == 200
    assert_refused(client.post("/gateway/v1/responses/render", json={"steering_profile": "a"}), "steering_profile")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b'{"model": "m", "input": "steering_profile"}',
        b'["steering_profile"]',
        b'"steering_profile"',
        b'{"steering_profile": ',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"input": {"steering_profile": 1}}',
    ],
    ids=lambda body: repr(body[:24]),
)
def test_other_bodies_pass_unchanged(client: TestClient, body: bytes) -> None:
    response = client.post("/v1/responses/render", content=body)
    assert (response.status_code, response.content) == (200, body)


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_other_methods_pass(client: TestClient, method: str) -> None:
    assert client.request(method, "/x", content=b'{"steering_profile": 1}').status_code == 200


def test_uploads_pass(client: TestClient) -> None:
    response = client.post("/v1/audio/transcriptions", files={"file": ("a.json", b'{"steering_profile": 1}')})
    assert response.status_code == 200


def test_form_fields_are_refused(client: TestClient) -> None:
    files = {"file": ("a.wav", b"abc")}
    response = client.post("/v1/audio/transcriptions", files=files, data={"steering_profile": "careful"})
    assert response.status_code == 400
    assert "by the form field 'steering_profile'" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", "/v1/responses/render"])
@pytest.mark.parametrize("query", ["steering_profile=careful", "a=1&steer=x", "Steering_Profile", "steering_profile="])
def test_query_parameters_are_refused_everywhere(client: TestClient, path: str, query: str) -> None:
    response = client.post(f"{path}?{query}", json={"model": "lab"})
    assert response.status_code == 400
    assert "by the query parameter" in response.json()["error"]["message"]


def test_other_query_parameters_pass(client: TestClient) -> None:
    assert client.post("/v1/completions?user=steering_profile", json={}).status_code == 200


DISCONNECT = {"type": "http.disconnect"}


@pytest.fixture
def http_scope(make_app: Callable[[str], Starlette]) -> dict[str, Any]:
    scope = {"type": "http", "method": "POST", "path": "/x", "query_string": b"", "headers": []}
    return {**scope, "app": make_app("/x")}


async def received(incoming: list[dict[str, Any]], scope: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Messages that the application gets, and those that the client gets, for these messages of the client."""
    app_messages: list[Any] = []
    client_messages: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(5):
            app_messages.append(await receive())
            if app_messages[-1] == DISCONNECT:
                break
        await PlainTextResponse("ok")(scope, receive, send)

    async def receive() -> Any:
        return incoming.pop(0)

    async def send(message: Any) -> None:
        client_messages.append(message)

    await SteeringGuard(app)(scope, receive, send)
    return app_messages, client_messages


async def test_body_in_pieces_then_disconnect(http_scope: dict[str, Any]) -> None:
    """The application gets the body as it came and later hears of the disconnect: so vLLM aborts a request."""
    pieces = [{"type": "http.request", "body": piece, "more_body": True} for piece in (b'{"a"', b": 1")]
    incoming = [*pieces, {"type": "http.request", "body": b"}"}, DISCONNECT]
    messages, _ = await received(list(incoming), http_scope)
    assert messages == incoming


async def test_refusal_looks_at_the_whole_body(http_scope: dict[str, Any]) -> None:
    pieces = [{"type": "http.request", "body": piece, "more_body": True} for piece in (b'{"steering', b'_profile"')]
    messages, answer = await received([*pieces, {"type": "http.request", "body": b": 1}"}], http_scope)
    assert messages == []
    assert answer[0]["status"] == 400


async def test_disconnect_in_the_middle_of_the_body(http_scope: dict[str, Any]) -> None:
    incoming = [{"type": "http.request", "body": b"{", "more_body": True}, DISCONNECT]
    messages, _ = await received(list(incoming), http_scope)
    assert messages == incoming


async def test_uploads_of_bundles_are_not_collected(http_scope: dict[str, Any]) -> None:
    """The admin API checks its bodies itself, and a bundle must not be held in memory."""
    pieces = [{"type": "http.request", "body": b"x", "more_body": True}] * 3
    messages, _ = await received([*pieces, DISCONNECT, {}], {**http_scope, "path": "/v1/steering/bundles"})
    assert messages == [*pieces, DISCONNECT]


async def test_other_protocols_pass() -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    async def never(*_: Any) -> Any:
        raise AssertionError

    await SteeringGuard(app)({"type": "lifespan"}, never, never)
    assert seen == ["lifespan"]
