"""The server process: vLLM's API server with the steering engine behind it and the steering routes in front."""

import argparse
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.middleware import Middleware
from starlette.responses import Response

from artifacts.verify import ServedModel, served_model
from server.engine.client import SteeringEngine
from server.engine.compat import SERVER_VLLM, IncompatibleVllmError, require_version
from server.engine.config import EngineSettings, enable, worker_cls
from server.engine.program import Program
from server.engine.span_tokens import SpanTexts, load_tokenizer, parser_span, span_tokens
from server.engine.spans import SpanTokens
from server.engine.steering import SPAN_NAMES
from server.errors import ErrorCode, SteeringRequestError
from server.guard import SteeringGuard
from server.profiles import ProfileTable
from server.routes import chat, completion, models, steering
from server.routes.steered import SteeringService
from server.settings import SteeringSettings
from server.triggers import vocabulary_of

_REPLACED_ROUTES = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/models"})
_MODEL_FILES = ["*.json", "*.safetensors"]


def make_parser(prog: str) -> argparse.ArgumentParser:
    """Parser of `expertsteer serve`: every flag of `vllm serve` and the steering flags."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(prog=prog))
    SteeringSettings.add_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM.

    Args:
        args: result of `make_parser`.

    Returns:
        Exit status: 0 after an orderly stop, 1 when the engine died.

    Raises:
        BundleError: a bundle cannot be served with this model.
        IncompatibleVllmError: this vLLM or this configuration cannot be steered.
    """
    import uvloop
    import vllm
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
    from vllm.logger import configure_logging_from_args
    from vllm.platforms import current_platform

    require_version(vllm.__version__, SERVER_VLLM)
    if args.model_tag is not None:
        args.model = args.model_tag
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    _refuse_unsupported_launch(args)
    settings = SteeringSettings.from_args(args)
    served = _served_model(args)
    profiles = settings.load_profiles(served)
    args.worker_cls = worker_cls(current_platform.device_type)
    programs = _programs(args, profiles)
    engine_settings = EngineSettings(settings.rows, settings.fusion, _spans(args, settings, profiles))
    args.additional_config = {**(args.additional_config or {}), **engine_settings.additional_config()}
    return int(uvloop.run(_serve(args, profiles, programs)))


def _refuse_unsupported_launch(args: argparse.Namespace) -> None:
    from vllm import envs

    refused = {
        "--headless": args.headless,
        "--grpc": args.grpc,
        "--api-server-count above 1": (args.api_server_count or 1) > 1,
        "--worker-cls": args.worker_cls != "auto",
        "VLLM_USE_RUST_FRONTEND": envs.VLLM_USE_RUST_FRONTEND,
    }
    for flag, present in refused.items():
        if present:
            raise IncompatibleVllmError(f"Steering is not supported together with {flag}; leave it out.")


def _served_model(args: argparse.Namespace) -> ServedModel:
    """Identity of the served model, from its files: before anything is loaded, so that a mismatch costs no time."""
    folder = Path(args.model)
    if not folder.is_dir():
        if args.model.startswith(("/", ".", "~")):
            raise FileNotFoundError(f"There is no model folder {args.model}.")
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(args.model, revision=args.revision, allow_patterns=_MODEL_FILES))
    return served_model(folder)


def _programs(args: argparse.Namespace, profiles: ProfileTable) -> dict[str, Program]:
    """What each profile makes the engine do, by its name; the tokenizer is read only where a trigger needs it."""
    has_triggers = any(profile.bundle.manifest.triggers for profile in profiles)
    vocabulary = vocabulary_of(load_tokenizer(args)) if has_triggers else {}
    return {profile.name: profile.program(vocabulary) for profile in profiles}


def _spans(args: argparse.Namespace, settings: SteeringSettings, profiles: ProfileTable) -> dict[str, SpanTokens]:
    """Delimiters of the spans that profiles exclude.

    Raises:
        ValueError: a profile excludes a span whose delimiters nobody knows.
    """
    wanted = {span: profile for profile in profiles for span in SPAN_NAMES if span in profile.exclude}
    if not wanted:
        return {}
    tokenizer = load_tokenizer(args)
    known: dict[str, SpanTexts] = {}
    for span, profile in wanted.items():
        texts = settings.spans.get(span) or parser_span(span, args, tokenizer)
        if texts is None:
            raise ValueError(
                f"Profile {profile.name!r} leaves {span} unsteered and nothing says which tokens open and close them; "
                f"add --steering-span {span}=OPEN,CLOSE."
            )
        known[span] = texts
    return span_tokens(known, tokenizer)


