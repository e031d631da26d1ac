"""Which vLLM this engine works with, and the checks that say so before anything is served."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

# The engine part (workers, schedulers, cache keys), with vLLM's offline `LLM` as well.
SUPPORTED_VLLM = ("0.26", "0.27", "0.28", "0.29", "0.30", "0.31", "0.32")
# The HTTP server builds on vLLM's OpenAI layer, whose modules move from version to version.
SERVER_VLLM = ("0.32",)


class IncompatibleVllmError(RuntimeError):
    """vLLM, or the way it is configured, is not one that steering is known to be correct with."""


def require_version(version: str, supported: Sequence[str] = SUPPORTED_VLLM) -> None:
    """Refuse a vLLM whose internals have not been checked.

    Args:
        version: `vllm.__version__`, for example "0.32.0" or "0.32.0+cpu".
        supported: minor versions.

    Raises:
        IncompatibleVllmError: the minor version is not supported.
    """
    minor = ".".join(version.split(".")[:2])
    if minor not in supported:
        raise IncompatibleVllmError(
            f"vLLM {version} is not supported; install one of: {', '.join(f'vllm=={v}.*' for v in supported)}."
        )


def require_signature(function: Callable[..., Any], parameters: Sequence[str]) -> None:
    """Refuse a seam whose parameters differ from the ones this engine overrides.

    Args:
        function: vLLM's function or method.
        parameters: expected names in order; `self` included for methods.

    Raises:
        IncompatibleVllmError: they differ; both lists are named.
    """
    found = tuple(inspect.signature(function).parameters)
    if found[: len(parameters)] != tuple(parameters):
        raise IncompatibleVllmError(
            f"{function.__module__}.{function.__qualname__} takes ({', '.join(found)}), "
            f"this engine was written for ({', '.join(parameters)}). Install a supported vLLM."
        )


def require_servable(vllm_config: Any) -> None:
    """Refuse configurations in which steering would be wrong or is not proven right.

    Args:
        vllm_config: vLLM's `VllmConfig`.

    Raises:
        IncompatibleVllmError: with the flag at fault and the remedy.
    """
    parallel, speculation = vllm_config.parallel_config, vllm_config.speculative_config
    method = getattr(speculation, "method", None)
    is_async = bool(vllm_config.scheduler_config.async_scheduling)
    refused = {
        **_refused_replicas(parallel),
        "--prefill-context-parallel-size": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "--decode-context-parallel-size": getattr(parallel, "decode_context_parallel_size", 1) > 1,
        "--enable-dbo or --ubatch-size (they split a batch behind the runner's back)": parallel.use_ubatching,
        # vLLM allocates what travels between stages in its warm-up run, which its CPU worker skips without compilation.
        "--pipeline-parallel-size and --enforce-eager on a CPU (vLLM's workers fail there)": (
            parallel.pipeline_parallel_size > 1
            and vllm_config.model_config.enforce_eager
            and vllm_config.device_config.device_type == "cpu"
        ),
        f"--speculative-config with method {method} (only ngram is known to be right)": (
            speculation is not None and method != "ngram"
        ),
        # Where a step begins would be an upper bound until the device corrects it.
        "--speculative-config and --async-scheduling": speculation is not None and is_async,
        "--kv-sharing-fast-prefill (later layers run on some of the tokens)": getattr(
            vllm_config.cache_config, "kv_sharing_fast_prefill", False
        ),
        "sequence parallelism (pass_config.enable_sp: a norm sees some of the tokens)": getattr(
            vllm_config.compilation_config.pass_config, "enable_sp", False
        )
        and parallel.tensor_parallel_size > 1,
        "--kv-transfer-config (connectors hash tokens without the steering)": vllm_config.kv_transfer_config
        is not None,
        "--enable-sleep-mode (waking up loses the vectors)": vllm_config.model_config.enable_sleep_mode,
        f"--runner {vllm_config.model_config.runner_type}": vllm_config.model_config.runner_type != "generate",
    }
    for flag, present in refused.items():
        if present:
            raise IncompatibleVllmError(f"Steering is not supported together with {flag}; leave that flag out.")


def _refused_replicas(parallel: Any) -> dict[str, bool]:
    """Data parallelism is supported behind vLLM's own balancer, on one node and with its own processes.

    An API process that reaches only some of the replicas could neither load a bundle everywhere nor say where it is.
    Engine core asks too: there a dense model's replica no longer knows of the others, and a mixture's does.
    """
    return {
        "--data-parallel-rank or --data-parallel-external-lb (balancing by somebody else)": getattr(
            parallel, "data_parallel_external_lb", False
        ),
        "--data-parallel-hybrid-lb": getattr(parallel, "data_parallel_hybrid_lb", False),
        "--data-parallel-backend ray": (
            parallel.data_parallel_size > 1 and getattr(parallel, "data_parallel_backend", "mp") != "mp"
        ),
        "--data-parallel-size on several nodes": parallel.data_parallel_size > 1
        and (
            getattr(parallel, "nnodes", 1) > 1
            or getattr(parallel, "data_parallel_size_local", parallel.data_parallel_size) < parallel.data_parallel_size
        ),
        "--enable-elastic-ep": getattr(parallel, "enable_elastic_ep", False),
    }
