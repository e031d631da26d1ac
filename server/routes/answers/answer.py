"""What steering adds to an answer, whatever form the answer has: receipt, model name and header."""

import json
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette._utils import get_route_path

from server.errors import ErrorCode, SteeringRequestError
from server.profiles import Resolved

BUNDLE_HEADER = "x-steering-bundle"

Outcome = Literal["ok", "refused", "failed", "aborted"]


@dataclass(frozen=True)
class Admitted:
    """A request that is steered.

    Attributes:
        request: validated body, of a model with `SteeringFields`.
        raw_request: the HTTP request.
        resolved: its steering.
        model: the name `<model>@<profile>` that chose the profile; None when the field did.
        counts: tokens steered so far, by the engine's request ids; grows while the request runs.
    """

    request: Any
    raw_request: Request
    resolved: Resolved
    model: str | None
    counts: Mapping[str, list[int]]


class Answer(ABC):
    """Receipt and model name that go into one answer. A subclass knows one form that answers have.

    Attributes:
        headers: that go with the answer.
        outcome: how the answer ended, as far as it was seen.
        ended_by_engine: whether every choice ended where the engine itself ended it, not at a stop string, which only
            this process sees.
    """

    def __init__(self, admitted: Admitted) -> None:
        """Begin an answer.

        Args:
            admitted: the request that it answers.
        """
        self._admitted = admitted
        self.headers = {BUNDLE_HEADER: admitted.resolved.bundles}
        self.outcome: Outcome = "aborted"
        self.ended_by_engine = True

    def finish(self, response: Any) -> Any:
        """Put the receipt on a complete response; errors and disconnects (None) pass as they are."""
        if not isinstance(response, JSONResponse):
            return response
        if response.status_code != HTTPStatus.OK:
            self.outcome = "failed" if response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR else "refused"
            return response
        body = json.loads(bytes(response.body))
        try:
            self._complete(body)
        except SteeringRequestError as error:
            self.outcome = "failed"
            return error.response(route=get_route_path(self._admitted.raw_request.scope))
        self.outcome = "ok"
        kept = {key: value for key, value in response.headers.items() if key not in ("content-length", "content-type")}
        return JSONResponse(body, headers={**kept, **self.headers}, background=response.background)

    async def stream(self, chunks: Any, end: Callable[[Outcome, bool], None]) -> AsyncIterator[str]:
        """Pass a stream on, with the receipt in the event that sums it up.

        Args:
            chunks: vLLM's server-sent events.
            end: told how the stream ended.
        """
        try:
            async with aclosing(self._events(chunks)) as events:
                async for event in events:
                    yield event
        except Exception:
            self.outcome = "failed"
            raise
        finally:
            end(self.outcome, self.ended_by_engine)

    @abstractmethod
    def _complete(self, body: dict[str, Any]) -> None:
        """Put receipt and model name into the body of a whole answer.

        Raises:
            SteeringRequestError: nothing proves that it was steered.
        """

    @abstractmethod
    def _events(self, chunks: Any) -> AsyncGenerator[str]:
        """The events of a stream with receipt and model name."""

    def _name(self, body: dict[str, Any]) -> None:
        """Give a body that names the model the name that was asked for."""
        if self._admitted.model is not None and "model" in body:
            body["model"] = self._admitted.model

    def _receipt(self, num_choices: int = 1) -> Any:
        """JSON of the receipt, from the counts of every choice; a list when the request gave a list.

        Args:
            num_choices: choices of the whole answer.

        Raises:
            SteeringRequestError: a choice has no count, so nothing proves that it was steered.
        """
        resolved, counts = self._admitted.resolved, self._admitted.counts
        if resolved.steering is not None and len(counts) < max(1, num_choices):
            raise SteeringRequestError(
                ErrorCode.NOT_APPLIED,
                f"The workers reported steering {len(counts)} of {num_choices} choices; do not use this answer.",
                HTTPStatus.INTERNAL_SERVER_ERROR,
            )
        totals = [sum(column) for column in zip(*counts.values(), strict=True)]
        receipts = [receipt.to_json() for receipt in resolved.receipts(totals)]
        return receipts if isinstance(self._admitted.request.steering_profile, list) else receipts[0]


def to_data(body: Mapping[str, Any]) -> str:
    """The data line of a server-sent event, and the empty line that ends the event."""
    return f"data: {json.dumps(body, separators=(',', ':'), ensure_ascii=False)}\n\n"