async def _serve(args: argparse.Namespace, profiles: ProfileTable, programs: Mapping[str, Program]) -> int:
    from vllm.entrypoints.launchers.launcher import setup_server

    def interrupt(*_: Any) -> None:
        # uvicorn's own handlers come later; until then a SIGTERM must still stop the engine processes.
        raise KeyboardInterrupt("terminated")

    signal.signal(signal.SIGTERM, interrupt)
    listen_address, sock = setup_server(args, reuse_port=False)
    try:
        async with _engine_client(args) as engine_client:
            shutdown = await _build_and_serve(engine_client, listen_address, sock, args, profiles, programs)
            died = engine_client.errored
        await shutdown
    finally:
        sock.close()
    return 1 if died else 0


@asynccontextmanager
async def _engine_client(args: argparse.Namespace) -> AsyncIterator[Any]:
    """vLLM's engine with steering in its configuration; stopped on the way out."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    engine_args = AsyncEngineArgs.from_cli_args(args)
    context = UsageContext.OPENAI_API_SERVER
    vllm_config = engine_args.create_engine_config(usage_context=context)
    enable(vllm_config)
    client = AsyncLLM.from_vllm_config(
        vllm_config=vllm_config,
        usage_context=context,
        enable_log_requests=engine_args.enable_log_requests,
        aggregate_engine_logging=engine_args.aggregate_engine_logging,
        disable_log_stats=engine_args.disable_log_stats,
    )
    try:
        await client.reset_mm_cache()
        yield client
    finally:
        client.shutdown(timeout=vllm_config.shutdown_timeout)


async def _build_and_serve(
    engine_client: Any,
    listen_address: str,
    sock: Any,
    args: argparse.Namespace,
    profiles: ProfileTable,
    programs: Mapping[str, Program],
) -> Any:
    from vllm import envs
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.launcher import serve_http
    from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
    from vllm.logger import init_logger

    # The names that vLLM itself logs by: its configuration shows loggers under "vllm" only.
    logger = init_logger("vllm.expertsteer")
    engine = SteeringEngine(engine_client)
    await engine.self_test()
    for profile in profiles:
        await engine.load(profile.bundle.digest, programs[profile.name])
        logger.info("Steering profile %s: %s, layers %s", profile.name, profile.bundle.digest, profile.layers)
    logger.info("Steering self-test passed: every decoder layer can be steered.")

    supported_tasks = await engine_client.get_supported_tasks()
    app = build_app(args, supported_tasks, engine_client.model_config)
    await init_app_state(engine_client, app.state, args, supported_tasks)
    install(app, SteeringService(profiles, engine, args.served_model_name or [args.model]))

    log_config = get_uvicorn_log_config(args)
    logger.info("Starting ExpertSteer server on %s", listen_address)
    return await serve_http(
        app,
        sock=sock,
        enable_ssl_refresh=args.enable_ssl_refresh,
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
        **({} if log_config is None else {"log_config": log_config}),
    )


def install(app: FastAPI, service: SteeringService) -> None:
    """Put the steering routes in the place of vLLM's, and the guard in front of all others."""
    app.state.steering = service
    app.router.routes[:] = [
        route for route in app.router.routes if getattr(route, "path", None) not in _REPLACED_ROUTES
    ]
    for module in (chat, completion, models, steering):
        app.include_router(module.router)
    # Innermost: after vLLM's own middleware, so that a request without a key is refused for that first.
    app.user_middleware.append(Middleware(SteeringGuard))
    original = app.exception_handlers[RequestValidationError]

    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        for entry in error.errors():
            if entry["type"] in list(ErrorCode):
                return SteeringRequestError(ErrorCode(entry["type"]), entry["ctx"]["reason"]).response()
        response: Response = await original(request, error)  # type: ignore[misc]
        return response

    app.add_exception_handler(RequestValidationError, on_invalid)  # type: ignore[arg-type]
    # vLLM's hosting-container bootstrap has built the stack already, without what was added here.
    app.middleware_stack = app.build_middleware_stack()
