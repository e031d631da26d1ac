"""One batch of requests that arrive at once, and how long it took."""

import re
import time
from dataclasses import dataclass
from typing import Any, NamedTuple


class Workload(NamedTuple):
    """Requests that arrive at once and generate equally many tokens; written BATCHxPROMPT+GENERATED."""

    batch: int
    input_tokens: int
    output_tokens: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.input_tokens}+{self.output_tokens}"

    @staticmethod
    def of(text: str) -> "Workload":
        """The workload that `str` writes.

        Raises:
            ValueError: it is written otherwise, or there is no time per further token to measure.
        """
        found = re.fullmatch(r"(\d+)x(\d+)\+(\d+)", text)
        workload = Workload(*map(int, found.groups())) if found else Workload(0, 0, 0)
        if min(workload) < 1 or workload.output_tokens < 2:
            raise ValueError(f"{text!r} is not BATCHxPROMPT+GENERATED with at least 2 generated tokens")
        return workload


@dataclass(frozen=True)
class Batch:
    """What an engine is told to run.

    Attributes:
        workload: how many requests, how long.
        seed: prompts are drawn from it.
        resident: bundles that the engine holds meanwhile; 0 for plain vLLM.
        bundles: number of each request's bundle; empty where nobody is steered.
    """

    workload: Workload
    seed: int
    resident: int = 0
    bundles: tuple[int, ...] = ()


@dataclass(frozen=True)
class Turn:
    """Times of one batch, in seconds.

    Attributes:
        seconds: from the first request's arrival to the last one's end.
        cpu_seconds: processor time of the process, all threads.
        ttft: of each request, from its arrival to its first token.
        tpot: of each request, mean time per token after the first.
        tokens: generated token ids of each request.
    """

    seconds: float
    cpu_seconds: float
    ttft: tuple[float, ...]
    tpot: tuple[float, ...]
    tokens: tuple[tuple[int, ...], ...]


@dataclass
class _Request:
    arrival: float
    first: float = 0.0
    last: float = 0.0
    tokens: tuple[int, ...] = ()


def run_turn(engine: Any, batch: Batch) -> Turn:
    """Run a batch on an `LLMEngine` whose residents are as the batch says."""
    import numpy as np

    workload = batch.workload
    rng = np.random.default_rng(batch.seed)
    prompts = rng.integers(10, engine.model_config.get_vocab_size(), (workload.batch, workload.input_tokens)).tolist()
    params = [_sampling_params(batch, index) for index in range(workload.batch)]
    requests: dict[str, _Request] = {}
    cpu_start = time.process_time()
    for index, prompt in enumerate(prompts):
        requests[str(index)] = _Request(arrival=time.perf_counter())
        engine.add_request(str(index), {"prompt_token_ids": prompt}, params[index])
    while engine.has_unfinished_requests():
        outputs = engine.step()
        _note(requests, outputs, time.perf_counter())
    cpu_seconds = time.process_time() - cpu_start
    done = list(requests.values())
    return Turn(
        max(request.last for request in done) - done[0].arrival,
        cpu_seconds,
        tuple(request.first - request.arrival for request in done),
        tuple((request.last - request.first) / (workload.output_tokens - 1) for request in done),
        tuple(request.tokens for request in done),
    )


def _note(requests: dict[str, _Request], outputs: list[Any], now: float) -> None:
    for output in outputs:
        request, tokens = requests[output.request_id], output.outputs[0].token_ids
        if tokens:
            request.first = request.first or now
            request.last, request.tokens = now, tuple(tokens)


def _sampling_params(batch: Batch, index: int) -> Any:
    from bundles import digest
    from vllm import SamplingParams

    from server.engine.steering import Steering, Term

    extra_args = None
    if batch.bundles:
        strength = 0.5 + 0.5 * (index + 1) / batch.workload.batch
        extra_args = Steering(str(index), (Term(digest(batch.bundles[index]), strength, "all"),)).to_extra_args()
    return SamplingParams(
        temperature=0.0,
        max_tokens=batch.workload.output_tokens,
        ignore_eos=True,
        detokenize=False,
        extra_args=extra_args,
    )
