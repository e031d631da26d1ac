"""Model runner V1 with steering: a mixin put in front of vLLM's own runner class."""

import copy
from collections.abc import Iterable
from itertools import repeat
from typing import Any

from server.engine.batch import Sizes, SteeredBatch
from server.engine.compat import IncompatibleVllmError, require_signature
from server.engine.config import EngineSettings
from server.engine.ended import ENDS_ATTRIBUTE
from server.engine.layers import SteeredModel, steer_model
from server.engine.step_counts import Scheduled, StepCounts
from steering_kernels import backends

# Attribute under which a step's ModelRunnerOutput carries the `Counts` of its steered requests.
OUTPUT_ATTRIBUTE = "steering_tokens"


class SteeringRunner:
    """Seams in `vllm.v1.worker.gpu_model_runner.GPUModelRunner` (the CPU runner inherits them):

    * `load_model`: allocate the tables and wrap the decoder layers before anything is compiled or captured.
    * `_update_states`: requests come and go here, in every step, also in steps without tokens.
    * `_prepare_inputs`: called with the batch in its final order. What it leaves in `input_ids.gpu` are the tokens that
      the model will see, also under asynchronous scheduling, when the host does not know the last ones.
    * `sample_tokens`: returns the step's output, to which the token counts are attached.
    """

    steering: SteeredBatch
    steered_model: SteeredModel

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, then allocate steering storage beside it."""
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        prepare(self)

    def _update_states(self, scheduler_output: Any) -> Any:
        ends = getattr(scheduler_output, ENDS_ATTRIBUTE, {})
        for request_id in scheduler_output.finished_req_ids:
            self.steering.remove(request_id, ends.get(request_id))
        for request_id in scheduler_output.preempted_req_ids or ():
            self.steering.pause(request_id)
        for request in scheduler_output.scheduled_new_reqs:
            self.steering.add(request.req_id, request.sampling_params, _num_prompt_tokens(request))
        return super()._update_states(scheduler_output)  # type: ignore[misc]

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        batch: Any = self.input_batch  # type: ignore[attr-defined]
        drafts = scheduler_output.scheduled_spec_decode_tokens
        step: list[Scheduled] = []
        if self.steering.plans:
            # Plain integers at once: one by one they cost more than everything else here.
            starts = batch.num_computed_tokens_cpu[: len(batch.req_ids)].tolist()
            num_drafts = (len(drafts.get(request_id, ())) for request_id in batch.req_ids) if drafts else repeat(0)
            step = list(map(Scheduled, batch.req_ids, starts, num_scheduled_tokens.tolist(), num_drafts))

        def text_before(index: int) -> Iterable[int]:
            tokens: Iterable[int] = batch.token_ids_cpu[index, : step[index].start].tolist()
            return tokens

        self.steering.fill(step, text_before)
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)  # type: ignore[misc]
        self.steering.finish_fill(self.input_ids.gpu)  # type: ignore[attr-defined]
        return prepared

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample, and attach to the output how many tokens of each steered request have been steered so far."""
        counts = self.steering.counts()
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        return attach(output, counts) if counts else output


def prepare(runner: Any) -> None:
    """Allocate steering storage for a runner that has loaded its model, and wrap the model's layers."""
    from vllm.logger import init_logger

    settings = EngineSettings.of(runner.vllm_config)
    model_config = runner.model_config
    sizes = Sizes(
        num_rows=settings.rows,
        num_layers=model_config.get_total_num_hidden_layers(),
        hidden_size=model_config.get_hidden_size(),
        vocab_size=model_config.get_vocab_size(),
        max_num_reqs=runner.max_num_reqs,
        max_num_tokens=runner.max_num_tokens,
    )
    runner.steering = SteeredBatch(sizes, model_config.dtype, runner.device, settings.spans)
    parallel = runner.vllm_config.parallel_config
    runner.steered_model = steer_model(
        runner.get_model(),
        sizes.num_layers,
        runner.steering,
        fuse=settings.fuses(runner.vllm_config, runner.device.type),
        is_sharded=parallel.tensor_parallel_size > 1,
    )
    rows = runner.steering.pool.rows
    init_logger("vllm.expertsteer").info(
        "Steering layers %s with the RMSNorm that follows, layers %s in place; %s kernels.",
        list(runner.steered_model.fused),
        list(runner.steered_model.in_place),
        backends.name(rows.device.type, rows.dtype),
    )


def attach(output: Any, counts: StepCounts) -> Any:
    """Put the counts on a ModelRunnerOutput (its pickle keeps instance attributes), now or when it arrives."""
    from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

    if isinstance(output, ModelRunnerOutput):
        sampled = {
            request_id: len(tokens)
            for request_id, tokens in zip(output.req_ids, output.sampled_token_ids, strict=False)
        }
        # A stage of a pipeline that is not the last returns one object that all steps share.
        output = copy.copy(output)
        setattr(output, OUTPUT_ATTRIBUTE, counts.read(sampled))
        return output
    if not isinstance(output, AsyncModelRunnerOutput):
        return output

    class CountedOutput(AsyncModelRunnerOutput):
        def get_output(self) -> Any:
            return attach(output.get_output(), counts)

    return CountedOutput()


def _num_prompt_tokens(request: Any) -> int:
    """Prompt length of a NewRequestData: token ids, or embeddings [num_tokens, hidden_size] where there are no ids."""
    prompt = request.prompt_embeds if request.prompt_token_ids is None else request.prompt_token_ids
    return len(prompt)


def steer_runner(runner: Any) -> None:
    """Turn a vLLM V1 model runner into a steering one, in place, before it loads its model.

    Raises:
        IncompatibleVllmError: the runner is not a V1 runner or its seams look different.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    cls = type(runner)
    if not isinstance(runner, GPUModelRunner):
        raise IncompatibleVllmError(
            f"Steering works on vLLM's model runners for GPUs and CPUs, this worker has {cls.__module__}."
            f"{cls.__qualname__}."
        )
    require_signature(cls._update_states, ("self", "scheduler_output"))
    require_signature(cls._prepare_inputs, ("self", "scheduler_output", "num_scheduled_tokens"))
    require_signature(cls.sample_tokens, ("self", "grammar_output"))
    runner.__class__ = type(f"Steering{cls.__name__}", (SteeringRunner, cls), {})
