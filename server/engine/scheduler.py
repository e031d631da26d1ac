"""Scheduler classes for engine core: they key the prefix cache and send token counts home.

The block hashes live in the engine-core process, which no worker class reaches. A scheduler class is named in the
configuration like the worker class, so engine core imports this module or does not start; vLLM merely logs a general
plugin that fails.
"""

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from server.engine import cache_keys
from server.engine.compat import require_signature
from server.engine.receipts import TOKENS_HEADER
from server.engine.runner import OUTPUT_ATTRIBUTE
from server.engine.steering import END, Steering


class _SteeringScheduler:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        require_signature(Scheduler.update_from_output, ("self", "scheduler_output", "model_runner_output"))
        # Before the first request is hashed: engine core builds its block hasher's closure around the module global.
        cache_keys.install()
        super().__init__(*args, **kwargs)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Pass the workers' token counts on with the outputs of the requests they belong to."""
        counts = getattr(model_runner_output, OUTPUT_ATTRIBUTE, None) or {}
        # Before vLLM forgets the requests that end with this step, and cuts off what they got behind their end.
        requests = {request_id: self.requests.get(request_id) for request_id in counts}  # type: ignore[attr-defined]
        num_sampled = {
            request_id: len(model_runner_output.sampled_token_ids[model_runner_output.req_id_to_index[request_id]])
            for request_id in counts
            if model_runner_output.sampled_token_ids
        }
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        for client_outputs in outputs.values():
            for output in client_outputs.outputs:
                # With every output, because an answer may end where only the API process sees it: at a stop string.
                if output.request_id in counts:
                    steering_id, tokens = counts[output.request_id]
                    surplus = num_sampled.get(output.request_id, 0) - len(output.new_token_ids)
                    tokens = _without(surplus, tokens, requests[output.request_id])
                    headers = {TOKENS_HEADER: f"{steering_id}:{','.join(map(str, tokens))}"}
                    output.trace_headers = {**(output.trace_headers or {}), **headers}
        return outputs


def _without(num_surplus: int, tokens: Sequence[int], request: Any) -> Sequence[int]:
    """Counts without accepted drafts behind the end of the answer, which only the scheduler knows.

    Args:
        num_surplus: how many the scheduler took off.
        tokens: tokens steered by term.
        request: vLLM's `Request`.
    """
    steering = Steering.from_sampling_params(request.sampling_params) if num_surplus > 0 else None
    if steering is None:
        return tokens
    ends = [term.positions(request.num_prompt_tokens).stop for term in steering.terms]
    return [count - num_surplus if end == END else count for count, end in zip(tokens, ends, strict=True)]


class SteeringScheduler(_SteeringScheduler, Scheduler):
    """vLLM's scheduler, steering."""


class SteeringAsyncScheduler(_SteeringScheduler, AsyncScheduler):
    """vLLM's asynchronous scheduler, steering."""
