"""One streamed answer of `/v1/chat/completions`."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from artifacts.errors import quoted
from server.chat.events import event_data
from server.client import SteeringClientError, accepted
from server.inference import receipts, unreachable
from server.schema import Receipt

_PATH = "/v1/chat/completions"
_DONE = "[DONE]"


@dataclass(frozen=True)
class Answer:
    """An answer that came to its end.

    Attributes:
        text: of the answer, without reasoning.
        finish_reason: `stop`, `length`, ...
        receipts: what steered it; empty for an unsteered one.
        num_tokens: generated; None where the server does not say.
        decode_s: from the first text to the last.
    """

    text: str
    finish_reason: str | None
    receipts: tuple[Receipt, ...]
    num_tokens: int | None
    decode_s: float

    @property
    def tokens_per_s(self) -> float | None:
        """Speed after the first token; None with too few to say."""
        if self.num_tokens is None or self.num_tokens < 2 or self.decode_s <= 0:
            return None
        return (self.num_tokens - 1) / self.decode_s


async def ask(http: httpx.AsyncClient, body: Mapping[str, Any], on_text: Callable[[str, bool], None]) -> Answer:
    """Send a request and hear the answer.

    Args:
        http: client of the server.
        body: of the request, without its `stream` fields.
        on_text: called with each text as it comes, and whether it is reasoning.

    Raises:
        SteeringClientError: refused, not reached, or the answer broke off; or a profile was asked for, and there is no
            receipt of it.
    """
    heard = _Heard(on_text)
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with http.stream("POST", _PATH, json=streamed) as response:
            if not response.is_success:
                await response.aread()
            accepted(response)
            async for data in event_data(response.aiter_bytes()):
                if data == _DONE:
                    heard.is_done = True
                    break
                heard.take(data)
    except httpx.RequestError as error:
        raise unreachable(http.base_url, error) from error
    return heard.answer(is_steered=body.get("steering_profile") is not None)


class _Heard:
    """An answer as far as it has come."""

    def __init__(self, on_text: Callable[[str, bool], None]) -> None:
        self._on_text = on_text
        self._texts: list[str] = []
        self._times_s: list[float] = []
        self._finish_reason: str | None = None
        self._receipts: tuple[Receipt, ...] = ()
        self._num_tokens: int | None = None
        self.is_done = False

    def take(self, data: str) -> None:
        """Heed one event."""
        try:
            event = json.loads(data)
            choice = event["choices"][0] if event.get("choices") else {}
            delta = choice.get("delta") or {}
            content, reasoning = delta.get("content"), delta.get("reasoning") or delta.get("reasoning_content")
            usage, error = event.get("usage"), event.get("error")
        except (ValueError, AttributeError, KeyError, IndexError, TypeError):
            raise _not_understood(data) from None
        if error is not None:
            raise _refusal(error, data)
        for text, is_reasoning in ((reasoning, True), (content, False)):
            if isinstance(text, str) and text:
                self._times_s.append(time.monotonic())
                self._texts += [] if is_reasoning else [text]
                self._on_text(text, is_reasoning)
        self._finish_reason = choice.get("finish_reason") or self._finish_reason
        self._receipts = receipts(event) or self._receipts
        if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
            self._num_tokens = usage["completion_tokens"]

    def answer(self, is_steered: bool) -> Answer:
        """The whole answer."""
        if not self.is_done:
            raise SteeringClientError(None, "broken_answer", "The answer broke off; ask again.")
        if is_steered and not self._receipts:
            raise SteeringClientError(
                None,
                "receipt_missing",
                "The server sent no receipt, so the answer may be unsteered; is it an ExpertSteer server?",
            )
        duration_s = self._times_s[-1] - self._times_s[0] if self._times_s else 0.0
        return Answer("".join(self._texts), self._finish_reason, self._receipts, self._num_tokens, duration_s)


def _refusal(error: Any, data: str) -> SteeringClientError:
    """The error that a stream ends with."""
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return _not_understood(data)
    status = error.get("status")
    return SteeringClientError(
        status if isinstance(status, int) else None, str(error.get("code") or "failed"), error["message"]
    )


def _not_understood(data: str) -> SteeringClientError:
    return SteeringClientError(
        None, "bad_answer", f"The answer holds something that this version does not understand: {quoted(data)}."
    )
