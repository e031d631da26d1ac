"""Running a request with steering: admission, vLLM's own endpoint, receipt."""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from http import HTTPStatus
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse

from server.engine.client import SteeringEngine
from server.engine.steering import Steering
from server.errors import ErrorCode, SteeringRequestError
from server.profiles import ProfileTable, Resolved
from server.schema import ProfileRef

BUNDLE_HEADER = "x-steering-bundle"
_DONE = "data: [DONE]"

Endpoint = Callable[[Any, Any], Awaitable[Any]]


class SteerableRequest(Protocol):
    """What the request models of this server have in common."""

    model: str | None
    use_beam_search: bool
    steering_profile: Any

    @property
    def profile_refs(self) -> list[ProfileRef]: ...

    def steer_with(self, steering: Steering | None) -> None: ...


class SteeringService:
    """Resolves requests and turns the workers' counts into receipts.

    Attributes:
        profiles: the profiles that requests may name.
        engine: the steering engine.
        model_names: names under which the target model is served.
    """

    def __init__(self, profiles: ProfileTable, engine: SteeringEngine, model_names: Sequence[str]) -> None:
        self.profiles = profiles
        self.engine = engine
        self.model_names = tuple(model_names)

    def admit(self, request: SteerableRequest) -> Resolved | None:
        """Resolve a request's profiles; None when it asks for no steering.

        A model name `<model>@<profile>` is replaced by `<model>`.

        Raises:
            SteeringRequestError: the request cannot be steered as it asks.
        """
        refs = request.profile_refs
        base, profile = self.split_model(request.model)
        if profile is not None:
            if refs:
                raise SteeringRequestError(
                    ErrorCode.CONFLICT,
                    f"Both the model name {request.model!r} and steering_profile choose a profile; use one of them.",
                    param="model",
                )
            refs = [ProfileRef(name=profile)]
            request.model = base
        if not refs:
            return None
        if request.use_beam_search:
            raise SteeringRequestError(
                ErrorCode.UNSUPPORTED,
                "Steering is not supported together with use_beam_search.",
                param="use_beam_search",
            )
        resolved = self.profiles.resolve(refs)
        request.steer_with(resolved.steering)
        return resolved

    def split_model(self, model: str | None) -> tuple[str | None, str | None]:
        """Model and profile that a model name means; the profile is None unless it is `<served model>@<profile>`."""
        if model is None or model in self.model_names:
            return model, None
        for base in sorted(self.model_names, key=len, reverse=True):
            if model.startswith(f"{base}@"):
                return base, model.removeprefix(f"{base}@")
        return model, None


async def respond(request: SteerableRequest, raw_request: Request, endpoint: Endpoint) -> Any:
    """Answer a chat or text completion, steered where it asks for it.

    Args:
        request: validated body.
        raw_request: the HTTP request.
        endpoint: vLLM's route function.
    """
    service: SteeringService = raw_request.app.state.steering
    asked_model = request.model
    try:
        resolved = service.admit(request)
    except SteeringRequestError as error:
        return error.response()
    if resolved is None:
        return await endpoint(request, raw_request)
    as_list = isinstance(request.steering_profile, list)
    answer = _Answer(resolved, asked_model if asked_model != request.model else None, as_list)
    if resolved.steering is None:
        return answer.finish(await endpoint(request, raw_request), {})
    with service.engine.receipts.expect(resolved.steering.request_id) as counts:
        response = await endpoint(request, raw_request)
        if not isinstance(response, StreamingResponse):
            return answer.finish(response, counts)
    return answer.stream(response, service)


class _Answer:
    """Receipt and model name that go into one answer."""

    def __init__(self, resolved: Resolved, model: str | None, as_list: bool) -> None:
        self._resolved = resolved
        self._model = model
        self._as_list = as_list
        self._headers = {BUNDLE_HEADER: resolved.bundles}

    def finish(self, response: Any, counts: Mapping[str, list[int]]) -> Any:
        """Put the receipt on a complete response; errors and disconnects (None) pass as they are."""
        if isinstance(response, StreamingResponse):
            return self._wrap(response, counts)
        if not isinstance(response, JSONResponse) or response.status_code != HTTPStatus.OK:
            return response
        try:
            body = json.loads(bytes(response.body))
            body = self._amend(body, counts, len(body["choices"]))
        except SteeringRequestError as error:
            return error.response()
        kept = {key: value for key, value in response.headers.items() if key not in ("content-length", "content-type")}
        return JSONResponse(body, headers={**kept, **self._headers}, background=response.background)

    def stream(self, response: StreamingResponse, service: SteeringService) -> StreamingResponse:
        """Pass a stream on, with the receipt in its last chunk."""
        assert self._resolved.steering is not None
        steering_id = self._resolved.steering.request_id

        async def expecting(chunks: Any) -> AsyncIterator[str]:
            # Registered by the generator itself, which always runs its `finally` once begun; vLLM submits the request
            # when the stream is first read, so no count comes earlier.
            with service.engine.receipts.expect(steering_id) as counts:
                async with aclosing(self._chunks(chunks, counts)) as amended:
                    async for chunk in amended:
                        yield chunk

        response.body_iterator = expecting(response.body_iterator)
        response.headers.update(self._headers)
        return response

    def _wrap(self, response: StreamingResponse, counts: Mapping[str, list[int]]) -> StreamingResponse:
        response.body_iterator = self._chunks(response.body_iterator, counts)
        response.headers.update(self._headers)
        return response

    async def _chunks(self, chunks: Any, counts: Mapping[str, list[int]]) -> AsyncGenerator[str]:
        """Hold back only a chunk that may be the last (a finish reason, or no choices), until the next one shows."""
        held: dict[str, Any] | None = None
        choices: set[int] = set()
        async with aclosing(chunks):
            async for chunk in chunks:
                if held is not None and chunk.startswith("data:"):
                    yield self._event(held, counts, len(choices) if chunk.startswith(_DONE) else None)
                    held = None
                body = _last_candidate(chunk) if self._model is None else _json_of(chunk)
                if body is None:
                    yield chunk
                elif _may_be_last(body):
                    held = body
                    choices.update(choice["index"] for choice in body["choices"])
                else:
                    yield self._event(body, counts, None)
            if held is not None:
                yield self._event(held, counts, len(choices))

    def _event(self, body: dict[str, Any], counts: Mapping[str, list[int]], num_choices: int | None) -> str:
        try:
            body = self._amend(body, counts, num_choices)
        except SteeringRequestError as error:
            body = error.body()
        return f"data: {json.dumps(body, separators=(',', ':'), ensure_ascii=False)}\n\n"

    def _amend(self, body: dict[str, Any], counts: Mapping[str, list[int]], num_choices: int | None) -> dict[str, Any]:
        """Rewrite one body; `num_choices`, the choices of the whole answer, is given for its last body only."""
        if self._model is not None and "model" in body:
            body["model"] = self._model
        if num_choices is not None:
            body["steering"] = self._receipt(counts, num_choices)
        return body

    def _receipt(self, counts: Mapping[str, list[int]], num_choices: int) -> Any:
        """Receipt from the counts of every choice.

        Raises:
            SteeringRequestError: a choice has no count, so nothing proves that it was steered.
        """
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
