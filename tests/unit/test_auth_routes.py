"""Every route of the real application has a rule of its own: a route without one fails here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.auth.rules import WEBSOCKET, Access, access_of, explicit

# vLLM's application as `serve` builds it, with every optional route, and this package's routes. In a process of its
# own, because building it changes logging and registries of the process for good.
_LIST_ROUTES = """
import json, sys
from types import SimpleNamespace
from typing import get_args
from server import app as server_app
from server.auth.keys import KeyRing
from server.auth.rules import WEBSOCKET
from vllm.config import ProfilerConfig
from vllm.entrypoints.launchers.app import build_app
from vllm.tasks import SupportedTask

flags = ["--enable-lora", "--enable-tokenizer-info-endpoint", "--enable-offline-docs", "--model", sys.argv[1]]
args = server_app.make_parser("serve").parse_args(flags)
args.profiler_config = ProfilerConfig(profiler="torch", torch_profiler_dir=sys.argv[2])
args.enable_fault_tolerance = True


class ModelConfig:
    hf_config = SimpleNamespace(num_labels=2)
    is_cross_encoder = True
    score_type = "cross-encoder"

    def get_pooling_task(self, tasks):
        return "classify"

    def __getattr__(self, name):
        return None


def tasks_of(annotation):
    for part in get_args(annotation):
        yield from [part] if isinstance(part, str) else tasks_of(part)


app = build_app(args, tuple(tasks_of(SupportedTask)), ModelConfig())
server_app.install(app, SimpleNamespace(keys=KeyRing()))
routes = []
for route in app.router.routes:
    kind = type(route).__name__
    methods = [WEBSOCKET] if "WebSocket" in kind else sorted(getattr(route, "methods", None) or ["GET"])
    routes += [(method, route.path) for method in methods]
    if kind == "Mount":
        routes += [(method, route.path + "/{path:path}") for method in methods]
print("ROUTES " + json.dumps(routes))
"""
_TARGET = Path(__file__).parents[2] / "artifacts" / "lab" / "models" / "target"


@pytest.fixture(scope="module")
def routes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    environment = {
        **{"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1"},
        **{"HF_HUB_OFFLINE": "1", "VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("cache"))},
    }
    command = [sys.executable, "-c", _LIST_ROUTES, str(_TARGET), str(tmp_path_factory.mktemp("profile"))]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("ROUTES ")]
    return [(method, path) for method, path in json.loads(line.removeprefix("ROUTES "))]


def test_every_route_has_a_rule(routes: list[tuple[str, str]]) -> None:
    missing = sorted({route for route in routes if not explicit(*route)})
    assert not missing, f"add these to server/auth/rules.py: {missing}"


def test_the_application_is_whole(routes: list[tuple[str, str]]) -> None:
    """The list holds what is optional, so that the other test means something."""
    expected = {
        *(("POST", "/sleep"), ("POST", "/start_profile"), ("GET", "/tokenizer_info"), ("POST", "/pause")),
        *(("POST", "/v1/load_lora_adapter"), ("DELETE", "/adapters/{adapter_name}"), ("POST", "/invocations")),
        *(("GET", "/metrics"), ("GET", "/static/{path:path}"), (WEBSOCKET, "/v1/realtime")),
        *(("POST", "/fault_tolerance/apply"), ("POST", "/v1/embeddings"), ("POST", "/inference/v1/generate")),
        *(("PUT", "/v1/steering/profiles/{name}"), ("POST", "/v1/steering/bundles"), ("GET", "/health/ready")),
    }
    assert expected <= set(routes)


def test_only_these_are_open(routes: list[tuple[str, str]]) -> None:
    """Nothing that computes, changes or tells about requests is open."""
    assert {path for method, path in routes if access_of(method, path) is Access.OPEN} == {
        *("/health", "/health/live", "/health/ready", "/ping", "/version", "/metrics"),
        *("/docs", "/docs/oauth2-redirect", "/openapi.json", "/static", "/static/{path:path}"),
        *("/playground", "/playground/{path:path}"),
    }


def test_what_changes_this_package_needs_a_write_key(routes: list[tuple[str, str]]) -> None:
    for method, path in routes:
        if path.startswith("/v1/steering"):
            expected = {Access.READ, Access.KNOWN} if method in ("GET", "HEAD") else {Access.WRITE}
            assert access_of(method, path) in expected
