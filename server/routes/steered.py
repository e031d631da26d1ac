"""Running a request with steering: admission, vLLM's own endpoint, receipt."""

import json
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import ExitStack, aclosing
from http import HTTPStatus
from typing import Any, Literal

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse

from server.errors import ErrorCode, SteeringRequestError
from server.profiles import Resolved
from server.request_log import log_request
from server.routes.admin.route import identity_of
from server.service import SteeringService
from server.tracing import request_span

BUNDLE_HEADER = "x-steering-bundle"
_DONE = "data: [DONE]"
_ERROR = 'data: {"error":'

Endpoint = Callable[[Any, Any], Awaitable[Any]]
Outcome = Literal["ok", "refused", "failed", "aborted"]


async def respond(request: Any, raw_request: Request, endpoint: Endpoint) -> Any:
    """Answer a chat or text completion, steered where it asks for it.

    Args:
        request: validated body, of a model with `SteeringFields`.
        raw_request: the HTTP request.
        endpoint: vLLM's route function.
    """
    service: SteeringService = raw_request.app.state.steering
    asked_model = request.model
    try:
        resolved = service.admit(request, identity_of(raw_request), raw_request.headers)
    except SteeringRequestError as error:
        service.metrics.refused(error.code.value, [ref.name.partition("@")[0] for ref in request.profile_refs])
        return error.response(raw_request.headers.get("x-request-id"))
    if resolved is None:
        return await endpoint(request, raw_request)
    as_list = isinstance(request.steering_profile, list)
    running = _Running(service, resolved, raw_request)
    answer = _Answer(resolved, asked_model if asked_model != request.model else None, as_list, running.counts)
    try:
        response = await endpoint(request, raw_request)
    except BaseException:
        running.end("failed")
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
        if is_exact and self._resolved.steering is not None:
            totals = [sum(column) for column in zip(*self.counts.values(), strict=True)]
            self._service.metrics.receipts.claim(self._resolved.steering.request_id, len(self.counts), totals)
        log_request(self._resolved, outcome, self.counts, self._request_id, time.monotonic() - self._started_s)


class _Answer:
    """Receipt and model name that go into one answer.

    Attributes:
        headers: that go with the answer.
        outcome: how the answer ended, as far as it was seen.
        ended_by_engine: whether every choice ended where the engine itself ended it, not at a stop string, which only
            this process sees.
    """

    def __init__(self, resolved: Resolved, model: str | None, as_list: bool, counts: Mapping[str, list[int]]) -> None:
        self._resolved = resolved
        self._model = model
        self._as_list = as_list
        self._counts = counts
        self.headers = {BUNDLE_HEADER: resolved.bundles}
        self.outcome: Outcome = "aborted"
        self.ended_by_engine = True

    def finish(self, response: Any) -> Any:
        """Put the receipt on a complete response; errors and disconnects (None) pass as they are."""
        if not isinstance(response, JSONResponse):
            return response
        if response.status_code != HTTPStatus.OK:
            self.outcome = "failed" if response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR else "refused"
            return response
        try:
            body = json.loads(bytes(response.body))
            self._note_ends(body)
            body = self._amend(body, len(body["choices"]))
        except SteeringRequestError as error:
            self.outcome = "failed"
            return error.response()
        self.outcome = "ok"
        kept = {key: value for key, value in response.headers.items() if key not in ("content-length", "content-type")}
        return JSONResponse(body, headers={**kept, **self.headers}, background=response.background)

    async def stream(self, chunks: Any, end: Callable[[Outcome, bool], None]) -> AsyncIterator[str]:
        """Pass a stream on, with the receipt in its last chunk.

        Args:
            chunks: vLLM's server-sent events.
            end: told how the stream ended.
        """
        try:
            async with aclosing(self._chunks(chunks)) as amended:
                async for chunk in amended:
                    yield chunk
        finally:
            end(self.outcome, self.ended_by_engine)

    async def _chunks(self, chunks: Any) -> AsyncGenerator[str]:
        """Hold back only a chunk that may be the last (a finish reason, or no choices), until the next one shows."""
        held: dict[str, Any] | None = None
        choices: set[int] = set()
        has_failed = False
        async with aclosing(chunks):
            async for chunk in chunks:
                if held is not None and chunk.startswith("data:"):
                    yield self._event(held, len(choices) if chunk.startswith(_DONE) else None)
                    held = None
                has_failed = has_failed or chunk.startswith(_ERROR)
                body = _last_candidate(chunk) if self._model is None else _json_of(chunk)
                if body is None:
                    yield chunk
                elif _may_be_last(body):
                    held = body
                    choices.update(choice["index"] for choice in body["choices"])
                    self._note_ends(body)
                else:
                    yield self._event(body, None)
            if held is not None:
                yield self._event(held, len(choices))
        if has_failed:
            self.outcome = "failed"

    def _note_ends(self, body: Mapping[str, Any]) -> None:
        for choice in body["choices"]:
            if isinstance(choice.get("stop_reason"), str) or choice.get("finish_reason") in ("abort", "error"):
                self.ended_by_engine = False

    def _event(self, body: dict[str, Any], num_choices: int | None) -> str:
        try:
            body = self._amend(body, num_choices)
            if num_choices is not None:
                self.outcome = "ok"
        except SteeringRequestError as error:
            body = error.body()
            self.outcome = "failed"
        return f"data: {json.dumps(body, separators=(',', ':'), ensure_ascii=False)}\n\n"

    def _amend(self, body: dict[str, Any], num_choices: int | None) -> dict[str, Any]:
        """Rewrite one body; `num_choices`, the choices of the whole answer, is given for its last body only."""
        if self._model is not None and "model" in body:
            body["model"] = self._model
        if num_choices is not None:
            body["steering"] = self._receipt(num_choices)
        return body

    def _receipt(self, num_choices: int) -> Any:
        """Receipt from the counts of every choice.

        Raises:
            SteeringRequestError: a choice has no count, so nothing proves that it was steered.
        """
        counts = self._counts
        if self._resolved.steering is not None and len(counts) < max(1, num_choices):
            raise SteeringRequestError(
                ErrorCode.NOT_APPLIED,
                f"The workers reported steering {len(counts)} of {num_choices} choices; do not use this answer.",
                HTTPStatus.INTERNAL_SERVER_ERROR,
            )
        totals = [sum(column) for column in zip(*counts.values(), strict=True)]
        receipts = [receipt.to_json() for receipt in self._resolved.receipts(totals)]
        return receipts if self._as_list else receipts[0]


def _json_of(chunk: str) -> dict[str, Any] | None:
    """Body of a server-sent event; None for comments, `[DONE]`, errors and anything else that is no chunk."""
    if not chunk.startswith("data: {"):
        return None
    body = json.loads(chunk[len("data: ") :])
    return body if "choices" in body else None


def _last_candidate(chunk: str) -> dict[str, Any] | None:
    """Like `_json_of`, but parses only what may be the last chunk: most chunks pass untouched."""
    if '"finish_reason":null' in chunk and '"choices":[]' not in chunk:
        return None
    body = _json_of(chunk)
    return body if body is not None and _may_be_last(body) else None


def _may_be_last(body: Mapping[str, Any]) -> bool:
    choices = body["choices"]
    return not choices or any(choice.get("finish_reason") is not None for choice in choices)
