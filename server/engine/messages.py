"""vLLM's layer of `/v1/messages`, as far as this server builds on it.

Seam: `AnthropicServingMessages.to_chat_completion_request`, wrapped on the instance. vLLM answers a message by way of
a chat completion, and this is where the one becomes the other: so the steering goes along.
"""

from typing import Any

from vllm.entrypoints.anthropic.api_router import count_tokens, create_messages
from vllm.entrypoints.anthropic.protocol import (
    AnthropicCountTokensRequest,
    AnthropicCountTokensResponse,
    AnthropicMessagesRequest,
    AnthropicMessagesResponse,
)
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

from server.engine.compat import require_signature
from server.engine.openai import ChatCompletionRequest, SteerableRequest, SteeredSampling

__all__ = [
    "AnthropicCountTokensRequest",
    "AnthropicCountTokensResponse",
    "AnthropicMessagesRequest",
    "AnthropicMessagesResponse",
    "attach",
    "count_tokens",
    "create_messages",
]


class _SteeredChat(SteeredSampling, ChatCompletionRequest):
    """The chat completion that vLLM makes of a message request."""


def attach(handler: Any) -> None:
    """Let the chat completions of steered message requests be steered as those are.

    Args:
        handler: vLLM's `AnthropicServingMessages` of this server.

    Raises:
        IncompatibleVllmError: the seam looks different.
    """
    original = handler.to_chat_completion_request
    require_signature(original, ("anthropic_request", "merge_inline_system", "disabled_thinking_effort"))
    require_signature(AnthropicServingMessages.create_messages, ("self", "request", "raw_request"))
    require_signature(create_messages, ("request", "raw_request"))
    require_signature(count_tokens, ("request", "raw_request"))

    def to_chat_completion_request(anthropic_request: Any, **options: Any) -> ChatCompletionRequest:
        chat: ChatCompletionRequest = original(anthropic_request, **options)
        if not isinstance(anthropic_request, SteerableRequest) or anthropic_request.steering is None:
            return chat
        # Validated already: the fields go over as they are.
        steered = _SteeredChat.model_construct(set(chat.model_fields_set), **dict(chat))
        steered.steer_with(anthropic_request.steering)
        return steered

    handler.to_chat_completion_request = to_chat_completion_request
