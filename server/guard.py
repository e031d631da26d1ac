"""ASGI middleware: no route that cannot steer swallows a request for steering."""

import json
from http import HTTPStatus
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ErrorCode, SteeringRequestError
from server.schema import FIELD, misspelt_key

STEERED_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})


class SteeringGuard:
    """Refuses JSON bodies with a `steer*` key on every other route, where vLLM would ignore the key."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 400."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH") or _passes(scope):
            await self._app(scope, receive, send)
            return
        chunks = []
        while True:
            message = await receive()
            chunks.append(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body"):
                break
        body = b"".join(chunks)
        refusal = _refusal(body, scope["path"])
        if refusal is not None:
            await refusal.response()(scope, receive, send)
            return
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        if message["type"] != "http.request":
            pending = [message]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self._app(scope, replay, send)


def _passes(scope: Scope) -> bool:
    """Routes that steer check for themselves; uploads carry no JSON and may be large."""
    if scope["path"].removeprefix(scope.get("root_path", "")) in STEERED_PATHS:
        return True
    return any(name == b"content-type" and value.startswith(b"multipart/") for name, value in scope["headers"])


def _refusal(body: bytes, path: str) -> SteeringRequestError | None:
    try:
        data: Any = json.loads(body)
    except (ValueError, RecursionError):
        # Not JSON: an upload, or something that the route itself refuses.
        return None
    if not isinstance(data, dict):
        return None
    name = FIELD if FIELD in data else misspelt_key(data, ())
    if name is None:
        return None
    return SteeringRequestError(
        ErrorCode.UNSUPPORTED,
        f"{path} does not support steering, but the request has the field {name!r}; "
        f"use {' or '.join(sorted(STEERED_PATHS))}.",
        HTTPStatus.BAD_REQUEST,
        param=name,
    )
