"""The server: vLLM's API server with the steering engine behind it and the steering routes in front."""

import argparse
import asyncio
import os
import signal
import tempfile
import uuid
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from starlette._utils import get_route_path
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware import Middleware
from starlette.responses import Response

from artifacts.verify import ServedModel, served_model
from server import declaration, request_log
from server.auth.audit import AuditLog
from server.auth.keys import KeyRing
from server.auth.middleware import AccessMiddleware
from server.auth.rate import RateLimit
from server.bundle_operations import BundleOperations
from server.convergence import Convergence, require_sources
from server.engine import launch
from server.engine import messages as messages_seam
from server.engine.client import SteeringEngine
from server.engine.compat import SERVER_VLLM, require_version
from server.engine.config import EngineSettings, worker_cls
from server.engine.responses import require_responses
from server.engine.span_tokens import load_tokenizer, parser_span, span_tokens
from server.engine.spans import SpanTokens
from server.engine.steering import SPAN_NAMES
from server.errors import ErrorCode, SteeringRequestError
from server.guard import SteeringGuard
from server.metrics.metrics import SteeringMetrics
from server.operation import OperationRecorder
from server.pins import Pins
from server.profile_operations import ProfileOperations
from server.programs import Programs
from server.reconciler import Reconciler
from server.registry import schema
from server.registry.registry import Registry
from server.rollout import Rollout
from server.routes import chat, completion, health, messages, metrics, models, playground, responses
from server.routes.admin import audit, bundles, profiles, root, status
from server.scrape import Scraper
from server.seeding import require_servable, retire, seed
from server.service import SteeringService
from server.settings import SteeringSettings
from server.sources.remote import RemoteSources
from server.sources.root import BundleRoot
from server.sources.signature import SignaturePolicy
from server.triggers import vocabulary_of

_ADMIN_KEY_VARIABLE = "EXPERTSTEER_ADMIN_KEY"
_REPLACED_ROUTES = frozenset(
    {
        *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"),
        *("/v1/models", "/metrics"),
    }
)
_MODEL_FILES = ["*.json", "*.safetensors"]
_PEERS_TIMEOUT_S = 600.0
# Length of a burst of changes, at the rate that is allowed for long.
_BURST_S = 5


