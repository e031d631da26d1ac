"""How vLLM starts: its flags, engine processes, API processes and the HTTP server.

Follows `vllm.entrypoints.cli.serve` and `vllm.entrypoints.launchers.api_server.entry` step by step; what they have no
place for is that steering is put into the configuration before the engines are built from it.
"""

import argparse
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from server.engine.compat import IncompatibleVllmError
from server.engine.config import enable

DEFAULT_DRAIN_S = 30
_HTTP_TIMEOUT_S = 5


def make_parser(prog: str) -> argparse.ArgumentParser:
    """Parser of every flag of `vllm serve`."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # As long as `vllm serve` waits for nobody, a restart would cut every answer short.
    parser = make_arg_parser(FlexibleArgumentParser(prog=prog))
    parser.set_defaults(shutdown_timeout=DEFAULT_DRAIN_S)
    return parser


def prepare(args: argparse.Namespace) -> None:
    """Check the parsed flags as `vllm serve` does, and refuse those that steering does not go with.

    Raises:
        IncompatibleVllmError: names the flag.
    """
    from vllm import envs
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
    from vllm.logger import configure_logging_from_args

    if args.model_tag is not None:
        args.model = args.model_tag
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    refused = {
        "--headless": args.headless,
        "--grpc": args.grpc,
        "--worker-cls": args.worker_cls != "auto",
        "VLLM_USE_RUST_FRONTEND": envs.VLLM_USE_RUST_FRONTEND,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING and --api-server-count above 1": (
            envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING and num_api_processes(args) > 1
        ),
        "--data-parallel-multi-port-external-lb": args.data_parallel_multi_port_external_lb,
    }
    for flag, present in refused.items():
        if present:
            raise IncompatibleVllmError(f"Steering is not supported together with {flag}; leave it out.")


def num_api_processes(args: argparse.Namespace) -> int:
    """API processes to start: as many as asked for, otherwise one for each data-parallel replica."""
    count = args.data_parallel_size if args.api_server_count is None else args.api_server_count
    if count < 1:
        raise IncompatibleVllmError(f"--api-server-count is {count}; at least one process must serve the API.")
    return int(count)


def run_api_processes(args: argparse.Namespace, listen_address: str, sock: Any, target: Callable[..., None]) -> int:
    """Start the engines and several API processes on one socket, and wait for them.

    Args:
        args: parsed flags.
        listen_address: for the log.
        sock: bound socket.
        target: function of a module, called in each process with (listen_address, sock, args, client_config).

    Returns:
        Exit status: 0 after SIGTERM or SIGINT, 1 when a process died.
    """
    from vllm.logger import init_logger
    from vllm.v1.engine.utils import bind_engine_zmq_listeners, launch_core_engines
    from vllm.v1.executor import Executor
    from vllm.v1.metrics.prometheus import setup_multiprocess_prometheus
    from vllm.v1.utils import APIServerProcessManager, wait_for_completion_or_failure

    count = num_api_processes(args)
    setup_multiprocess_prometheus()
    is_stopping = False

    def stop(*_: Any) -> None:
        nonlocal is_stopping
        if not is_stopping:
            is_stopping = True
            raise SystemExit

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    vllm_config, engine_args = _engine_config(args, count, -1)
    listeners = bind_engine_zmq_listeners(vllm_config, count)
    engines = coordinator = processes = None
    try:
        with launch_core_engines(
            vllm_config, Executor.get_class(vllm_config), not engine_args.disable_log_stats, listeners.addresses
        ) as launch:
            engines, coordinator = launch.engine_manager, launch.coordinator
            processes = APIServerProcessManager(
                listen_address=listen_address,
                sock=sock,
                args=args,
                num_servers=count,
                input_listeners=listeners.inputs,
                output_listeners=listeners.outputs,
                target_server_fn=target,
                stats_update_address=coordinator.get_stats_publish_address() if coordinator else None,
                tensor_queue=launch.tensor_queue,
            )
            # An API process that dies meanwhile ends the start.
            launch.watched_frontend_processes = processes.processes
        wait_for_completion_or_failure(processes, engines, coordinator)
    except SystemExit:
        return 0
    except RuntimeError as error:
        init_logger("vllm.expertsteer").error("The server ends: %s", error)
        return 1
    finally:
        deadline = time.monotonic() + vllm_config.shutdown_timeout if is_stopping else None
        for manager in (processes, engines, coordinator):
            if manager is not None:
                manager.shutdown(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
    return 0


@asynccontextmanager
async def engine_client(
    args: argparse.Namespace, client_config: dict[str, Any] | None, on_stop: Callable[[], None]
) -> AsyncIterator[Any]:
    """vLLM's `AsyncLLM` with steering in its configuration; stopped on the way out.

    Args:
        args: parsed flags.
        client_config: addresses of engines that run already; None to start them.
        on_stop: called, from some thread, when the client begins to stop.
    """
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    addresses = dict(client_config or {})
    count, index = addresses.pop("client_count", 1), addresses.pop("client_index", 0)
    vllm_config, engine_args = _engine_config(args, count, index)
    client = AsyncLLM.from_vllm_config(
        vllm_config=vllm_config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        enable_log_requests=engine_args.enable_log_requests,
        aggregate_engine_logging=engine_args.aggregate_engine_logging,
        disable_log_stats=engine_args.disable_log_stats,
        client_addresses=addresses,
        client_count=count,
        client_index=index,
    )
    _drain_first(client, on_stop)
    try:
        await client.reset_mm_cache()
        yield client
    finally:
        client.shutdown(timeout=vllm_config.shutdown_timeout)


async def serve(app: Any, sock: Any, args: argparse.Namespace, peer_loads: Any) -> Any:
    """Serve an app as `vllm serve` does, until a signal or the engine's death; returns what is left to await."""
    from vllm import envs
    from vllm.entrypoints.launchers.launcher import serve_http
    from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config

    log_config = get_uvicorn_log_config(args)
    return await serve_http(
        app,
        sock=sock,
        enable_ssl_refresh=args.enable_ssl_refresh,
        peer_loads=peer_loads,
        host=args.host,
        port=args.port,
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
        timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_cert_reqs=args.ssl_cert_reqs,
        ssl_ciphers=args.ssl_ciphers,
        h11_max_incomplete_event_size=args.h11_max_incomplete_event_size,
        h11_max_header_count=args.h11_max_header_count,
        # The engine has ended by then: who still waits is a client that does not read, or an operation.
        timeout_graceful_shutdown=_HTTP_TIMEOUT_S,
        **({} if log_config is None else {"log_config": log_config}),
    )


