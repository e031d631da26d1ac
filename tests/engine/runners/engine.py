"""An offline vLLM engine, steering, on model runner V1 or V2, in a process of its own.

V2 needs Triton, and without a GPU that is its interpreter. vLLM itself makes V2 work on a CPU; it only wants to see
a "cpu" backend in Triton first.

Reads a job from the standard input and writes its answers to the file named in the arguments.
"""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any


def choose_runner(runner: str) -> None:
    """Make vLLM take "v1" or "v2"; call before anything of it is imported."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(runner == "v2"))
    if runner == "v2":
        os.environ["TRITON_INTERPRET"] = "1"
        from triton import backends

        class InterpretedDriver:
            """What vLLM asks of a driver."""

            @staticmethod
            def is_active() -> bool:
                return True

        backends.backends["cpu"] = backends.Backend(compiler=None, driver=InterpretedDriver)
        from vllm import triton_utils

        assert triton_utils.HAS_TRITON
        # Others, such as torch's compiler, must not take it for one.
        del backends.backends["cpu"]


def start(job: dict[str, Any]) -> Any:
    """An engine with the job's programs resident."""
    import torch
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    from server.engine.config import EngineSettings, enable, worker_cls
    from server.engine.spans import SpanTokens

    # vLLM compiles a function of its sampler even when it is told to be eager.
    torch._dynamo.config.disable = job["eager"]
    spans = {name: SpanTokens(*tokens) for name, tokens in job["spans"].items()}
    settings = EngineSettings(rows=64, fusion=job["fusion"], spans=spans)
    config = EngineArgs(
        model=job["model"],
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=job["eager"],
        disable_log_stats=False,
        worker_cls=worker_cls("cpu"),
        additional_config=settings.additional_config(),
        **job["options"],
    ).create_engine_config()
    # vLLM turns it off on a CPU, where it gains nothing; the order of events is a GPU's all the same.
    config.scheduler_config.async_scheduling = job["async_scheduling"]
    enable(config)
    engine = LLMEngine.from_vllm_config(config)
    for name, (spec, data) in job["programs"].items():
        engine.collective_rpc("steering_load", args=(name, spec, bytes.fromhex(data)))
    return engine


def answers(engine: Any, receipts: Any, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run requests in one batch.

    Returns:
        For each request its tokens, the log-probability of each, the number of prompt tokens found in the cache, and
        how many tokens each term steered (None where no count came).
    """
    finished: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        counts = [stack.enter_context(receipts.expect(f"steering-{index}")) for index in range(len(requests))]
        for index, request in enumerate(requests):
            prompt = {"prompt_token_ids": request["prompt"]}
            engine.add_request(str(index), prompt, _sampling_params(request, f"steering-{index}"))
        while engine.has_unfinished_requests():
            finished |= {int(output.request_id): output for output in engine.step() if output.finished}
        steered = [next(iter(count.values()), None) for count in counts]
    results = []
    for index, count in enumerate(steered):
        completion = finished[index].outputs[0]
        tokens = list(completion.token_ids)
        logprobs = [row[token].logprob for row, token in zip(completion.logprobs, tokens, strict=True)]
        cached = finished[index].num_cached_tokens
        # The prompt's and the generated ones of each term.
        steered_tokens = None if count is None else [sum(pair) for pair in zip(count[::2], count[1::2], strict=True)]
        results.append({"tokens": tokens, "logprobs": logprobs, "cached": cached, "steered": steered_tokens})
    return results


def _sampling_params(request: dict[str, Any], steering_id: str) -> Any:
    from vllm import SamplingParams

    from server.engine.steering import Steering, Term

    terms = tuple(
        Term(bundle, strength, scope, tuple(exclude)) for bundle, strength, scope, exclude in request["terms"]
    )
    return SamplingParams(
        temperature=0.0,
        max_tokens=request["max_tokens"],
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
        extra_args=Steering(steering_id, terms).to_extra_args() if terms else None,
    )


def seen(engine: Any) -> dict[str, Any]:
    """What the engine did, for tests to know that they tested what they meant to."""
    from vllm.v1.metrics.reader import Counter

    core = engine.engine_core.engine_core
    return {
        "runner": core.collective_rpc(lambda worker: type(worker.model_runner).__mro__[2].__module__)[0],
        "is_pipelined": core.batch_queue is not None,
        "counters": {metric.name: metric.value for metric in engine.get_metrics() if isinstance(metric, Counter)},
        "status": engine.collective_rpc("steering_status")[0],
    }


def main(job: dict[str, Any], results: Path) -> None:
    """Run a job: one engine, and its rounds of requests after each other."""
    choose_runner(job["runner"])
    engine = start(job)
    from server.engine.receipts import Receipts

    receipts = Receipts()
    receipts.attach(engine)
    rounds = [answers(engine, receipts, requests) for requests in job["rounds"]]
    results.write_text(json.dumps({"rounds": rounds, **seen(engine)}))
    sys.stdout.flush()
    # Taking everything down would take longer than the tests.
    os._exit(0)


if __name__ == "__main__":
    main(json.load(sys.stdin), Path(sys.argv[1]))
