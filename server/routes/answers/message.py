"""Answers of `/v1/messages`."""

from collections.abc import Mapping
from typing import Any

from server.errors import SteeringRequestError
from server.routes.answers.events import EventAnswer


class MessageAnswer(EventAnswer):
    """A message."""

    OPENING = frozenset({"message_start"})
    CLOSING = frozenset({"message_delta"})

    def _complete(self, body: dict[str, Any]) -> None:
        self._note_end(body)
        self._name(body)
        body["steering"] = self._receipt()

    def _open(self, body: dict[str, Any]) -> None:
        self._name(body["message"])

    def _close(self, body: dict[str, Any]) -> None:
        self._note_end(body["delta"])
        body["steering"] = self._receipt()

    def _note_end(self, body: Mapping[str, Any]) -> None:
        """A stop string may hide behind complete tool calls; an abort has no reason."""
        reason = body.get("stop_reason")
        is_certain = reason in ("end_turn", "max_tokens")
        self.ended_by_engine = is_certain or (reason == "tool_use" and not self._admitted.request.stop_sequences)

    def _error(self, error: SteeringRequestError, body: dict[str, Any]) -> dict[str, Any]:
        return error.anthropic_body()
