"""Refusals before anything is served."""

from types import SimpleNamespace
from typing import Any

import pytest

from server.engine.compat import IncompatibleVllmError, require_servable, require_signature, require_version
from server.engine.config import additional_config, worker_cls
from steering_kernels import OPS_VERSION


def vllm_config() -> Any:
    """A configuration that can be steered."""
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1, data_parallel_size=1, prefill_context_parallel_size=1, enable_dbo=False
        ),
        model_config=SimpleNamespace(enable_sleep_mode=False, runner_type="generate"),
        scheduler_config=SimpleNamespace(scheduler_cls=None),
        speculative_config=None,
        lora_config=None,
        kv_transfer_config=None,
    )


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.0+cpu", "0.32.0rc1"])
def test_supported_versions(version: str) -> None:
    require_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "0.3.2", "0.320.0", "1.32.0", "10.32.0", "dev", ""])
def test_other_versions(version: str) -> None:
    with pytest.raises(IncompatibleVllmError, match=r"is not supported; install one of: vllm==0\.32\.\*"):
        require_version(version)


class Seam:
    def method(self, scheduler_output: Any, extra: int = 0) -> None: ...


def test_signature() -> None:
    require_signature(Seam.method, ("self", "scheduler_output"))
    require_signature(Seam().method, ("scheduler_output", "extra"))


@pytest.mark.parametrize("expected", [("self", "output"), ("scheduler_output",), ("self", "scheduler_output", "x")])
def test_other_signature(expected: tuple[str, ...]) -> None:
    with pytest.raises(IncompatibleVllmError) as caught:
        require_signature(Seam.method, expected)
    message = str(caught.value)
    assert "Seam.method takes (self, scheduler_output, extra)" in message
    assert f"written for ({', '.join(expected)})" in message


def test_servable() -> None:
    require_servable(vllm_config())


@pytest.mark.parametrize(
    ("path", "value", "flag"),
    [
        ("parallel_config.pipeline_parallel_size", 2, "--pipeline-parallel-size 2"),
        ("parallel_config.data_parallel_size", 4, "--data-parallel-size 4"),
        ("parallel_config.prefill_context_parallel_size", 2, "--prefill-context-parallel-size"),
        ("parallel_config.enable_dbo", True, "--enable-dbo"),
        ("model_config.enable_sleep_mode", True, "--enable-sleep-mode"),
        ("model_config.runner_type", "pooling", "--runner pooling"),
        ("scheduler_config.scheduler_cls", "mine.Scheduler", "--scheduler-cls"),
        ("speculative_config", object(), "--speculative-config"),
        ("lora_config", object(), "--enable-lora"),
        ("kv_transfer_config", object(), "--kv-transfer-config"),
    ],
)
def test_not_servable(path: str, value: object, flag: str) -> None:
    config = vllm_config()
    *parents, name = path.split(".")
    setattr(getattr(config, parents[0]) if parents else config, name, value)
    with pytest.raises(IncompatibleVllmError) as caught:
        require_servable(config)
    assert f"together with {flag}" in str(caught.value)
    assert "leave that flag out" in str(caught.value)


def test_compile_cache_key_holds_what_changes_the_graph() -> None:
    config = additional_config(64)["expertsteer"]
    assert (config["rows"], config["ops"]) == (64, OPS_VERSION)
    assert config["version"]
    assert additional_config(65) != additional_config(64)


@pytest.mark.parametrize(("device", "name"), [("cpu", "SteeringCPUWorker"), ("cuda", "SteeringGPUWorker")])
def test_worker_classes(device: str, name: str) -> None:
    assert worker_cls(device).endswith(f".{name}")
