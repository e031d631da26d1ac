"""A vLLM engine in a process of its own that runs one batch when told to and sleeps otherwise."""

import importlib.util
import os
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from shapes import Model
from turn import Batch, Turn

_START_TIMEOUT_S = 900.0
_TURN_TIMEOUT_S = 600.0
# What is compiled: as vLLM decides by itself (on a GPU with CUDA graphs), without CUDA graphs, or nothing.
COMPILATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no-graphs": {"compilation_config": {"cudagraph_mode": "NONE"}},
    "eager": {"enforce_eager": True},
}


def environment(device_type: str) -> dict[str, str]:
    """Variables of both engines alike; set before their processes start, because OpenMP reads them when it is loaded.

    On a GPU vLLM chooses the model runner; on a CPU there is one.
    """
    common = {
        "HF_HUB_OFFLINE": "1",
        # vLLM's separate process spins for a second after its last step, into the other engine's turn.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    if device_type != "cpu":
        return common
    return {
        **common,
        **_openmp(),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
    }


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


class EngineError(RuntimeError):
    """An engine did not start or did not finish its turn; the message ends with its last words."""


@dataclass(frozen=True)
class Package:
    """How an engine with the package is set up.

    Attributes:
        kind: what its bundles do, a key of `bundles.ROWS_PER_LAYER`.
        fusion: as in `server.engine.config.EngineSettings`.
        max_bundles: as many as will ever be resident.
    """

    kind: str
    fusion: str
    max_bundles: int


@dataclass(frozen=True)
class Options:
    """How an engine is started.

    Attributes:
        model: what it serves.
        max_model_len: tokens of its longest request.
        compilation: key of `COMPILATIONS`.
        package: None for plain vLLM.
    """

    model: Model
    max_model_len: int
    compilation: str
    package: Package | None


class Engine:
    """Context manager around the process of one engine.

    Attributes:
        about: device, versions and steering kernel, as the engine sees them.
    """

    def __init__(self, options: Options, log: Path) -> None:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._log = log
        self._process = context.Process(target=_serve, args=(theirs, options, log))
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

    def run(self, batch: Batch) -> Turn:
        """Make as many bundles resident as the batch says, then run it."""
        self._connection.send(batch)
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


def _serve(connection: Connection, options: Options, log: Path) -> None:
    """Body of the engine's process: says what it is, then one turn per message until the connection closes."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        from turn import run_turn

        engine = _start(options)
        residents = _residents(engine, options.package)
        connection.send(_about(engine, options.package))
        with suppress(EOFError):
            while True:
                batch = connection.recv()
                if residents is not None:
                    residents.resize(batch.resident)
                connection.send(run_turn(engine, batch))
    except Exception:  # noqa: BLE001 - the boundary of a process: its last words go to the log
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        connection.close()


def _start(options: Options) -> Any:
    from vllm import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    from server.engine.config import enable, worker_cls

    model, package = options.model, options.package
    arguments = dict(COMPILATIONS[options.compilation])
    if package is not None:
        arguments["worker_cls"] = worker_cls(current_platform.device_type)
        arguments["additional_config"] = _settings(model.path, package)
    # vLLM's compile cache is keyed by the path as it is given, and the model's folder is another one in every run.
    os.chdir(model.path.parent)
    config = EngineArgs(
        model=f"./{model.path.name}",
        load_format=model.load_format,
        skip_tokenizer_init=True,
        max_model_len=options.max_model_len,
        # On a GPU two engines share it; on a CPU the environment sets the size of the KV cache.
        gpu_memory_utilization=0.4,
        disable_log_stats=True,
        **arguments,
    ).create_engine_config()
    if package is not None:
        enable(config)
    return LLMEngine.from_vllm_config(config, disable_log_stats=True)


def _settings(model: Path, package: Package) -> dict[str, Any]:
    from typing import cast

    from bundles import ROWS_PER_LAYER
    from transformers import AutoConfig

    from server.engine.config import EngineSettings, Fusion

    num_layers = AutoConfig.from_pretrained(model).num_hidden_layers
    rows = package.max_bundles * num_layers * ROWS_PER_LAYER[package.kind]
    return EngineSettings(rows, cast(Fusion, package.fusion)).additional_config()


def _residents(engine: Any, package: Package | None) -> Any:
    from bundles import Residents

    return None if package is None else Residents(engine, package.kind)


def _about(engine: Any, package: Package | None) -> dict[str, str]:
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
    if package is not None:
        status = engine.collective_rpc("steering_status")[0]
        fused, in_place = len(status["fused_layers"]), len(status["in_place_layers"])
        about["kernel"] = f"{status['backend']}; fusion {package.fusion}: {fused} layers fused, {in_place} in place"
    return about
