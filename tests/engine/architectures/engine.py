"""vLLM, steering, in processes of its own: one for every job, forked from one that has imported vLLM and nothing more.

Apart from the reference because importing vLLM changes the process that does it. Forked because the import takes longer
than everything that a tiny model does.

Each line of the standard input names the folder of a job: `job.json` is read, `answers.json` and `log.txt` are written.
The job's exit status is a line of the standard output: `START_FAILED`, `REQUESTS_FAILED` or 0.
"""

import gc
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

START_FAILED, REQUESTS_FAILED = 2, 3
_NUM_TOP = 8
_NUM_ROWS = 256
_PRELOADED = (
    "torch._inductor.compile_fx",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.transformers",
)


def start(job: dict[str, Any]) -> Any:
    """An offline engine in this process."""
    import torch
    from vllm import EngineArgs, ModelRegistry
    from vllm.v1.engine.llm_engine import LLMEngine

    from server.engine.config import EngineSettings, enable, worker_cls

    # vLLM compiles a function of its sampler even when it is told to be eager.
    torch._dynamo.config.disable = job["eager"]
    # A class that is loaded already needs no further process, importing all of vLLM, to be inspected in.
    for name in job["architectures"]:
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())
    config = EngineArgs(
        model=job["model"],
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=job["max_model_len"],
        max_num_batched_tokens=job["max_num_batched_tokens"],
        max_num_seqs=len(job["requests"]),
        enforce_eager=job["eager"],
        disable_log_stats=True,
        worker_cls=worker_cls("cpu"),
        additional_config=EngineSettings(rows=_NUM_ROWS, fusion=job["fusion"]).additional_config(),
    ).create_engine_config()
    enable(config)
    return LLMEngine.from_vllm_config(config, disable_log_stats=True)


def answers(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Load the job's bundles and run all its requests in one batch.

    Returns:
        The steering status, and for each request its generated tokens and, for every token but the first, prompt
        included, log-probabilities by token id: the token's own and the likeliest.
    """
    for name, (spec, data) in job["bundles"].items():
        engine.collective_rpc("steering_load", args=(name, spec, bytes.fromhex(data)))
    for index, request in enumerate(job["requests"]):
        params = _sampling_params(request, job["max_tokens"])
        engine.add_request(f"{index:06d}", {"prompt_token_ids": request["prompt"]}, params)
    finished: dict[str, Any] = {}
    while engine.has_unfinished_requests():
        finished |= {output.request_id: output for output in engine.step() if output.finished}
    status = engine.collective_rpc("steering_status")[0]
    return {"status": status, "answers": [_answer(finished[request_id]) for request_id in sorted(finished)]}


def _answer(output: Any) -> dict[str, Any]:
    completion = output.outputs[0]
    rows = [*output.prompt_logprobs[1:], *completion.logprobs]
    return {
        "tokens": list(completion.token_ids),
        "logprobs": [{token: entry.logprob for token, entry in row.items()} for row in rows],
    }


def _sampling_params(request: dict[str, Any], max_tokens: int) -> Any:
    from vllm import SamplingParams

    from server.engine.steering import Steering, Term

    extra_args = None
    if request["bundle"] is not None:
        term = Term(request["bundle"], request["strength"], "all")
        extra_args = Steering(request["bundle"], (term,)).to_extra_args()
    return SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=_NUM_TOP,
        prompt_logprobs=_NUM_TOP,
        extra_args=extra_args,
    )


def run_apart(folder: Path) -> int:
    """One job, in a process of its own; its exit status."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    status = START_FAILED
    try:
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        job = json.loads((folder / "job.json").read_text())
        engine = start(job)
        status = REQUESTS_FAILED
        (folder / "answers.json").write_text(json.dumps(answers(engine, job)))
        status = 0
    except BaseException:  # noqa: BLE001 - the boundary of a process: its last words go to the log
        traceback.print_exc()
    sys.stdout.flush()
    # Without the engine's shutdown, which takes longer than the job.
    os._exit(status)


if __name__ == "__main__":
    for module in _PRELOADED:
        importlib.import_module(module)
    # What was imported stays: without this every collection of a fork would walk through it.
    gc.freeze()
    for line in sys.stdin:
        sys.stdout.write(f"{run_apart(Path(line.strip()))}\n")
        sys.stdout.flush()
