"""The engine configuration that turns steering on, through vLLM's documented options only."""

from importlib.metadata import version
from typing import Any

from server.engine.compat import require_servable, require_version
from steering_kernels import OPS_VERSION

DEFAULT_ROWS = 4096


def additional_config(num_rows: int) -> dict[str, Any]:
    """Value for vLLM's `additional_config`.

    It reaches every process, and it is part of vLLM's configuration hash: a graph compiled without steering, or by
    another version of it, is never taken from the disk cache.

    Args:
        num_rows: capacity of the row pool, in steering vectors.
    """
    return {"expertsteer": {"version": version("expertsteer"), "ops": OPS_VERSION, "rows": num_rows}}


def worker_cls(device_type: str) -> str:
    """Qualified name of the worker class for "cpu" or "cuda"."""
    name = {"cpu": "cpu_worker.SteeringCPUWorker", "cuda": "gpu_worker.SteeringGPUWorker"}[device_type]
    return f"server.engine.{name}"


def enable(vllm_config: Any) -> None:
    """Put steering into a finished `VllmConfig`; call before the engine is built from it.

    Raises:
        IncompatibleVllmError: this vLLM or this configuration cannot be steered; says why.
    """
    import vllm

    require_version(vllm.__version__)
    require_servable(vllm_config)
    scheduler = vllm_config.scheduler_config
    name = "SteeringAsyncScheduler" if scheduler.async_scheduling else "SteeringScheduler"
    scheduler.scheduler_cls = f"server.engine.scheduler.{name}"
