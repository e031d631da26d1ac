"""vLLM's layer of `/v1/responses`, as far as this server builds on it.

Seams: the request model (subclassed, as in `server.engine.openai`), the route function, and the answers that vLLM keeps
(`server.engine.stored_responses`).
"""

from typing import Any

from vllm.entrypoints.openai.responses.api_router import create_responses
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

from server.engine.compat import IncompatibleVllmError, require_signature

__all__ = ["ResponsesRequest", "ResponsesResponse", "create_responses", "require_responses"]


def require_responses(handler: Any) -> None:
    """Refuse a vLLM whose layer of responses looks different.

    Args:
        handler: vLLM's `OpenAIServingResponses` of this server.

    Raises:
        IncompatibleVllmError: a seam differs.
    """
    require_signature(ResponsesRequest.to_sampling_params, ("self", "default_max_tokens", "default_sampling_params"))
    require_signature(OpenAIServingResponses.create_responses, ("self", "request", "raw_request"))
    require_signature(create_responses, ("request", "raw_request"))
    if not isinstance(getattr(handler, "response_store", None), dict):
        raise IncompatibleVllmError(
            "vLLM's OpenAIServingResponses has no dictionary response_store. Install a supported vLLM."
        )
