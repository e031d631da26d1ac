"""Answers of chat and text completions: choices, streamed in chunks that `[DONE]` ends."""

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from server.errors import SteeringRequestError
from server.routes.answers.answer import Answer, to_data

_DONE = "data: [DONE]"
_ERROR = 'data: {"error":'


class ChoicesAnswer(Answer):
    """An answer of choices. The last chunk of a stream carries the receipt."""

    def _complete(self, body: dict[str, Any]) -> None:
        self._note_ends(body)
        self._name(body)
        body["steering"] = self._receipt(len(body["choices"]))

    async def _events(self, chunks: Any) -> AsyncGenerator[str]:
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
                body = _last_candidate(chunk) if self._admitted.model is None else _json_of(chunk)
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
        """One chunk; `num_choices`, the choices of the whole answer, is given for the last one only."""
        self._name(body)
        if num_choices is not None:
            try:
                body["steering"] = self._receipt(num_choices)
                self.outcome = "ok"
            except SteeringRequestError as error:
                body = error.body()
                self.outcome = "failed"
        return to_data(body)


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
