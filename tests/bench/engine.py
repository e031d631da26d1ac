"""A vLLM engine in a process of its own that runs one batch when told to and sleeps otherwise."""

import importlib.util
import os
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_START_TIMEOUT_S = 600.0
_TURN_TIMEOUT_S = 600.0
# Enough to change the generated tokens, by which a turn proves that it was steered.
_VECTOR_NORM = 4.0


def _openmp() -> dict[str, str]:
    """vLLM's own choice for CPU workers: torch's OpenMP, preloaded, one thread bound to each core."""
    spec = importlib.util.find_spec("torch")
    folder = Path(spec.origin).parent / "lib" if spec and spec.origin else Path()
    cores = sorted(os.sched_getaffinity(0))
    return {
        "LD_PRELOAD": ":".join(str(library) for library in sorted(folder.glob("libgomp*.so*"))[:1]),
        "OMP_NUM_THREADS": str(len(cores)),
        "GOMP_CPU_AFFINITY": " ".join(map(str, cores)),
        "OMP_WAIT_POLICY": "PASSIVE",
    }


# Of both engines alike; set before their processes start, because OpenMP reads it when it is loaded.
ENVIRONMENT = {
    **_openmp(),
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class EngineError(RuntimeError):
    """An engine did not start or did not finish its turn; the message ends with its last words."""


class Mode(StrEnum):
    """What a turn measures."""

    PLAIN = "plain"
    IDLE = "idle"
    STEERED = "steered"


@dataclass(frozen=True)
class Workload:
    """One batch: all requests arrive at once and generate equally many tokens."""

    batch: int
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Turn:
    """Times of one batch.

    Attributes:
        seconds: from the first request's arrival to the last one's end.
        cpu_seconds: processor time of the process, all threads.
        decode_seconds: of each engine step after the first, which processes the prompts.
        tokens: generated token ids by request.
    """

    seconds: float
    cpu_seconds: float
    decode_seconds: tuple[float, ...]
    tokens: tuple[tuple[int, ...], ...]


class Engine:
    """Context manager around the process of one engine.

    Attributes:
        about: device, versions and steering kernel, as the engine sees them.
    """

    def __init__(self, model: Path, log: Path, workload: Workload, *, steering: bool, eager: bool) -> None:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._log = log
        self._process = context.Process(target=_serve, args=(theirs, model, log, workload, steering, eager))
        self._process.start()
        theirs.close()
        self.about: dict[str, str] = {}

    def __enter__(self) -> Self:
        try:
            self.about = self._receive(_START_TIMEOUT_S)
        except EngineError:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def run(self, mode: Mode, seed: int) -> Turn:
        """Run one batch with prompts drawn from `seed`."""
        self._connection.send((mode, seed))
        turn: Turn = self._receive(_TURN_TIMEOUT_S)
        return turn

    def _receive(self, timeout_s: float) -> Any:
        try:
            if self._connection.poll(timeout_s):
                return self._connection.recv()
            reason = f"nothing heard for {timeout_s:.0f} s"
        except EOFError:
            reason = "the engine ended"
        words = self._log.read_text(errors="replace").splitlines()[-30:] if self._log.exists() else []
        raise EngineError("\n".join([f"{reason}; the end of its log:", *words]))

    def _stop(self) -> None:
        self._connection.close()
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()


def _serve(connection: Connection, model: Path, log: Path, workload: Workload, steering: bool, eager: bool) -> None:
    """Body of the engine's process: says what it is, then one turn per message until the connection closes."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        engine = _start(model, workload, steering, eager)
        connection.send(_about(engine, steering))
        with suppress(EOFError):
            while True:
                mode, seed = connection.recv()
                connection.send(_turn(engine, workload, mode, seed))
    except Exception:  # noqa: BLE001 - the boundary of a process: its last words go to the log
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        connection.close()


def _start(model: Path, workload: Workload, steering: bool, eager: bool) -> Any:
    """The engine, with one resident bundle per request of a batch, each with a vector at every layer."""
    from vllm import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    from server.engine.config import DEFAULT_ROWS, additional_config, enable, worker_cls

    options: dict[str, Any] = {}
    if steering:
        options = {
            "worker_cls": worker_cls(current_platform.device_type),
            "additional_config": additional_config(max(DEFAULT_ROWS, 128 * workload.batch)),
        }
    # vLLM's compile cache is keyed by the path as it is given, and the model's folder is another one in every run.
    os.chdir(model.parent)
    config = EngineArgs(
        model=f"./{model.name}",
        skip_tokenizer_init=True,
        max_model_len=workload.input_tokens + workload.output_tokens,
        # On a GPU two engines share it; on a CPU the environment sets the size of the KV cache.
        gpu_memory_utilization=0.4,
        enforce_eager=eager,
        disable_log_stats=True,
        **options,
    ).create_engine_config()
    if steering:
        enable(config)
    engine = LLMEngine.from_vllm_config(config, disable_log_stats=True)
    if steering:
        _load_bundles(engine, workload.batch)
    return engine


def _load_bundles(engine: Any, count: int) -> None:
    import numpy as np

    layers = list(range(engine.model_config.get_total_num_hidden_layers()))
    rng = np.random.default_rng(0)
    for index in range(count):
        rows = rng.standard_normal((len(layers), engine.model_config.get_hidden_size())).astype("<f4")
        rows *= _VECTOR_NORM / np.linalg.norm(rows, axis=1, keepdims=True)
        engine.collective_rpc("steering_load", args=(f"bench:{index}", layers, rows.tobytes()))


def _about(engine: Any, steering: bool) -> dict[str, str]:
    import platform
    from importlib.metadata import version

    import torch
    import vllm

    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        device = f"{names[0] if names else platform.machine()}, {os.environ['OMP_NUM_THREADS']} cores"
    packages = f"vLLM {vllm.__version__}, torch {torch.__version__}, expertsteer {version('expertsteer')}"
    about = {"device": device, "versions": f"{packages}, Python {platform.python_version()}"}
    if steering:
        about["kernel"] = engine.collective_rpc("steering_status")[0]["backend"]
    return about


def _turn(engine: Any, workload: Workload, mode: Mode, seed: int) -> Turn:
    import numpy as np

    rng = np.random.default_rng(seed)
    prompts = rng.integers(10, engine.model_config.get_vocab_size(), (workload.batch, workload.input_tokens)).tolist()
    params = [_sampling_params(workload, mode, index) for index in range(workload.batch)]
    ends = []
    tokens: dict[str, tuple[int, ...]] = {}
    cpu_start, start = time.process_time(), time.perf_counter()
    for index, prompt in enumerate(prompts):
        engine.add_request(f"{index:06d}", {"prompt_token_ids": prompt}, params[index])
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                tokens[output.request_id] = tuple(output.outputs[0].token_ids)
        ends.append(time.perf_counter())
    cpu_seconds = time.process_time() - cpu_start
    steps = tuple(after - before for before, after in pairwise(ends))
    return Turn(ends[-1] - start, cpu_seconds, steps, tuple(tokens[key] for key in sorted(tokens)))


def _sampling_params(workload: Workload, mode: Mode, index: int) -> Any:
    from vllm import SamplingParams

    from server.engine.steering import Steering, Term

    extra_args = None
    if mode is Mode.STEERED:
        strength = (1 + index / workload.batch) * (-1) ** index
        extra_args = Steering(f"bench:{index}", (Term(f"bench:{index}", strength, "all"),)).to_extra_args()
    return SamplingParams(
        temperature=0.0, max_tokens=workload.output_tokens, ignore_eos=True, detokenize=False, extra_args=extra_args
    )
