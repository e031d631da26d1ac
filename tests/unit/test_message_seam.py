"""Steering of a message goes along when vLLM makes a chat completion of it.

In a process of its own, because vLLM's import warns.
"""

import subprocess
import sys

_CHECK = """
from server.engine.compat import IncompatibleVllmError
from server.engine.messages import attach
from server.engine.openai import ChatCompletionRequest
from server.engine.responses import require_responses
from server.engine.steering import CONSTRAINED, Steering, Term
from server.routes.messages import SteeredMessagesRequest
from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

STEERING = Steering("id", (Term("sha256:ab", 0.5, "all", (CONSTRAINED,)),))
BODY = {
    "model": "lab",
    "messages": [{"role": "user", "content": "Hello"}],
    "system": "Be brief.",
    "max_tokens": 7,
    "stop_sequences": ["."],
    "stream": True,
    "temperature": 0.5,
    "top_k": 3,
    "vllm_xargs": {"note": "x"},
    "tools": [{"name": "add", "input_schema": {"type": "object"}}],
    "tool_choice": {"type": "auto"},
}
SCHEMA = {"output_config": {"format": {"type": "json_schema", "schema": {"enum": [1]}}}}


def extra_args(chat):
    return chat.to_sampling_params(100, {}).extra_args


handler = object.__new__(AnthropicServingMessages)
attach(handler)
convert = handler.to_chat_completion_request

plain = convert(SteeredMessagesRequest(**BODY), merge_inline_system=False)
assert type(plain) is ChatCompletionRequest
assert extra_args(plain) == {"note": "x"}
assert type(convert(AnthropicCountTokensRequest(model="lab", messages=[]))) is ChatCompletionRequest

request = SteeredMessagesRequest(**BODY)
request.steer_with(STEERING)
steered = convert(request, merge_inline_system=True, disabled_thinking_effort="low")
changes = {"request_id": plain.request_id}
assert steered.model_copy(update=changes).model_dump() == plain.model_dump()
assert steered.model_fields_set == plain.model_fields_set
assert extra_args(steered) == {"note": "x", **STEERING.for_answer(constrained=False).to_extra_args()}

request = SteeredMessagesRequest(**BODY, **SCHEMA)
request.steer_with(STEERING)
assert extra_args(convert(request)) == {"note": "x", **STEERING.to_extra_args()}


class Other(AnthropicServingMessages):
    def to_chat_completion_request(self, message, **options):
        raise AssertionError


for check, other in ((attach, object.__new__(Other)), (require_responses, object())):
    try:
        check(other)
    except IncompatibleVllmError:
        continue
    raise AssertionError(check)
print("DONE")
"""


def test_the_seam() -> None:
    done = subprocess.run([sys.executable, "-c", _CHECK], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("DONE\n")