def make_parser(prog: str) -> argparse.ArgumentParser:
    """Parser of `expertsteer serve`: every flag of `vllm serve` and the steering flags."""
    parser = launch.make_parser(prog)
    SteeringSettings.add_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM.

    Args:
        args: result of `make_parser`.

    Returns:
        Exit status: 0 after an orderly stop, 1 when the engine or a process of the server died.

    Raises:
        BundleError: a bundle cannot be served with this model.
        IncompatibleVllmError: this vLLM or this configuration cannot be steered.
        RegistryError: the registry cannot be used.
        ValueError: flags that do not go together.
    """
    import uvloop
    import vllm
    from vllm.entrypoints.launchers.launcher import setup_server
    from vllm.platforms import current_platform

    require_version(vllm.__version__, SERVER_VLLM)
    launch.prepare(args)
    settings = SteeringSettings.from_args(args)
    _key_ring(args, settings)
    declared = None
    if settings.declaration is not None:
        declared = declaration.read(settings.declaration).declaration
        require_sources(declared, settings.remote, settings.bundle_root)
    args.served_steering_model = _served_model(args)
    args.steering_instance = uuid.uuid4().hex[:12]
    with tempfile.TemporaryDirectory(prefix="expertsteer-") as temporary:
        args.steering_directory = settings.registry or Path(temporary)
        args.steering_lock = Path(temporary) / "engine.lock"
        registry = Registry.open(args.steering_directory)
        try:
            registry.end_drains()
            programs = _programs(args, settings, registry)
            seed(registry, settings, programs, _signatures(settings))
            if declared is not None:
                retire(registry, declared, programs)
            require_servable(registry, programs)
            spans = _spans(args, settings, registry)
        finally:
            registry.close()
        args.worker_cls = worker_cls(current_platform.device_type)
        engine_settings = EngineSettings(settings.rows, settings.fusion, spans)
        args.additional_config = {**(args.additional_config or {}), **engine_settings.additional_config()}
        count = launch.num_api_processes(args)
        if count > 1:
            listen_address, sock = setup_server(args, reuse_port=True)
            try:
                return launch.run_api_processes(args, listen_address, sock, serve_process)
            finally:
                sock.close()

        def interrupt(*_: Any) -> None:
            # uvicorn's own handlers come later; until then a SIGTERM must still stop the engine processes.
            raise KeyboardInterrupt("terminated")

        signal.signal(signal.SIGTERM, interrupt)
        listen_address, sock = setup_server(args, reuse_port=False)
        return int(uvloop.run(_serve(args, listen_address, sock, None)))


def serve_process(listen_address: str, sock: Any, args: argparse.Namespace, client_config: dict[str, Any]) -> None:
    """One of several API processes, from its start to its end; exits with status 1 when the engine died."""
    import uvloop
    from vllm.logger import configure_logging_from_args
    from vllm.utils.system_utils import decorate_logs, set_process_title

    configure_logging_from_args(args)
    set_process_title("APIServer", str(client_config["client_index"]))
    decorate_logs()
    raise SystemExit(uvloop.run(_serve(args, listen_address, sock, client_config)))


async def _serve(args: argparse.Namespace, listen_address: str, sock: Any, client_config: dict[str, Any] | None) -> int:
    peer_loads = None
    if client_config and "api_server_loads" in client_config:
        peer_loads = (client_config.pop("api_server_loads"), client_config["client_index"])
    registry = await asyncio.to_thread(Registry.open, args.steering_directory)
    process = _Process(args, registry)
    try:
        async with launch.engine_client(args, client_config, process.on_stop) as client:
            app = await process.start(client, is_first=not client_config or not client_config["client_index"])
            process.logger.info("Starting ExpertSteer server on %s", listen_address)
            shutdown = await launch.serve(app, sock, args, peer_loads)
            died = launch.has_died(client)
        await shutdown
    finally:
        await process.stop()
        registry.close()
        sock.close()
    return 1 if died else 0


class _Process:
    """One API process: builds the parts around vLLM's client, and ends them."""

    def __init__(self, args: argparse.Namespace, registry: Registry) -> None:
        from vllm.logger import init_logger

        # The names that vLLM itself logs by: its configuration shows loggers under "vllm" only.
        self.logger = init_logger("vllm.expertsteer")
        self._args = args
        self._registry = registry
        self._loop = asyncio.get_running_loop()
        self._reconciler: Reconciler | None = None
        self._convergence: Convergence | None = None

    async def start(self, client: Any, is_first: bool) -> FastAPI:
        """Prove that steering works, load what the registry wants, and build the app.

        Args:
            client: vLLM's `AsyncLLM`.
            is_first: whether this process does what one has to do for all.
        """
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        args, registry = self._args, self._registry
        settings = SteeringSettings.from_args(args)
        request_log.enable(args.enable_log_requests)
        engine = SteeringEngine(client)
        spans = EngineSettings.of(client.vllm_config).spans
        pins, counters = Pins(), SteeringMetrics(settings.metric_profiles)
        programs = _programs(args, settings, registry)
        audit_log = AuditLog(registry.directory / "audit.jsonl")
        member = await asyncio.to_thread(registry.members.join, args.steering_instance, os.getpid())
        reconciler = self._reconciler = Reconciler(
            registry,
            engine,
            programs,
            pins,
            instance=args.steering_instance,
            lock=args.steering_lock,
            member=member,
            keep_versions=settings.keep_versions,
            spans=spans,
            metrics=counters,
        )
        if is_first:
            await engine.self_test()
            reconciler.has_passed_self_test = True
            self.logger.info("Steering self-test passed: every decoder layer can be steered.")
        else:
            await reconciler.wait_for_peer(_PEERS_TIMEOUT_S)
            # Its readiness says so.
            reconciler.has_passed_self_test = True
        await reconciler.start()
        for profile in reconciler.table:
            self.logger.info("Steering profile %s: %s", profile.name, profile.settings.key)
        rollout, recorder = Rollout(registry, reconciler), OperationRecorder(counters, audit_log)
        bundle_operations = BundleOperations(
            registry,
            reconciler,
            rollout,
            programs,
            recorder,
            spans=spans,
            signatures=_signatures(settings),
            root=BundleRoot(settings.bundle_root) if settings.bundle_root is not None else None,
            remote=RemoteSources(settings.remote),
            max_bundle_bytes=settings.max_bundle_bytes,
        )
        profile_operations = ProfileOperations(registry, reconciler, rollout, recorder, spans=spans)
        if settings.declaration is not None:
            self._convergence = Convergence(
                settings.declaration, registry, bundle_operations, profile_operations, acts=is_first
            )
            self._convergence.start()
        keys = _key_ring(args, settings)
        service = SteeringService(
            model_names=tuple(args.served_model_name or [args.model]),
            instance=args.steering_instance,
            build=_build_info((await engine.status())[0]["backend"]),
            bytes_per_row=client.model_config.get_hidden_size() * client.model_config.dtype.itemsize,
            engine=engine,
            registry=registry,
            reconciler=reconciler,
            bundle_operations=bundle_operations,
            profile_operations=profile_operations,
            pins=pins,
            metrics=counters,
            audit=audit_log,
            keys=keys,
            convergence=self._convergence,
        )
        supported_tasks = await client.get_supported_tasks()
        app = build_app(args, supported_tasks, client.model_config)
        await init_app_state(client, app.state, args, supported_tasks)
        require_responses(app.state.openai_serving_responses)
        messages_seam.attach(app.state.anthropic_serving_messages)
        install(app, service, RateLimit(settings.write_rate, _BURST_S * settings.write_rate), settings.has_playground)
        return app

    def on_stop(self) -> None:
        """Take no more requests; called from some thread."""
        if self._reconciler is not None and self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self._reconciler.drain(), self._loop)

    async def stop(self) -> None:
        """Leave the registry."""
        if self._convergence is not None:
            await self._convergence.stop()
        if self._reconciler is not None:
            await self._reconciler.stop()


