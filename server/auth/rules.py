"""Rules: which key each route of the server needs."""

import re
from collections.abc import Iterator
from enum import StrEnum

from starlette.routing import compile_path

from server.auth.keys import Role

WEBSOCKET = "WEBSOCKET"
STEERING_ROOT = "/v1/steering"


class Access(StrEnum):
    """Who may use a route once keys are configured."""

    OPEN = "open"
    # Any key: lists of what there is to ask for.
    KNOWN = "known"
    INFERENCE = "inference"
    READ = "read"
    WRITE = "write"


_ROLES: dict[Access, frozenset[Role]] = {
    Access.OPEN: frozenset(Role),
    Access.KNOWN: frozenset(Role),
    Access.INFERENCE: frozenset({Role.INFERENCE, Role.WRITE}),
    Access.READ: frozenset({Role.READ, Role.WRITE}),
    Access.WRITE: frozenset({Role.WRITE}),
}

_RULES: tuple[tuple[Access, str, tuple[str, ...]], ...] = (
    (
        Access.OPEN,
        "GET",
        (
            *("/health", "/health/live", "/health/ready", "/ping", "/version", "/metrics"),
            *("/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json", "/static", "/static/{path:path}"),
            *("/playground", "/playground/{path:path}"),
        ),
    ),
    (Access.OPEN, "POST", ("/ping",)),
    (Access.KNOWN, "GET", ("/v1/models", "/v1/steering/profiles", "/load")),
    (Access.INFERENCE, "GET", ("/tokenizer_info", "/v1/responses/{response_id}")),
    (
        Access.INFERENCE,
        "POST",
        (
            *("/v1/completions", "/v1/completions/render", "/v1/completions/derender"),
            *("/v1/chat/completions", "/v1/chat/completions/batch"),
            *("/v1/chat/completions/render", "/v1/chat/completions/derender"),
            *("/v1/responses", "/v1/responses/{response_id}/cancel", "/v1/responses/render"),
            *("/v1/messages", "/v1/messages/count_tokens", "/v1/messages/render"),
            *("/cohere/v2/chat", "/invocations", "/inference/v1/generate", "/v1/systemone", "/generative_scoring"),
            *("/tokenize", "/detokenize", "/pooling", "/classify", "/v1/embeddings", "/v2/embed"),
            *("/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
            *("/v1/audio/transcriptions", "/v1/audio/translations"),
        ),
    ),
    (Access.INFERENCE, WEBSOCKET, ("/v1/realtime",)),
    (
        Access.READ,
        "GET",
        (
            *("/v1/steering/bundles", "/v1/steering/bundles/{digest}", "/v1/steering/bundles/{digest}/manifest"),
            *("/v1/steering/bundles/{digest}/tensors", "/v1/steering/root"),
            *("/v1/steering/profiles/{name}", "/v1/steering/status", "/v1/steering/audit"),
        ),
    ),
    (Access.WRITE, "POST", ("/v1/steering/bundles", "/v1/steering/profiles/{name}/rollback")),
    (Access.WRITE, "PUT", ("/v1/steering/profiles/{name}",)),
    (Access.WRITE, "DELETE", ("/v1/steering/bundles/{digest}", "/v1/steering/profiles/{name}")),
    # Routes of vLLM that change the engine, or show more of it than a client needs.
    (
        Access.WRITE,
        "GET",
        (
            *("/server_info", "/kv_event_sources", "/is_sleeping", "/is_paused", "/weight_info", "/get_world_size"),
            "/fault_tolerance/status",
        ),
    ),
    (
        Access.WRITE,
        "POST",
        (
            *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters"),
            *("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache", "/release_kv_cache_memory"),
            *("/collective_rpc", "/sleep", "/wake_up", "/pause", "/resume", "/start_profile", "/stop_profile"),
            *("/abort_requests", "/inference/v1/abort_requests", "/scale_elastic_ep", "/is_scaling_elastic_ep"),
            *("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/update_weights"),
            *("/start_weight_update", "/start_draft_weight_update", "/finish_weight_update"),
            *("/update_weight_version", "/weight_checker", "/fault_tolerance/apply"),
        ),
    ),
    (Access.WRITE, "DELETE", ("/adapters/{adapter_name}",)),
)

_PLAIN: dict[tuple[str, str], Access] = {}
_TEMPLATES: list[tuple[str, re.Pattern[str], Access]] = []
for _access, _method, _paths in _RULES:
    for _path in _paths:
        if "{" in _path:
            _TEMPLATES.append((_method, compile_path(_path)[0], _access))
        else:
            _PLAIN[_method, _path] = _access


def access_of(method: str, path: str) -> Access:
    """Who may use a route; WRITE for one without a rule.

    Args:
        method: HTTP method, or `WEBSOCKET`.
        path: path that the router matches: decoded, without the root path.
    """
    # A preflight of a browser comes without a key.
    if method == "OPTIONS":
        return Access.OPEN
    # The router answers a slash too many with a redirect to the route without it.
    return _find(method, path.rstrip("/") or path) or Access.WRITE


def explicit(method: str, path: str) -> bool:
    """Whether a route has a rule of its own; `path` may be a template, as `/v1/steering/profiles/{name}`."""
    return method == "OPTIONS" or _find(method, path) is not None


def routes() -> Iterator[tuple[Access, str, str]]:
    """Every rule: access, method and path, as documentation shows them."""
    for access, method, paths in _RULES:
        for path in paths:
            yield access, method, path


def is_steering(path: str) -> bool:
    """Whether a route is one of this package's."""
    return path == STEERING_ROOT or path.startswith(f"{STEERING_ROOT}/")


def permits(role: Role, access: Access) -> bool:
    """Whether keys of a role open such a route."""
    return role in _ROLES[access]


def _find(method: str, path: str) -> Access | None:
    method = "GET" if method == "HEAD" else method
    plain = _PLAIN.get((method, path))
    if plain is not None:
        return plain
    for rule_method, pattern, access in _TEMPLATES:
        # As the router does it, so that both mean the same route.
        if rule_method == method and pattern.match(path):
            return access
    return None
