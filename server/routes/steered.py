"""Running a request with steering: admission, vLLM's own endpoint, receipt."""

import time
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette._utils import get_route_path

from server.engine.failures import is_refusal
from server.errors import SteeringRequestError
from server.profiles import Resolved
from server.request_log import log_request
from server.routes.admin.route import identity_of, service_of
from server.routes.answers.answer import Admitted, Answer, Outcome
from server.service import SteeringService
from server.tracing import request_span

Endpoint = Callable[[Any, Any], Awaitable[Any]]


async def respond(request: Any, raw_request: Request, endpoint: Endpoint, form: type[Answer]) -> Any:
    """Answer a request for generation, steered where it asks for it.

    Args:
        request: validated body, of a model with `SteeringFields`.
        raw_request: the HTTP request.
        endpoint: vLLM's route function.
        form: that its answers have.
    """
    service = service_of(raw_request)
    asked_model = request.model
    try:
        resolved = service.admit(request, identity_of(raw_request), raw_request.headers)
    except SteeringRequestError as error:
        _, profile = service.split_model(asked_model)
        names = [ref.name for ref in request.profile_refs] + ([] if profile is None else [profile])
        return refuse(error, raw_request, names)
    if resolved is None:
        return await endpoint(request, raw_request)
    running = _Running(service, resolved, raw_request)
    model = asked_model if asked_model != request.model else None
    answer = form(Admitted(request, raw_request, resolved, model, running.counts))
    try:
        response = await endpoint(request, raw_request)
    except Exception as error:
        running.end("refused" if is_refusal(error) else "failed")
        raise
    except BaseException:
        running.end("aborted")
        raise
    if isinstance(response, StreamingResponse):
        # A stream that is never read ends without a word.
        weakref.finalize(response, running.end, "aborted")
        response.headers.update(answer.headers)
        response.body_iterator = answer.stream(response.body_iterator, running.end)
        return response
    response = answer.finish(response)
    running.end(answer.outcome, is_exact=answer.ended_by_engine)
    return response


def refuse(error: SteeringRequestError, raw_request: Request, profiles: Sequence[str]) -> JSONResponse:
    """Count a request that is not admitted, and answer it.

    Args:
        error: why.
        raw_request: the HTTP request.
        profiles: those that it asked for.
    """
    service_of(raw_request).metrics.refused(error.code.value, [name.partition("@")[0] for name in profiles])
    return error.response(raw_request.headers.get("x-request-id"), get_route_path(raw_request.scope))


class _Running:
    """A request between its admission and the end of its answer.

    Attributes:
        counts: tokens steered so far, by the engine's request ids; grows while the request runs.
    """

    def __init__(self, service: SteeringService, resolved: Resolved, raw_request: Request) -> None:
        self._service, self._resolved = service, resolved
        self._request_id = raw_request.headers.get("x-request-id")
        self._started_s = time.monotonic()
        self._pin = service.pins.hold(resolved.keys)
        self._stack = ExitStack()
        self._span = self._stack.enter_context(request_span(raw_request.headers, resolved))
        self.counts: Mapping[str, list[int]] = {}
        if resolved.steering is not None:
            self.counts = self._stack.enter_context(service.engine.receipts.expect(resolved.steering.request_id))
        service.metrics.admitted(resolved, self.counts)
        self._is_over = False

    def end(self, outcome: Outcome, is_exact: bool = False) -> None:
        """Note how it ended and let go of everything. A second call does nothing.

        Args:
            outcome: how it ended.
            is_exact: whether the engine ended the answer by itself, so that the workers' own count must equal that of
                the receipt.
        """
        if self._is_over:
            return
        self._is_over = True
        self._span.finish(outcome, self.counts)
        self._stack.close()
        self._pin.release()
        self._service.metrics.ended(self._resolved, outcome, self.counts)
        # An answer that is not whole has no receipt.
        if outcome == "ok" and is_exact and self._resolved.steering is not None:
            totals = [sum(column) for column in zip(*self.counts.values(), strict=True)]
            self._service.metrics.receipts.claim(self._resolved.steering.request_id, len(self.counts), totals)
        log_request(self._resolved, outcome, self.counts, self._request_id, time.monotonic() - self._started_s)
