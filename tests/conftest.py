"""Real servers for the tests: each is started once, in its own process group, and always stopped.

Tests reach everything here through fixtures, because modules imported in importlib mode cannot import each other.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch
from hypothesis import settings

from artifacts.bundle import Bundle, load_bundle, write_bundle
from artifacts.manifest import Intervention, Manifest, ModelIdentity, Scope
from server.client import SteeringClient

# A shell that runs the suite in the background has it ignore Ctrl-C, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")

LAB = Path(__file__).parents[1] / "artifacts" / "lab"
TARGET = LAB / "models" / "target"
HIDDEN_SIZE, NUM_LAYERS = 128, 6
# About a third of the lab model's residual norm: changes every distribution, and leaves text a text.
WRITE_NORM = 150.0
# One valid intervention of each kind, but for layer and tensors; the sizes suit the lab's target.
EXAMPLES: dict[str, dict[str, Any]] = {
    "add": {},
    "add_relative": {"keep_norm": True},
    "project": {},
    "clamp": {"parameters": {"minimum": -5.0, "maximum": 10.0}},
    "gated_add": {"parameters": {"threshold": 0.1, "slope": 20.0, "cosine": True}},
    "feature": {"parameters": {"bias": -3.0, "activation": "relu", "edit": "scale", "value": 2.0}},
    "rotate": {"parameters": {"angle": 0.7, "mode": "relative"}},
    "affine": {},
    "condition": {"sets": "open", "parameters": {"threshold": 2.0, "below": True}},
}
_READS = ("project", "clamp", "gated_add", "feature", "rotate", "affine", "condition")
_WRITES = ("add", "add_relative", "gated_add", "feature", "affine")
START_TIMEOUT_S, STOP_TIMEOUT_S, REQUEST_TIMEOUT_S = 400, 30, 120
# The smallest block that vLLM's CPU attention takes; whole distributions, so that tests can compare them.
ENGINE_FLAGS = (
    *("--served-model-name", "lab", "--dtype", "float32", "--max-model-len", "512", "--block-size", "32"),
    *("--max-logprobs", "640", "--enable-prompt-tokens-details"),
)
# So that an answer may go on while much else happens; what it says so far beyond the model's training is no matter.
LONG_ANSWERS = ("--max-model-len", "4096", "--hf-overrides", '{"max_position_embeddings": 4096}')
_LOG_TAIL_LINES = 40
ADMIN_KEY = "admin-key-of-the-tests"
MAX_BUNDLE_MIB = 2


@dataclass(frozen=True)
class Server:
    """A running server and an HTTP client for it."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    client: httpx.Client

    def post(self, path: str, body: Any) -> httpx.Response:
        """POST a JSON body, or bytes as they are."""
        if isinstance(body, bytes):
            return self.client.post(path, content=body, headers={"content-type": "application/json"})
        return self.client.post(path, json=body)

    def complete(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        """Greedy text completion that must succeed; `prompt` is text, token ids or a list of those."""
        body = {"model": "lab", "prompt": prompt, "temperature": 0, "return_token_ids": True, **fields}
        return self._json("/v1/completions", body)

    def chat(self, text: str, **fields: Any) -> dict[str, Any]:
        """Greedy answer to one user message; must succeed."""
        messages = [{"role": "user", "content": text}]
        return self._json("/v1/chat/completions", {"model": "lab", "messages": messages, "temperature": 0, **fields})

    def _json(self, path: str, body: Any) -> dict[str, Any]:
        response = self.post(path, body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Chunks of a streamed answer; it must end with [DONE]."""
        usage = {"include_usage": True}
        lines = []
        with self.client.stream("POST", path, json={**body, "stream": True, "stream_options": usage}) as response:
            assert response.status_code == 200, response.read()
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Events of a streamed answer whose events have names."""
        with self.client.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            lines = [line for line in response.iter_lines() if line]
        names = [line.removeprefix("event: ") for line in lines[::2]]
        events = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
        assert names == [event["type"] for event in events]
        return events

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], workers: int = 32) -> list[Any]:
        """Apply a function that makes requests to every item, all at the same time."""
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(function, items))

    def metric(self, name: str, **labels: str) -> float:
        """Sum of one Prometheus series over the labels that are not given; 0 when it has not been counted yet."""
        text = self.client.get("/metrics").text
        found = re.findall(rf"^{re.escape(name)}({{.*}})? (\S+)$", text, re.MULTILINE)
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(float(value) for given, value in found if all(each in given for each in wanted))

    def steering_status(self) -> list[dict[str, Any]]:
        """What the workers say about themselves."""
        workers: list[dict[str, Any]] = self.client.get("/v1/steering/status").json()["workers"]
        return workers


class Operated(NamedTuple):
    """A server whose registry tests may change.

    Attributes:
        server: for requests.
        admin: for changes, with a write key.
        registry: its folder.
    """

    server: Server
    admin: SteeringClient
    registry: Path


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:])


