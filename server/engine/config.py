"""The engine configuration that turns steering on, through vLLM's documented options only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Literal, get_args

from server.engine.compat import IncompatibleVllmError, require_servable, require_version
from server.engine.spans import SpanTokens
from steering_kernels import OPS_VERSION

DEFAULT_ROWS = 4096

Fusion = Literal["auto", "always", "never"]
FUSIONS: tuple[Fusion, ...] = get_args(Fusion)


@dataclass(frozen=True)
class EngineSettings:
    """What the steering engine is told at start.

    Attributes:
        rows: capacity of the row pool.
        fusion: whether steering is folded into the RMSNorm that follows a layer: `always` where such a norm is known,
            `never`, or `auto`: `always` where that is no slower.
        spans: tokens that open and close the spans that profiles may exclude, by name of `SPAN_NAMES`.
    """

    rows: int = DEFAULT_ROWS
    fusion: Fusion = "auto"
    spans: Mapping[str, SpanTokens] = field(default_factory=dict)

    def additional_config(self) -> dict[str, Any]:
        """Value for vLLM's `additional_config`.

        It reaches every process, and it is part of vLLM's configuration hash: a graph compiled without steering, or by
        another version of it, is never taken from the disk cache.
        """
        return {
            "expertsteer": {
                "version": version("expertsteer"),
                "ops": OPS_VERSION,
                "rows": self.rows,
                "fusion": self.fusion,
                "spans": {name: list(tokens) for name, tokens in self.spans.items()},
            }
        }

    def fuses(self, vllm_config: Any, device_type: str) -> bool:
        """Whether to fold steering into norms.

        `auto` does not where vLLM has something better to do with the norm (fusing it with a quantisation or with an
        all-reduce), nor without compilation on a CPU, where unsteered answers stay bit-identical to plain vLLM's.
        """
        if self.fusion != "auto":
            return self.fusion == "always"
        passes = vllm_config.compilation_config.pass_config
        taken = any(getattr(passes, name, False) for name in ("fuse_norm_quant", "fuse_allreduce_rms"))
        return not taken and (device_type != "cpu" or not vllm_config.model_config.enforce_eager)

    @staticmethod
    def of(vllm_config: Any) -> "EngineSettings":
        """The settings in a `VllmConfig`.

        Raises:
            IncompatibleVllmError: there are none.
        """
        values = (vllm_config.additional_config or {}).get("expertsteer")
        if values is None:
            raise IncompatibleVllmError(
                "The engine has a steering worker and no settings; start it with `llm_arguments`."
            )
        spans = {name: SpanTokens(*tokens) for name, tokens in values["spans"].items()}
        return EngineSettings(values["rows"], values["fusion"], spans)


def worker_cls(device_type: str) -> str:
    """Qualified name of the worker class for "cpu" or "cuda"."""
    name = {"cpu": "cpu_worker.SteeringCPUWorker", "cuda": "gpu_worker.SteeringGPUWorker"}[device_type]
    return f"server.engine.{name}"


def scheduler_cls(async_scheduling: bool) -> str:
    """Qualified name of the scheduler class."""
    return f"server.engine.scheduler.{'SteeringAsyncScheduler' if async_scheduling else 'SteeringScheduler'}"


def llm_arguments(settings: EngineSettings, device_type: str, *, async_scheduling: bool = False) -> dict[str, Any]:
    """Arguments for vLLM's offline `LLM(**arguments)` that turn steering on; its workers refuse what cannot be steered.

    Args:
        settings: what the engine is told.
        device_type: "cpu" or "cuda".
        async_scheduling: vLLM's option of that name, which must be said, because it decides the scheduler class.
    """
    return {
        "worker_cls": worker_cls(device_type),
        "scheduler_cls": scheduler_cls(async_scheduling),
        "async_scheduling": async_scheduling,
        "additional_config": settings.additional_config(),
    }


def enable(vllm_config: Any) -> None:
    """Put steering into a finished `VllmConfig`; call before the engine is built from it.

    Raises:
        IncompatibleVllmError: this vLLM or this configuration cannot be steered; says why.
    """
    scheduler = vllm_config.scheduler_config
    if scheduler.scheduler_cls is not None:
        raise IncompatibleVllmError("Steering is not supported together with --scheduler-cls; leave that flag out.")
    scheduler.scheduler_cls = scheduler_cls(scheduler.async_scheduling)
    require_enabled(vllm_config)


def require_enabled(vllm_config: Any) -> None:
    """Refuse an engine that would not steer, or not rightly. Every worker asks, however the engine was started.

    Raises:
        IncompatibleVllmError: this vLLM or this configuration cannot be steered; says why.
    """
    import vllm

    require_version(vllm.__version__)
    require_servable(vllm_config)
    settings = EngineSettings.of(vllm_config)
    if settings.spans and vllm_config.speculative_config is not None:
        raise IncompatibleVllmError(
            "Spans that stay unsteered are not supported together with --speculative-config; leave one of them out "
            "(--steering-exclude none)."
        )
    scheduler = vllm_config.scheduler_config
    expected = scheduler_cls(scheduler.async_scheduling)
    if scheduler.scheduler_cls != expected:
        # Without it cached blocks would be shared between steered and unsteered requests.
        raise IncompatibleVllmError(
            f"The scheduler class is {scheduler.scheduler_cls}, expected {expected}; start with `llm_arguments`."
        )
