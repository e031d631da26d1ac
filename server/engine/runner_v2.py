"""Model runner V2 with steering: a mixin put in front of vLLM's own runner class."""

from collections.abc import Iterable
from itertools import repeat
from typing import Any

from server.engine.batch import SteeredBatch
from server.engine.compat import require_signature
from server.engine.ended import ENDS_ATTRIBUTE
from server.engine.layers import SteeredModel
from server.engine.runner import attach, prepare
from server.engine.step_counts import Scheduled


class SteeringRunnerV2:
    """Seams in `vllm.v1.worker.gpu.model_runner.GPUModelRunner` (the CPU runner inherits them):

    * `load_model`: allocate the tables and wrap the decoder layers before anything is compiled or captured.
    * `finish_requests`, `add_requests`: requests come and go here, in every step, also in steps without tokens. A
      preempted request leaves the runner and is added again; its plan stays.
    * `prepare_inputs`: returns the batch in its final order with the tokens that the model will see. Its parameters
      after the first differ from version to version and are handed through. Dummy runs do not call it: capture and
      warm-up see the tables as they were allocated, every token unsteered.
    * `sample_tokens`: returns the step's output, to which the token counts are attached.
    """

    steering: SteeredBatch
    steered_model: SteeredModel

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, then allocate steering storage beside it."""
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        prepare(self)

    def finish_requests(self, scheduler_output: Any) -> None:
        """Forget the requests that have finished, and set those aside that were preempted."""
        ends = getattr(scheduler_output, ENDS_ATTRIBUTE, {})
        for request_id in scheduler_output.finished_req_ids:
            self.steering.remove(request_id, ends.get(request_id))
        for request_id in scheduler_output.preempted_req_ids or ():
            self.steering.pause(request_id)
        super().finish_requests(scheduler_output)  # type: ignore[misc]

    def add_requests(self, scheduler_output: Any) -> None:
        """Take up the requests that are new, or back after a preemption."""
        super().add_requests(scheduler_output)  # type: ignore[misc]
        states: Any = self.req_states  # type: ignore[attr-defined]
        for request in scheduler_output.scheduled_new_reqs:
            num_prompt_tokens = int(states.prompt_len.np[states.req_id_to_index[request.req_id]])
            self.steering.add(request.req_id, request.sampling_params, num_prompt_tokens)

    def prepare_inputs(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """vLLM's `InputBatch`, with what each of its tokens gets on its way to the device."""
        batch: Any = super().prepare_inputs(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        drafts = batch.num_draft_tokens_per_req
        step: list[Scheduled] = []
        if self.steering.plans:
            starts, counts = batch.num_computed_tokens_np.tolist(), batch.num_scheduled_tokens.tolist()
            step = list(map(Scheduled, batch.req_ids, starts, counts, repeat(0) if drafts is None else drafts.tolist()))

        def text_before(index: int) -> Iterable[int]:
            # Waits for the device, which alone knows all tokens; asked for only where a request begins anew.
            num_tokens = step[index].start
            if not num_tokens:
                return ()
            texts = self.req_states.all_token_ids.gpu  # type: ignore[attr-defined]
            tokens: Iterable[int] = texts[batch.idx_mapping_np[index], :num_tokens].tolist()
            return tokens

        self.steering.fill(step, text_before)
        self.steering.finish_fill(batch.input_ids)
        return batch

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample, and attach to the output how many tokens of each steered request have been steered so far."""
        counts = self.steering.counts()
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        return attach(output, counts) if counts else output


def steer_runner_v2(runner: Any) -> None:
    """Turn a vLLM V2 model runner into a steering one, in place, before it loads its model.

    Raises:
        IncompatibleVllmError: its seams look different.
    """
    cls = type(runner)
    require_signature(cls.finish_requests, ("self", "scheduler_output"))
    require_signature(cls.add_requests, ("self", "scheduler_output"))
    require_signature(cls.prepare_inputs, ("self", "scheduler_output"))
    require_signature(cls.sample_tokens, ("self", "grammar_output"))
    runner.__class__ = type(f"Steering{cls.__name__}", (SteeringRunnerV2, cls), {})
