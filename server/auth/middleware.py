"""ASGI middleware: nobody reaches a route without the key that it needs."""

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus

from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from artifacts.errors import quoted
from server.auth.keys import ANONYMOUS, Identity, KeyRing
from server.auth.rate import RateLimit
from server.auth.rules import WEBSOCKET, Access, access_of, explicit, is_steering, permits
from server.errors import ErrorCode, SteeringRequestError

# Where routes find whom a request is from: `scope["state"][IDENTITY]`.
IDENTITY = "steering_identity"
_POLICY_VIOLATION = 1008
# What needs no key as long as there are none for inference.
_FREE = (Access.INFERENCE, Access.KNOWN)
_MAX_INSTANCE = 256
_REFRESH_TIMEOUT_S = 1.0
_HOW = "as 'Authorization: Bearer KEY' or 'x-api-key: KEY'"


class AccessMiddleware:
    """Refuses what `server.auth.rules` does not permit to the key of a request, before anything of its body is read.

    Belongs outside of all other middleware. It uses the path that the router will match, with the router's own
    function, so that no way of writing a path means one route here and another one there.
    """

    def __init__(self, app: ASGIApp, *, keys: KeyRing, limit: RateLimit | None = None) -> None:
        """Guard `app`.

        Args:
            app: what to guard.
            keys: the keys of this server.
            limit: how often each identity may change what is served; counted in this process.
        """
        self._app, self._keys = app, keys
        self._limit = RateLimit() if limit is None else limit
        # Of its own: the threads that all others share may wait for the registry's disk.
        self._refresher = ThreadPoolExecutor(1, thread_name_prefix="steering-keys")
        self._refreshing: asyncio.Future[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with its identity, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        if self._keys.is_due():
            await self._refresh()
        try:
            identity = self._admit(scope)
        except SteeringRequestError as refusal:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": refusal.code.value})
            else:
                response = refusal.response(scope["path"][:_MAX_INSTANCE], get_route_path(scope))
                await response(scope, receive, send)
            return
        scope.setdefault("state", {})[IDENTITY] = identity
        await self._app(scope, receive, send)

    async def _refresh(self) -> None:
        """Look at the keys file; a file system that does not answer holds up one request, and not for long."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.get_running_loop().run_in_executor(self._refresher, self._keys.refresh)
            await asyncio.wait([self._refreshing], timeout=_REFRESH_TIMEOUT_S)

    def _admit(self, scope: Scope) -> Identity:
        """Identity that a request goes on with.

        Raises:
            SteeringRequestError: it may not.
        """
        method = WEBSOCKET if scope["type"] == "websocket" else scope["method"]
        path = get_route_path(scope)
        access = access_of(method, path)
        changes_steering = access is Access.WRITE and is_steering(path)
        if not self._keys.has_any:
            if access is Access.WRITE and explicit(method, path):
                raise _refuse(
                    ErrorCode.ADMIN_DISABLED,
                    f"{method} {quoted(path)} needs a write key and this server has none; start it with one to change "
                    "what it serves.",
                )
            return ANONYMOUS
        if access is Access.OPEN:
            return ANONYMOUS
        headers = Headers(scope=scope)
        if access in _FREE and not self._keys.guards_inference and _presented(headers) is None:
            return ANONYMOUS
        identity = self._identify(headers)
        if not permits(identity.role, access):
            if access is Access.WRITE and not self._keys.has_admin:
                raise _refuse(
                    ErrorCode.ADMIN_DISABLED,
                    f"{method} {quoted(path)} needs a write key and this server has none that is valid; add one to its "
                    "keys.",
                )
            raise _refuse(
                ErrorCode.ACCESS_DENIED,
                f"{method} {quoted(path)} needs {_needed(access)}; key {quoted(identity.name)} is of role "
                f"{identity.role}.",
            )
        if changes_steering:
            self._take(identity)
        return identity

    def _identify(self, headers: Headers) -> Identity:
        presented = _presented(headers)
        identity = self._keys.identify(presented)
        if identity is None:
            raise SteeringRequestError(
                ErrorCode.KEY_INVALID,
                f"This server needs an API key; send one {_HOW}."
                if presented is None
                else f"The API key is unknown or has expired; send a valid one {_HOW}.",
                HTTPStatus.UNAUTHORIZED,
                param=None,
                headers={"www-authenticate": "Bearer"},
            )
        return identity

    def _take(self, identity: Identity) -> None:
        wait_s = self._limit.take(identity.name)
        if wait_s > 0:
            raise SteeringRequestError(
                ErrorCode.RATE_LIMITED,
                f"Key {quoted(identity.name)} changes what is served too often; try again in {wait_s:.2f} s.",
                HTTPStatus.TOO_MANY_REQUESTS,
                param=None,
                headers={"retry-after": str(math.ceil(wait_s))},
            )


def identity_of(scope: Scope) -> Identity:
    """Whom a request is from. Without `AccessMiddleware` in front there is no answer, and no one is let in."""
    identity: Identity = scope["state"][IDENTITY]
    return identity


def _presented(headers: Headers) -> str | None:
    """Key that a request comes with; Anthropic's clients send theirs as `x-api-key`."""
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    key = credentials.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()
    return key or None


def _needed(access: Access) -> str:
    return {Access.INFERENCE: "an inference key", Access.READ: "a read key"}.get(access, "a write key")


def _refuse(code: ErrorCode, message: str) -> SteeringRequestError:
    return SteeringRequestError(code, message, HTTPStatus.FORBIDDEN, param=None)
