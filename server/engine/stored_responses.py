"""The answers that vLLM keeps for `GET /v1/responses/{id}`, when the operator has told it to."""

from collections.abc import MutableMapping
from typing import Any


class StoredResponses:
    """The answers that vLLM keeps in its memory, by id."""

    def __init__(self, handler: Any) -> None:
        """Use those of a server.

        Args:
            handler: vLLM's `OpenAIServingResponses` of this server.
        """
        self._store: MutableMapping[str, Any] = handler.response_store

    def amend(self, request: Any, model: str | None, receipt: Any) -> None:
        """Put the receipt on the answer that was kept of a request, if it was.

        Args:
            request: vLLM's `ResponsesRequest`, answered. It has cleared its `store` if it keeps nothing.
            model: name of the model that the answer shall have; None leaves it.
            receipt: JSON of the receipt.
        """
        kept = self._store.get(request.request_id) if request.store else None
        if kept is not None:
            changes = {"steering": receipt} if model is None else {"steering": receipt, "model": model}
            self._store[request.request_id] = kept.model_copy(update=changes)

    def drop(self, request: Any) -> None:
        """Forget the answer that was kept of a request: nothing proves that it was steered."""
        if request.store:
            self._store.pop(request.request_id, None)
