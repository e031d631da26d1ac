"""Scheduler classes for engine core: they key the prefix cache, guard the workers and send token counts home.

The block hashes live in the engine-core process, which no worker class reaches. A scheduler class is named in the
configuration like the worker class, so engine core imports this module or does not start; vLLM merely logs a general
plugin that fails.
"""

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from server.engine import cache_keys, core
from server.engine.compat import require_signature
from server.engine.config import EngineSettings
from server.engine.ended import ENDS_ATTRIBUTE, End
from server.engine.parent import end_with_parent
from server.engine.receipts import TOKENS_HEADER
from server.engine.runner import OUTPUT_ATTRIBUTE
from server.engine.steering import END, Steering, keys_of


class _SteeringScheduler:
    """Mixin in front of a vLLM scheduler.

    Attributes:
        steering: this replica's bundles; `server.engine.core` finds it here.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        require_signature(Scheduler.update_from_output, ("self", "scheduler_output", "model_runner_output"))
        require_signature(Scheduler._free_request, ("self", "request"))
        # Before the first request is hashed: engine core builds its block hasher's closure around the module global.
        cache_keys.install()
        core.install()
        end_with_parent()
        super().__init__(*args, **kwargs)
        settings = EngineSettings.of(self.vllm_config)  # type: ignore[attr-defined]
        self.steering = core.SteeringCore(self, settings.spans)
        self._ends: dict[str, End] = {}

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Count the cache lookups of the step's new requests, and tell the workers where steered answers ended."""
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        for new in output.scheduled_new_reqs:
            self._count_lookup(self.requests[new.req_id], new.num_computed_tokens)  # type: ignore[attr-defined]
        if self._ends:
            # The pickle of a SchedulerOutput keeps instance attributes.
            setattr(output, ENDS_ATTRIBUTE, self._ends)
            self._ends = {}
        return output

    def _count_lookup(self, request: Any, num_found: int) -> None:
        caches = self.cache_config.enable_prefix_caching  # type: ignore[attr-defined]
        # A preempted request finds its own blocks.
        if caches and request.num_preemptions == 0 and not request.skip_reading_prefix_cache:
            is_steered = bool(keys_of(request.sampling_params))
            self.steering.cache.add(is_steered, request.num_prompt_tokens, num_found)

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        if keys_of(request.sampling_params):
            # The last token of an answer is never fed back. Workers may have computed more than this: the step that
            # was under way when the answer ended, and accepted drafts behind its end.
            is_aborted = request.status == RequestStatus.FINISHED_ABORTED
            self._ends[request.request_id] = End(request.num_tokens - 1, is_aborted)
        return super()._free_request(request, *args, **kwargs)  # type: ignore[misc]

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
        tokens: tokens steered, see `RequestPlan.tokens_steered`.
        request: vLLM's `Request`.
    """
    steering = Steering.from_sampling_params(request.sampling_params) if num_surplus > 0 else None
    if steering is None:
        return tokens
    left = list(tokens)
    for number, term in enumerate(steering.terms):
        if term.positions(request.num_prompt_tokens).stop == END:
            # Drafts are generation.
            left[2 * number + 1] -= num_surplus
    return left


class SteeringScheduler(_SteeringScheduler, Scheduler):
    """vLLM's scheduler, steering."""


class SteeringAsyncScheduler(_SteeringScheduler, AsyncScheduler):
    """vLLM's asynchronous scheduler, steering."""