def _engine_config(args: argparse.Namespace, count: int, index: int) -> tuple[Any, Any]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import propagate_flash_late_interaction
    from vllm.usage.usage_lib import UsageContext

    engine_args = AsyncEngineArgs.from_cli_args(args)
    propagate_flash_late_interaction(args, engine_args)
    if count > 1:
        engine_args._api_process_count, engine_args._api_process_rank = count, index
    vllm_config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    enable(vllm_config)
    return vllm_config, engine_args


def _drain_first(client: Any, on_stop: Callable[[], None]) -> None:
    """Make a client's `shutdown` wait for the requests that run through it.

    vLLM drains only where the client owns the engines: one of several API processes closes its sockets at once, and its
    streams break off.
    """
    shutdown = client.shutdown

    def drain(timeout: float | None = None) -> None:
        on_stop()
        deadline = time.monotonic() + (timeout or 0.0)
        while not client.errored and client.get_num_unfinished_requests() and time.monotonic() < deadline:
            time.sleep(0.05)
        client.died_before_shutdown = has_died(client)
        shutdown(timeout=None if timeout is None else max(0.0, deadline - time.monotonic()))

    client.shutdown = drain


def has_died(client: Any) -> bool:
    """Whether the engine of an `engine_client` died by itself. One that was shut down looks dead as well."""
    return bool(getattr(client, "died_before_shutdown", client.errored))


def metrics_registry() -> Any:
    """Where vLLM's own series are: with several API processes, the sum of their files."""
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    return get_prometheus_registry()
