"""vLLM's layer of chat and text completions, as far as this server builds on it. The rest of it is served untouched.

Seams: the request models (subclassed; `to_sampling_params` is where a request becomes engine parameters) and the route
functions of `/v1/chat/completions` and `/v1/completions`, which are called with the subclass and whose responses are
passed on with a receipt. `server.engine.responses` and `server.engine.messages` are the same for the other two routes.
"""

from typing import Any

from pydantic import BaseModel, PrivateAttr
from vllm.entrypoints.openai.chat_completion.api_router import create_chat_completion
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionResponse
from vllm.entrypoints.openai.completion.api_router import create_completion
from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionResponse
from vllm.entrypoints.openai.models.api_router import show_available_models
from vllm.entrypoints.serve.utils.api_utils import validate_json_request

from server.engine.steering import Steering

__all__ = [
    "ChatCompletionRequest",
    "ChatCompletionResponse",
    "CompletionRequest",
    "CompletionResponse",
    "SteerableRequest",
    "SteeredSampling",
    "create_chat_completion",
    "create_completion",
    "show_available_models",
    "validate_json_request",
]


class SteerableRequest(BaseModel):
    """Mixin for request models: holds the resolved steering."""

    _steering: Steering | None = PrivateAttr(default=None)

    @property
    def steering(self) -> Steering | None:
        """The resolved steering; None for an unsteered request."""
        return self._steering

    def steer_with(self, steering: Steering | None) -> None:
        """Set what the engine will get with this request."""
        self._steering = steering


class SteeredSampling(SteerableRequest):
    """Mixin in front of a vLLM request model: puts the resolved steering into the sampling parameters."""

    def to_sampling_params(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's `SamplingParams` for this request, with the steering among its extra arguments."""
        params = super().to_sampling_params(*args, **kwargs)  # type: ignore[misc]
        if self._steering is not None:
            steering = self._steering.for_answer(constrained=params.structured_outputs is not None)
            params.extra_args = {**(params.extra_args or {}), **steering.to_extra_args()}
        return params