def install(
    app: FastAPI, service: SteeringService, limit: RateLimit | None = None, has_playground: bool = True
) -> None:
    """Put the steering routes in the place of vLLM's, and access control and the guard in front of all."""
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    app.state.steering = service
    app.state.steering_scraper = Scraper(service)
    app.router.routes[:] = [
        route for route in app.router.routes if getattr(route, "path", None) not in _REPLACED_ROUTES
    ]
    for module in (
        chat,
        completion,
        responses,
        messages,
        models,
        health,
        metrics,
        bundles,
        root,
        profiles,
        status,
        audit,
    ):
        app.include_router(module.router)
    if has_playground:
        playground.attach(app)
    # vLLM's guards a few prefixes; ours every route, with the same keys among others.
    app.user_middleware[:] = [each for each in app.user_middleware if each.cls is not AuthenticationMiddleware]
    app.user_middleware.insert(0, Middleware(AccessMiddleware, keys=service.keys, limit=limit))
    # Innermost: a request without a key is refused for that first.
    app.user_middleware.append(Middleware(SteeringGuard))
    original = app.exception_handlers[RequestValidationError]
    of_fastapi = app.exception_handlers[HTTPException]

    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        for entry in error.errors():
            if entry["type"] in list(ErrorCode):
                service.metrics.refused(entry["type"], [])
                refusal = SteeringRequestError(ErrorCode(entry["type"]), entry["ctx"]["reason"])
                return refusal.response(route=get_route_path(request.scope))
        response: Response = await original(request, error)  # type: ignore[misc]
        return response

    async def on_refused(request: Request, error: SteeringRequestError) -> Response:
        return error.response(request.headers.get("x-request-id") or request.url.path, get_route_path(request.scope))

    async def on_http_error(request: Request, error: StarletteHTTPException) -> Response:
        response: Response = await of_fastapi(request, error)  # type: ignore[misc]
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(RequestValidationError, on_invalid)  # type: ignore[arg-type]
    app.add_exception_handler(SteeringRequestError, on_refused)  # type: ignore[arg-type]
    # What the router, and FastAPI for a body that it cannot read, raise: vLLM knows FastAPI's own class only.
    app.add_exception_handler(StarletteHTTPException, on_http_error)  # type: ignore[arg-type]
    # vLLM's hosting-container bootstrap has built the stack already, without what was added here.
    app.middleware_stack = app.build_middleware_stack()


