"""Refusals before anything is served."""

from types import SimpleNamespace
from typing import Any

import pytest

from server.engine.compat import (
    SERVER_VLLM,
    IncompatibleVllmError,
    require_servable,
    require_signature,
    require_version,
)
from server.engine.config import EngineSettings, Fusion, enable, llm_arguments, require_enabled, worker_cls
from server.engine.spans import SpanTokens
from steering_kernels import OPS_VERSION


def vllm_config() -> Any:
    """A configuration that can be steered."""
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            data_parallel_size=1,
            data_parallel_size_local=1,
            data_parallel_backend="mp",
            data_parallel_external_lb=False,
            data_parallel_hybrid_lb=False,
            enable_elastic_ep=False,
            nnodes=1,
            prefill_context_parallel_size=1,
            decode_context_parallel_size=1,
            use_ubatching=False,
            tensor_parallel_size=1,
        ),
        model_config=SimpleNamespace(enable_sleep_mode=False, runner_type="generate", enforce_eager=True),
        scheduler_config=SimpleNamespace(scheduler_cls=None, async_scheduling=False),
        device_config=SimpleNamespace(device_type="cpu"),
        additional_config=EngineSettings().additional_config(),
        speculative_config=None,
        lora_config=None,
        kv_transfer_config=None,
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        compilation_config=SimpleNamespace(pass_config=SimpleNamespace(enable_sp=True)),
    )


@pytest.mark.parametrize("version", ["0.26.0", "0.29.1", "0.32.0", "0.32.1", "0.32.0+cpu", "0.32.0rc1"])
def test_supported_versions(version: str) -> None:
    require_version(version)


@pytest.mark.parametrize("version", ["0.25.9", "0.33.0", "0.3.2", "0.320.0", "1.32.0", "10.32.0", "dev", ""])
def test_other_versions(version: str) -> None:
    with pytest.raises(IncompatibleVllmError, match=r"is not supported; install one of: vllm==0\.26\.\*, "):
        require_version(version)


def test_the_server_takes_fewer_versions() -> None:
    require_version("0.32.0", SERVER_VLLM)
    with pytest.raises(IncompatibleVllmError, match=r"install one of: vllm==0\.32\.\*\."):
        require_version("0.31.0", SERVER_VLLM)


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
        ("parallel_config.pipeline_parallel_size", 2, "--pipeline-parallel-size and --enforce-eager on a CPU"),
        ("parallel_config.decode_context_parallel_size", 2, "--decode-context-parallel-size"),
        ("parallel_config.data_parallel_external_lb", True, "--data-parallel-rank or --data-parallel-external-lb"),
        ("parallel_config.data_parallel_hybrid_lb", True, "--data-parallel-hybrid-lb"),
        ("parallel_config.data_parallel_size", 4, "--data-parallel-size on several nodes"),
        ("parallel_config.enable_elastic_ep", True, "--enable-elastic-ep"),
        ("parallel_config.prefill_context_parallel_size", 2, "--prefill-context-parallel-size"),
        ("parallel_config.use_ubatching", True, "--enable-dbo"),
        ("model_config.enable_sleep_mode", True, "--enable-sleep-mode"),
        ("parallel_config.tensor_parallel_size", 2, "sequence parallelism"),
        ("cache_config.kv_sharing_fast_prefill", True, "--kv-sharing-fast-prefill"),
        ("model_config.runner_type", "pooling", "--runner pooling"),
        ("speculative_config", SimpleNamespace(method="eagle"), "--speculative-config with method eagle"),
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


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("lora_config", object()),
        ("speculative_config", SimpleNamespace(method="ngram")),
        ("device_config.device_type", "cuda"),
    ],
)
def test_servable_with(path: str, value: object) -> None:
    config = vllm_config()
    *parents, name = path.split(".")
    setattr(getattr(config, parents[0]) if parents else config, name, value)
    require_servable(config)


def test_stages_of_a_compiled_model_on_a_cpu() -> None:
    config = vllm_config()
    config.parallel_config.pipeline_parallel_size = 2
    config.model_config.enforce_eager = False
    require_servable(config)


def replicated(**changes: Any) -> Any:
    config = vllm_config()
    vars(config.parallel_config).update({"data_parallel_size": 2, "data_parallel_size_local": 2} | changes)
    return config


