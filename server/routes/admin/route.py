"""What every admin route has in common: strict input, and refusals in one form."""

import asyncio
from collections.abc import Callable, Collection, Coroutine, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from artifacts import strict_json
from artifacts.errors import quoted
from server.admin_schema import Refusal
from server.auth import middleware as access
from server.auth.audit import REQUEST_ID
from server.auth.keys import Identity
from server.engine.client import SteeringEngineError
from server.errors import ErrorCode, SteeringRequestError
from server.refusals import refusal_of
from server.registry.errors import RegistryError
from server.registry.records import Snapshot
from server.service import SteeringService

MAX_JSON_BYTES = 64 * 1024
JSON_TYPE = "application/json"
# What may come back besides what a route names itself.
REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "model": Refusal,
        "description": "Refused: bad input, no access, or another state than the request supposes.",
    },
    "5XX": {"model": Refusal, "description": "The server or its engine failed."},
}


class AdminRequest(Request):
    """A request whose JSON body is small and strict."""

    async def body(self) -> bytes:
        """The body.

        Raises:
            SteeringRequestError: over 64 KiB.
        """
        if not hasattr(self, "_small_body"):
            chunks, num_bytes = [], 0
            async for chunk in self.stream():
                num_bytes += len(chunk)
                if num_bytes > MAX_JSON_BYTES:
                    raise SteeringRequestError(
                        ErrorCode.TOO_LARGE,
                        f"The JSON body is over {MAX_JSON_BYTES} bytes; send less.",
                        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                        param=None,
                    )
                chunks.append(chunk)
            self._small_body = b"".join(chunks)
        return self._small_body

    async def json(self) -> Any:
        """The body as JSON.

        Raises:
            SteeringRequestError: over 64 KiB, or not JSON.
        """
        try:
            return strict_json.loads(await self.body())
        except ValueError as error:
            if isinstance(error, SteeringRequestError):
                raise
            raise SteeringRequestError(
                ErrorCode.REQUEST_INVALID, f"The body is not valid JSON: {quoted(str(error), 120)}.", param=None
            ) from None


class AdminRoute(APIRoute):
    """A route that takes no parameter it does not know, and whose every refusal has the OpenAI error form."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The endpoint behind checks that need no endpoint."""
        handle = super().get_route_handler()
        known = {field.alias for field in self.dependant.query_params}

        async def handle_strictly(request: Request) -> Response:
            asked = AdminRequest(request.scope, request.receive)
            try:
                _check_query(asked, known)
                if self.body_field is not None and await asked.body():
                    content_type(asked, JSON_TYPE)
                    await asked.json()
                REQUEST_ID.set(asked.headers.get("x-request-id"))
                return await handle(asked)
            except SteeringRequestError as error:
                return error.response(asked.scope["path"])
            except RequestValidationError as error:
                return refusal(error.errors()).response(asked.scope["path"])
            except (RegistryError, SteeringEngineError) as error:
                return refusal_of(error).response(asked.scope["path"])
            except ClientDisconnect:
                # Nobody is left to read it.
                return Response(status_code=HTTPStatus.BAD_REQUEST)

        return handle_strictly


def admin_router() -> APIRouter:
    """An empty router for admin routes."""
    return APIRouter(prefix="/v1/steering", tags=["steering"], route_class=AdminRoute, responses=REFUSALS)


def service_of(request: Request) -> SteeringService:
    """What the routes work with."""
    service: SteeringService = request.app.state.steering
    return service


def identity_of(request: Request) -> Identity:
    """Who asks."""
    return access.identity_of(request.scope)


async def snapshot_of(request: Request) -> Snapshot:
    """The registry's present state, read off the event loop."""
    return await asyncio.to_thread(service_of(request).registry.snapshot)


def content_type(request: Request, *known: str) -> str:
    """Media type of a body.

    Raises:
        SteeringRequestError: 415, it is none of the known ones or it is compressed.
    """
    found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if found not in known:
        raise SteeringRequestError(
            ErrorCode.REQUEST_INVALID,
            f"The content type is {quoted(found)}; send {' or '.join(known)}.",
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            param="content-type",
        )
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise SteeringRequestError(
            ErrorCode.REQUEST_INVALID,
            f"The content encoding is {quoted(encoding)}; send the body as it is.",
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            param="content-encoding",
        )
    return found


def refusal(problems: Sequence[Any]) -> SteeringRequestError:
    """Condense pydantic's report to its first problem and the number of others."""
    first = problems[0]
    # The first part tells body from query; in a body that is wrong as a whole there is nothing else.
    field = ".".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
    more = f", and {len(problems) - 1} more problems" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        return SteeringRequestError(
            ErrorCode.FIELD_UNKNOWN, f"Unknown field {quoted(field)}; leave it out{more}.", param=field[:80]
        )
    value = f" (it is {quoted(first['input'])})" if first["type"] != "missing" else ""
    return SteeringRequestError(
        ErrorCode.REQUEST_INVALID, f"{quoted(field)}: {first['msg'][:300]}{value}{more}.", param=field[:80]
    )


def _check_query(request: Request, known: Collection[str]) -> None:
    """A parameter that is misspelt (`?dryrun=true`) must not change what the operator meant to try."""
    names = [name for name, _ in request.query_params.multi_items()]
    for name in names:
        if name not in known:
            takes = f"known: {', '.join(sorted(known))}" if known else "there are none here"
            raise SteeringRequestError(
                ErrorCode.FIELD_UNKNOWN, f"Unknown query parameter {quoted(name)}; {takes}.", param=name[:80]
            )
        if names.count(name) > 1:
            raise SteeringRequestError(
                ErrorCode.REQUEST_INVALID, f"Query parameter {quoted(name)} is there twice; keep one.", param=name[:80]
            )