def _build_info(backend: str) -> Mapping[str, Any]:
    import torch
    import vllm

    versions = {"version": version("expertsteer"), "vllm": vllm.__version__, "torch": torch.__version__}
    return {**versions, "backend": backend, "registry_schema": len(schema.MIGRATIONS)}


def _served_model(args: argparse.Namespace) -> ServedModel:
    """Identity of the served model, from its files: before anything is loaded, so that a mismatch costs no time."""
    folder = Path(args.model)
    if not folder.is_dir():
        if args.model.startswith(("/", ".", "~")):
            raise FileNotFoundError(f"There is no model folder {args.model}.")
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(args.model, revision=args.revision, allow_patterns=_MODEL_FILES))
    return served_model(folder)


def _programs(args: argparse.Namespace, settings: SteeringSettings, registry: Registry) -> Programs:
    def vocabulary() -> dict[int, str]:
        return vocabulary_of(load_tokenizer(args))

    return Programs(registry.store, args.served_steering_model, settings.fingerprint, vocabulary)


def _signatures(settings: SteeringSettings) -> SignaturePolicy:
    return SignaturePolicy(settings.signatures, settings.signature_keys)


def _key_ring(args: argparse.Namespace, settings: SteeringSettings) -> KeyRing:
    from vllm import envs

    api_keys = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
    return KeyRing.load(settings.keys, api_keys, os.environ.get(_ADMIN_KEY_VARIABLE))


def _spans(args: argparse.Namespace, settings: SteeringSettings, registry: Registry) -> dict[str, SpanTokens]:
    """Delimiters of the spans that profiles exclude, or may exclude later.

    Raises:
        ValueError: a profile excludes a span whose delimiters nobody knows.
    """
    current = [versions[0] for versions in registry.snapshot().profiles.values()]
    wanted = {
        span: each.name for each in current for span in SPAN_NAMES if each.settings and span in each.settings.exclude
    }
    # Engines that speculate cannot have spans; they are not asked to unless a profile needs one.
    looked_for = wanted if args.speculative_config is not None else dict.fromkeys(SPAN_NAMES) | wanted
    parsers = args.tool_call_parser or args.reasoning_parser or args.structured_outputs_config.reasoning_parser
    if not wanted and not settings.spans and not parsers:
        return {}
    tokenizer = load_tokenizer(args)
    known: dict[str, SpanTokens] = {}
    for span, profile in looked_for.items():
        try:
            texts = settings.spans.get(span) or parser_span(span, args, tokenizer)
            if texts is not None:
                known |= span_tokens({span: texts}, tokenizer)
        except ValueError:
            # Nobody has asked for this span.
            if profile is None and span not in settings.spans:
                continue
            raise
        if texts is None and profile is not None:
            raise ValueError(
                f"Profile {profile!r} leaves {span} unsteered and nothing says which tokens open and close them; "
                f"add --steering-span {span}=OPEN,CLOSE."
            )
    return known
