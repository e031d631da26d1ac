"""Answers of `/v1/responses`."""

from typing import Any

from server.engine.stored_responses import StoredResponses
from server.errors import SteeringRequestError
from server.routes.answers.answer import Admitted
from server.routes.answers.events import EventAnswer


class ResponseAnswer(EventAnswer):
    """A response. What vLLM keeps of it for `GET /v1/responses/{id}` carries the receipt too."""

    OPENING = frozenset({"response.queued", "response.created", "response.in_progress", "response.failed"})
    CLOSING = frozenset({"response.completed", "response.incomplete"})
    FAILING = frozenset({"error", "response.failed"})

    def __init__(self, admitted: Admitted) -> None:
        super().__init__(admitted)
        # Nothing in a response says whether a stop string has ended it.
        self.ended_by_engine = not admitted.request.stop
        self._stored = StoredResponses(admitted.raw_request.app.state.openai_serving_responses)

    def _complete(self, body: dict[str, Any]) -> None:
        request, model = self._admitted.request, self._admitted.model
        try:
            receipt = self._receipt()
        except SteeringRequestError:
            self._stored.drop(request)
            raise
        self._stored.amend(request, model, receipt)
        self._name(body)
        body["steering"] = receipt

    def _open(self, body: dict[str, Any]) -> None:
        self._name(body["response"])

    def _close(self, body: dict[str, Any]) -> None:
        self._complete(body["response"])

    def _error(self, error: SteeringRequestError, body: dict[str, Any]) -> dict[str, Any]:
        # The members of OpenAI's error event, and `error`, at which its clients raise.
        event = {"type": "error", "code": error.code.value, "message": str(error), "param": error.param}
        return {**event, "sequence_number": body["sequence_number"], **error.body()}