def test_replicas_on_one_node() -> None:
    require_servable(replicated())
    # In the process of a replica of a mixture of experts.
    require_servable(replicated(data_parallel_rank=1))
    # Before vLLM had some of these options.
    old = replicated()
    for name in ("enable_elastic_ep", "nnodes", "data_parallel_hybrid_lb", "data_parallel_backend"):
        delattr(old.parallel_config, name)
    require_servable(old)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"data_parallel_backend": "ray"}, "--data-parallel-backend ray"),
        ({"nnodes": 2}, "--data-parallel-size on several nodes"),
        ({"data_parallel_size_local": 1}, "--data-parallel-size on several nodes"),
    ],
)
def test_replicas_elsewhere(changes: dict[str, Any], flag: str) -> None:
    with pytest.raises(IncompatibleVllmError, match=flag):
        require_servable(replicated(**changes))


def test_speculation_and_asynchronous_scheduling() -> None:
    config = vllm_config()
    config.speculative_config = SimpleNamespace(method="ngram")
    config.scheduler_config.async_scheduling = True
    with pytest.raises(IncompatibleVllmError, match="--speculative-config and --async-scheduling"):
        require_servable(config)


@pytest.mark.parametrize(("is_async", "name"), [(False, "SteeringScheduler"), (True, "SteeringAsyncScheduler")])
def test_enabling(is_async: bool, name: str) -> None:
    config = vllm_config()
    config.scheduler_config.async_scheduling = is_async
    enable(config)
    assert config.scheduler_config.scheduler_cls == f"server.engine.scheduler.{name}"
    require_enabled(config)
    with pytest.raises(IncompatibleVllmError, match="--scheduler-cls"):
        enable(config)
    config.scheduler_config.async_scheduling = not is_async
    with pytest.raises(
        IncompatibleVllmError, match=rf"The scheduler class is server\.engine\.scheduler\.{name}, expected"
    ):
        require_enabled(config)


def test_tensor_parallelism() -> None:
    config = vllm_config()
    config.parallel_config.tensor_parallel_size = 2
    config.compilation_config.pass_config.enable_sp = False
    require_servable(config)


def test_an_engine_without_settings_does_not_start() -> None:
    config = vllm_config()
    config.additional_config = {}
    with pytest.raises(IncompatibleVllmError, match="no settings; start it with `llm_arguments`"):
        enable(config)


def test_an_engine_without_our_scheduler_does_not_start() -> None:
    with pytest.raises(IncompatibleVllmError, match="The scheduler class is None"):
        require_enabled(vllm_config())


def test_spans_and_speculation() -> None:
    config = vllm_config()
    config.additional_config = EngineSettings(spans={"reasoning": SpanTokens(1, 2)}).additional_config()
    config.speculative_config = SimpleNamespace(method="ngram")
    with pytest.raises(IncompatibleVllmError, match="Spans that stay unsteered are not supported together with"):
        enable(config)


def test_arguments_of_an_offline_llm() -> None:
    arguments = llm_arguments(EngineSettings(7), "cuda", async_scheduling=True)
    assert arguments["scheduler_cls"].endswith(".SteeringAsyncScheduler") and arguments["async_scheduling"] is True
    assert arguments["worker_cls"] == worker_cls("cuda")
    assert arguments["additional_config"]["expertsteer"]["rows"] == 7


def test_compile_cache_key_holds_what_changes_the_graph() -> None:
    config = EngineSettings(64).additional_config()
    assert (config["expertsteer"]["rows"], config["expertsteer"]["ops"]) == (64, OPS_VERSION)
    assert config["expertsteer"]["version"]
    others = [
        EngineSettings(65),
        EngineSettings(64, "always"),
        EngineSettings(64, spans={"reasoning": SpanTokens(1, 2)}),
    ]
    assert all(other.additional_config() != config for other in others)


def test_settings_reach_the_workers() -> None:
    settings = EngineSettings(64, "never", {"reasoning": SpanTokens(1, 2)})
    assert EngineSettings.of(SimpleNamespace(additional_config=settings.additional_config())) == settings


@pytest.mark.parametrize(
    ("fusion", "device", "eager", "taken", "fused"),
    [
        ("always", "cpu", True, True, True),
        ("never", "cuda", False, False, False),
        ("auto", "cuda", True, False, True),
        ("auto", "cuda", False, True, False),
        ("auto", "cpu", False, False, True),
        ("auto", "cpu", True, False, False),
    ],
)
def test_fusion(fusion: Fusion, device: str, eager: bool, taken: bool, fused: bool) -> None:
    config = vllm_config()
    config.model_config.enforce_eager = eager
    config.compilation_config = SimpleNamespace(pass_config=SimpleNamespace(fuse_norm_quant=taken))
    assert EngineSettings(fusion=fusion).fuses(config, device) is fused


@pytest.mark.parametrize(("device", "name"), [("cpu", "SteeringCPUWorker"), ("cuda", "SteeringGPUWorker")])
def test_worker_classes(device: str, name: str) -> None:
    assert worker_cls(device).endswith(f".{name}")
