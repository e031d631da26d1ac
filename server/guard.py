"""ASGI middleware: no route that cannot steer swallows a request for steering."""

import json
import re
from collections import deque
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl

from starlette._utils import get_route_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from artifacts.errors import quoted
from server.auth.rules import is_steering
from server.errors import ErrorCode, SteeringRequestError
from server.schema import steering_key
from server.service import SteeringService

_FORM_FIELD = re.compile(rb"content-disposition:[^\r\n]*;\s*name=\"?(steer[^\";\r\n]{0,64})", re.IGNORECASE)
_POLICY_VIOLATION = 1008
_DRAINING = SteeringRequestError(
    ErrorCode.DRAINING,
    "This server is shutting down and takes no more requests; send it to another one.",
    HTTPStatus.SERVICE_UNAVAILABLE,
    None,
    {"retry-after": "1"},
)
STEERED_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
# Routes that heed `<model>@<profile>` and nothing else: they generate nothing, and a client has one model name for all.
NAMED_PATHS = frozenset({"/v1/messages/count_tokens"})


class SteeringGuard:
    """Refuses to let a request for steering go unheard.

    On every route but the steered ones (and the admin API's, which take no unknown fields) vLLM would ignore it: a
    `steer*` key of a JSON body, a `steer*` field of a form, or the model name `<model>@<profile>` (`/invocations`
    ignores the model's name), also in a message of a websocket. On all routes it would ignore a `steer*` query
    parameter. A server that is about to end takes nothing new, so that what runs can end in time.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 400."""
        if scope["type"] == "websocket":
            await self._guard_websocket(scope, receive, send)
            return
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        path, route = scope["path"], get_route_path(scope)
        service: SteeringService = scope["app"].state.steering
        if service.reconciler.state == "draining":
            await _DRAINING.response(route=route)(scope, receive, send)
            return
        asked = _asked_in_query(scope["query_string"])
        if asked is None and route not in STEERED_PATHS and not is_steering(route):
            messages = await _read(receive)
            body = b"".join(message.get("body", b"") for message in messages)
            asked = _asked_in_body(body, service, heeds_model=route in NAMED_PATHS)
            receive = _replay(messages, receive)
        if asked is None:
            await self._app(scope, receive, send)
            return
        service.metrics.refused(ErrorCode.UNSUPPORTED.value, [])
        refusal = SteeringRequestError(
            ErrorCode.UNSUPPORTED,
            f"{path} does not support steering by {asked}; use steering_profile in the JSON body of "
            f"{' or '.join(sorted(STEERED_PATHS))}.",
        )
        await refusal.response(route=route)(scope, receive, send)

    async def _guard_websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Close a connection that asks for steering: vLLM's realtime route takes a model's name and nothing else."""
        service: SteeringService = scope["app"].state.steering
        is_closed = False

        async def close() -> None:
            nonlocal is_closed
            is_closed = True
            service.metrics.refused(ErrorCode.UNSUPPORTED.value, [])
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": ErrorCode.UNSUPPORTED.value})

        async def receive_checked() -> Message:
            message = await receive()
            if _asked_in_body((message.get("text") or "").encode(), service, heeds_model=False) is not None:
                await close()
                return {"type": "websocket.disconnect", "code": _POLICY_VIOLATION}
            return message

        async def send_open(message: Message) -> None:
            if not is_closed:
                await send(message)

        if _asked_in_query(scope["query_string"]) is not None:
            await close()
        else:
            await self._app(scope, receive_checked, send_open)


async def _read(receive: Receive) -> list[Message]:
    """Messages of a request up to the end of its body, or up to the client's disconnect."""
    messages = [await receive()]
    while messages[-1]["type"] == "http.request" and messages[-1].get("more_body"):
        messages.append(await receive())
    return messages


def _replay(messages: list[Message], receive: Receive) -> Receive:
    """A receive that gives these messages again before it goes on."""
    pending = deque(messages)

    async def replay() -> Message:
        return pending.popleft() if pending else await receive()

    return replay


def _asked_in_query(query: bytes) -> str | None:
    keys = {key for key, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True)}
    name = steering_key(dict.fromkeys(keys))
    return None if name is None else f"the query parameter {quoted(name)}"


def _asked_in_body(body: bytes, service: SteeringService, heeds_model: bool) -> str | None:
    try:
        data: Any = json.loads(body)
    except (ValueError, RecursionError):
        # An upload, or something that the route itself refuses.
        form_field = _FORM_FIELD.search(body)
        return None if form_field is None else f"the form field {quoted(form_field[1].decode('latin-1'))}"
    if not isinstance(data, dict):
        return None
    name = steering_key(data)
    if name is not None:
        return f"the field {quoted(name)}"
    model = data.get("model")
    if not heeds_model and isinstance(model, str) and service.split_model(model)[1] is not None:
        return f"the model {quoted(model)}"
    return None
