"""Answers whose streams are of named events, one of which sums the answer up."""

import json
import logging
from abc import abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing
from http import HTTPStatus
from typing import Any, ClassVar

from server.errors import ErrorCode, SteeringRequestError
from server.routes.answers.answer import Answer, to_data

logger = logging.getLogger("vllm.expertsteer")

_EVENT, _DATA = "event: ", "data: "
_BROKEN = SteeringRequestError(
    ErrorCode.NOT_APPLIED,
    "The engine failed before the answer was complete; do not use it, and try again.",
    HTTPStatus.INTERNAL_SERVER_ERROR,
    None,
)
_ERROR = "error"


class EventAnswer(Answer):
    """An answer that streams as named events.

    Attributes:
        OPENING: events that name the model and do not sum up.
        CLOSING: events that sum up; the stream has one of them, and it carries the receipt.
        FAILING: events that say that there will be no answer.
    """

    OPENING: ClassVar[frozenset[str]]
    CLOSING: ClassVar[frozenset[str]]
    FAILING: ClassVar[frozenset[str]] = frozenset({_ERROR})

    async def _events(self, chunks: Any) -> AsyncGenerator[str]:
        chunk = ""
        try:
            async with aclosing(self._amended(chunks)) as events:
                async for chunk in events:
                    yield chunk
        except Exception:
            # Where vLLM has no event for an engine that fails; without one, clients take the end for the answer's.
            logger.exception("A stream broke off.")
            self.outcome = "failed"
            number = _body_of(chunk).get("sequence_number", -1) if chunk.startswith(_EVENT) else -1
            yield _event(_ERROR, self._error(_BROKEN, {"sequence_number": number + 1}))

    async def _amended(self, chunks: Any) -> AsyncGenerator[str]:
        has_failed = False
        async with aclosing(chunks):
            async for chunk in chunks:
                name = _name_of(chunk)
                has_failed = has_failed or name in self.FAILING
                if name in self.CLOSING:
                    body = _body_of(chunk)
                    try:
                        self._close(body)
                    except SteeringRequestError as error:
                        self.outcome = "failed"
                        yield _event(_ERROR, self._error(error, body))
                        # What follows would make the answer look complete.
                        return
                    self.outcome = "ok"
                    yield _event(name, body)
                elif name in self.OPENING and self._admitted.model is not None:
                    body = _body_of(chunk)
                    self._open(body)
                    yield _event(name, body)
                else:
                    yield chunk
        if has_failed:
            self.outcome = "failed"

    @abstractmethod
    def _open(self, body: dict[str, Any]) -> None:
        """Put the model's name into an opening event."""

    @abstractmethod
    def _close(self, body: dict[str, Any]) -> None:
        """Put receipt and model name into a closing event.

        Raises:
            SteeringRequestError: nothing proves that the answer was steered.
        """

    @abstractmethod
    def _error(self, error: SteeringRequestError, body: dict[str, Any]) -> dict[str, Any]:
        """Body of the error event that takes the place of a closing event."""


def _name_of(chunk: str) -> str:
    """Name of a server-sent event; empty for a comment or an event without one."""
    return chunk[len(_EVENT) :].partition("\n")[0] if chunk.startswith(_EVENT) else ""


def _body_of(chunk: str) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(chunk.partition(f"\n{_DATA}")[2])
    return body


def _event(name: str, body: dict[str, Any]) -> str:
    return f"{_EVENT}{name}\n{to_data(body)}"
