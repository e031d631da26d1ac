"""Model runner V1 with steering: a mixin put in front of vLLM's own runner class."""

from collections.abc import Mapping
from typing import Any

from server.engine.compat import IncompatibleVllmError, require_signature
from server.engine.layers import find_decoder_layers, wrap_layers
from server.engine.plan import RequestPlan
from server.engine.slots import RowPool, SlotKey, SlotTable, TokenTable
from server.engine.steering import Steering

# Segments that one request can have at the same time in one step: before, at and after the end of its prompt.
SLOTS_PER_REQUEST = 3

# Attribute under which a step's ModelRunnerOutput carries {request id: (steering id, tokens steered so far by term)}.
OUTPUT_ATTRIBUTE = "steering_tokens"


class SteeringRunner:
    """Seams in `vllm.v1.worker.gpu_model_runner.GPUModelRunner` (the CPU runner inherits them):

    * `load_model`: allocate the tables and wrap the decoder layers before anything is compiled or captured.
    * `_update_states`: requests come and go here, in every step, also in steps without tokens.
    * `_prepare_inputs`: called with the batch in its final order, inside `synchronize_input_prep`, which keeps host
      buffers from being rewritten under an asynchronous copy.
    * `sample_tokens`: returns the step's output, to which the token counts are attached.
    """

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, then allocate steering storage beside it."""
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        runner: Any = self
        config = runner.vllm_config.additional_config["expertsteer"]
        model_config = runner.model_config
        num_layers = model_config.get_total_num_hidden_layers()
        layers = find_decoder_layers(runner.get_model(), num_layers)
        num_slots = SLOTS_PER_REQUEST * runner.max_num_reqs + 1
        self.row_pool = RowPool(config["rows"], model_config.get_hidden_size(), model_config.dtype, runner.device)
        self.slot_table = SlotTable(self.row_pool, num_layers, num_slots)
        self.token_table = TokenTable(runner.max_num_tokens, runner.device)
        self.plans: dict[str, RequestPlan] = {}
        wrap_layers(
            layers,
            self.row_pool.rows,
            self.slot_table.write_rows,
            self.slot_table.scales,
            self.token_table.slot_ids,
            self.token_table.strengths,
        )

    def _update_states(self, scheduler_output: Any) -> Any:
        for request_id in scheduler_output.finished_req_ids:
            self.plans.pop(request_id, None)
        for request in scheduler_output.scheduled_new_reqs:
            steering = Steering.from_sampling_params(request.sampling_params)
            # An unknown digest cannot come from the API, which resolves names against the same registry. Raising here
            # would end the engine; without a plan the count stays absent and the API refuses the answer.
            if steering is not None and all(term.bundle in self.row_pool for term in steering.terms):
                self.plans[request.req_id] = RequestPlan(steering, _num_prompt_tokens(request))
        return super()._update_states(scheduler_output)  # type: ignore[misc]

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        self._fill_token_table(num_scheduled_tokens)
        return super()._prepare_inputs(scheduler_output, num_scheduled_tokens)  # type: ignore[misc]

    def _fill_token_table(self, num_scheduled_tokens: Any) -> None:
        table = self.token_table
        table.clear()
        if not self.plans:
            table.publish(0)
            return
        batch = self.input_batch  # type: ignore[attr-defined]
        computed = batch.num_computed_tokens_cpu
        first = num_tokens = 0
        for index, request_id in enumerate(batch.req_ids):
            count = int(num_scheduled_tokens[index])
            plan = self.plans.get(request_id)
            if plan is not None:
                start = int(computed[index])
                plan.advance(start + count)
                for segment in plan.segments:
                    low, high = max(segment.start, start), min(segment.stop, start + count)
                    if low < high:
                        tokens = slice(first + low - start, first + high - start)
                        table.host_slot_ids[tokens] = self.slot_table.slot_of(segment.key, self._keys_in_batch)
                        table.host_strengths[tokens] = segment.strength
                        num_tokens = tokens.stop
            first += count
        table.publish(num_tokens)

    def _keys_in_batch(self) -> set[SlotKey]:
        return {
            segment.key
            for request_id in self.input_batch.req_ids  # type: ignore[attr-defined]
            if (plan := self.plans.get(request_id))
            for segment in plan.segments
        }

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample, and attach to the output how many tokens of each steered request have been steered so far."""
        counts = {
            request_id: (plan.steering_id, tuple(plan.tokens_steered))
            for request_id in self.input_batch.req_ids  # type: ignore[attr-defined]
            if (plan := self.plans.get(request_id))
        }
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        return _attach(output, counts) if counts else output


def _num_prompt_tokens(request: Any) -> int:
    """Prompt length of a NewRequestData: token ids, or embeddings [num_tokens, hidden_size] where there are no ids."""
    prompt = request.prompt_embeds if request.prompt_token_ids is None else request.prompt_token_ids
    return len(prompt)


def _attach(output: Any, counts: Mapping[str, tuple[str, tuple[int, ...]]]) -> Any:
    """Put the counts on a ModelRunnerOutput (its pickle keeps instance attributes), now or when it arrives."""
    from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

    if isinstance(output, ModelRunnerOutput):
        setattr(output, OUTPUT_ATTRIBUTE, counts)
        return output
    if not isinstance(output, AsyncModelRunnerOutput):
        return output

    class CountedOutput(AsyncModelRunnerOutput):
        def get_output(self) -> Any:
            return _attach(output.get_output(), counts)

    return CountedOutput()


def steer_runner(runner: Any) -> None:
    """Turn a vLLM V1 model runner into a steering one, in place, before it loads its model.

    Raises:
        IncompatibleVllmError: the runner is not a V1 runner or its seams look different.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    cls = type(runner)
    if not isinstance(runner, GPUModelRunner):
        raise IncompatibleVllmError(
            f"Steering works on model runner V1, this worker has {cls.__module__}.{cls.__qualname__}; "
            "set VLLM_USE_V2_MODEL_RUNNER=0."
        )
    require_signature(cls._update_states, ("self", "scheduler_output"))
    require_signature(cls._prepare_inputs, ("self", "scheduler_output", "num_scheduled_tokens"))
    require_signature(cls.sample_tokens, ("self", "grammar_output"))
    runner.__class__ = type(f"Steering{cls.__name__}", (SteeringRunner, cls), {})