def _wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            pytest.fail(f"the server ended with {server.process.returncode} at start:\n{_tail(server.log)}")
        with contextlib.suppress(httpx.TransportError):
            if server.client.get("/health").status_code == 200:
                return
        time.sleep(0.5)
    pytest.fail(f"the server was not ready within {START_TIMEOUT_S} s:\n{_tail(server.log)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to stop, then end whatever is left of its process group."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(STOP_TIMEOUT_S)


@contextlib.contextmanager
def _running(command: Sequence[str], environment: dict[str, str], log: Path) -> Iterator[Server]:
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    limits = httpx.Limits(max_connections=64, max_keepalive_connections=64)
    try:
        # A request must not meet a proxy of the machine it runs on.
        with httpx.Client(base_url=url, timeout=REQUEST_TIMEOUT_S, limits=limits, trust_env=False) as client:
            server = Server(url, process, log, client)
            _wait_until_ready(server)
            yield server
    finally:
        _stop(process)


@pytest.fixture(scope="session")
def vllm_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a vLLM process: no network, caches that every server of the session shares.

    One thread: for a model as small as the lab's a second one only waits, and takes a core from other tests.
    """
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("vllm-cache")),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


@pytest.fixture(scope="session")
def target() -> Path:
    """Folder of the model that every server serves as `lab`."""
    return TARGET


@pytest.fixture(scope="session")
def kind_examples() -> dict[str, dict[str, Any]]:
    """One valid intervention of each kind, but for layer and tensors: steps of `make_bundle`."""
    return {kind: {"kind": kind} | fields for kind, fields in EXAMPLES.items()}


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a bundle of random tensors for the lab model; keyword arguments replace parts of its manifest.

    `steps` holds the fields of one intervention per layer, without its layer and tensors; left out, all are additions.
    """

    def make(
        name: str, layers: Sequence[int], seed: int, steps: Sequence[dict[str, Any]] | None = None, **changes: Any
    ) -> Path:
        generator = torch.Generator().manual_seed(seed)
        hidden_size = changes["target"].hidden_size if "target" in changes else HIDDEN_SIZE
        writes = torch.nn.functional.normalize(torch.randn(len(layers), hidden_size, generator=generator)) * WRITE_NORM
        tensors: dict[str, torch.Tensor] = {}
        interventions = []
        for index, step in enumerate([{"kind": "add"}] * len(layers) if steps is None else steps):
            place = f"runtime.{layers[index]}.{layers[:index].count(layers[index])}"
            drawn = _draw(step["kind"], writes[index], generator)
            tensors |= {f"{place}.{role}": tensor for role, tensor in drawn.items()}
            fields = {"layer": layers[index], **{role: f"{place}.{role}" for role in drawn}}
            interventions.append(Intervention.model_validate(fields | step))
        manifest = {
            "name": name,
            "target": ModelIdentity(
                id="lab-target", architecture="LlamaForCausalLM", hidden_size=hidden_size, num_layers=NUM_LAYERS
            ),
            "interventions": tuple(interventions),
            "recommended_strength": 1.0,
            "maximum_strength": 4.0,
            "scope": Scope.ALL,
        }
        path = tmp_path_factory.mktemp(name) / f"{name}.safetensors"
        write_bundle(path, Manifest(**(manifest | changes)), tensors)
        return path

    return make


def _draw(kind: str, write: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Tensors that a kind takes: orthonormal reads, writes of a size that suits it."""
    drawn = {}
    if kind in _READS:
        plane = torch.linalg.qr(torch.randn(write.numel(), 2, generator=generator)).Q.T.contiguous()
        drawn["read"] = plane if kind == "rotate" else plane[0] * (2.0 if kind == "affine" else 1.0)
    if kind in _WRITES:
        share = {"add": 1.0, "gated_add": 1.0, "affine": 0.3}.get(kind, 0.5 / WRITE_NORM)
        drawn["write"] = write * share
    return drawn


@pytest.fixture(scope="session")
def bundle_files(make_bundle: Callable[..., Path]) -> dict[str, Path]:
    """The profiles that the servers know: the shipped one, and random ones at the ends and between, one twice."""
    return {
        "careful": LAB / "careful.safetensors",
        "early": make_bundle("early", [0, 2], 1),
        "late": make_bundle("late", [3, 5], 2),
        "every": make_bundle("every", list(range(NUM_LAYERS)), 3, recommended_strength=0.5),
        "double": make_bundle("double", [1, 4, 4], 4, scope=Scope.RESPONSE),
    }


@pytest.fixture(scope="session")
def bundles(bundle_files: dict[str, Path]) -> dict[str, Bundle]:
    """The same, loaded."""
    return {name: load_bundle(path) for name, path in bundle_files.items()}


@pytest.fixture(scope="session")
def start_server(
    vllm_environment: dict[str, str], bundle_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., contextlib.AbstractContextManager[Server]]:
    """Start `expertsteer serve MODEL` with every test bundle and further flags; a context manager."""

    def start(
        name: str, *flags: str, model: Path = TARGET, **environment: str
    ) -> contextlib.AbstractContextManager[Server]:
        bundle_flags = ["--steering-bundle", *map(str, bundle_files.values())]
        command = ["-m", "server.cli", "serve", str(model), *ENGINE_FLAGS, *bundle_flags, *flags]
        log = tmp_path_factory.mktemp("logs") / f"{name}.log"
        return _running(command, vllm_environment | environment, log)

    return start


@pytest.fixture(scope="session")
def start_operated(
    vllm_environment: dict[str, str], bundle_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., contextlib.AbstractContextManager[Operated]]:
    """Start a server on a registry, with an admin key and no bundle of its own unless `bundles` names some."""

    @contextlib.contextmanager
    def start(
        name: str, *flags: str, registry: Path | None = None, bundles: Sequence[str] = (), **environment: str
    ) -> Iterator[Operated]:
        folder = tmp_path_factory.mktemp(name) / "registry" if registry is None else registry
        flags = ("--enforce-eager", "--max-num-seqs", "64", "--steering-registry", str(folder), *flags)
        flags = (*flags, "--steering-write-rate", "10000", *LONG_ANSWERS)
        if bundles:
            flags = (*flags, "--steering-bundle", *(f"{bundle}={bundle_files[bundle]}" for bundle in bundles))
        command = ["-m", "server.cli", "serve", str(TARGET), *ENGINE_FLAGS, *flags]
        environment = vllm_environment | {"EXPERTSTEER_ADMIN_KEY": ADMIN_KEY} | environment
        log = tmp_path_factory.mktemp("logs") / f"{name}.log"
        with _running(command, environment, log) as server, SteeringClient(server.url, ADMIN_KEY) as admin:
            server.client.headers["authorization"] = f"Bearer {ADMIN_KEY}"
            yield Operated(server, admin, folder)

    return start


@pytest.fixture(scope="session")
def program() -> Callable[[str], str]:
    """Path of a program that is not a Python package; without it the test is skipped, but fails in CI."""

    def find(name: str) -> str:
        path = shutil.which(name)
        if path is None:
            reason = f"{name} is not installed"
            if os.environ.get("CI") == "true":
                pytest.fail(reason)
            pytest.skip(reason)
        return path

    return find


@pytest.fixture(scope="session")
def bundle_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that the server `operated` takes bundles from by name."""
    return tmp_path_factory.mktemp("bundle-root")


@pytest.fixture(scope="session")
def operated(
    start_operated: Callable[..., contextlib.AbstractContextManager[Operated]], bundle_root: Path
) -> Iterator[Operated]:
    """A server on a registry of its own, for tests that leave it as they found it: without profiles and bundles."""
    flags = ("--steering-bundle-root", str(bundle_root), "--steering-max-bundle-mib", str(MAX_BUNDLE_MIB))
    with start_operated("operated", *flags) as server:
        yield server


@pytest.fixture(scope="session")
def eager(start_server: Callable[..., contextlib.AbstractContextManager[Server]]) -> Iterator[Server]:
    """The steering server without compilation, with room for every request, that keeps responses."""
    flags = ("--enforce-eager", "--max-num-seqs", "40")
    with start_server("eager", *flags, VLLM_ENABLE_RESPONSES_API_STORE="1") as server:
        yield server


@pytest.fixture(scope="session")
def compiled(start_server: Callable[..., contextlib.AbstractContextManager[Server]]) -> Iterator[Server]:
    """The steering server compiled, and short of everything: prompts in chunks of 24 tokens, 20 blocks of KV cache."""
    flags = ("--max-num-seqs", "8", "--max-num-batched-tokens", "24", "--num-gpu-blocks-override", "20")
    with start_server("compiled", *flags) as server:
        yield server


@pytest.fixture(scope="session")
def plain(vllm_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """vLLM's own server without this package's options, otherwise like `eager`."""
    log = tmp_path_factory.mktemp("logs") / "plain.log"
    command = ["-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(TARGET), *ENGINE_FLAGS]
    with _running([*command, "--enforce-eager", "--max-num-seqs", "40"], vllm_environment, log) as server:
        yield server


@pytest.fixture(scope="session")
def text_tokens() -> list[int]:
    """Token ids of a long stretch of the lab's neutral text, for prompts of any length."""
    from transformers import AutoTokenizer

    lines = (LAB / "data" / "neutral.jsonl").read_text().splitlines()[:200]
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    ids: list[int] = tokenizer(" ".join(json.loads(line)["text"] for line in lines), add_special_tokens=False).input_ids
    return ids
