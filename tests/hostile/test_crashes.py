"""Processes that are killed or asked to stop: what was acknowledged stays, and nothing half done does.

All servers here run one after the other on one registry, so every start also shows what the end before has left.
"""

import contextlib
import hashlib
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from waiting import wait_until

from server.admin_schema import ProfileSpec
from server.client import SteeringClient, SteeringClientError
from server.registry.registry import Registry

pytestmark = pytest.mark.engine

NAME, PROMPT = "kept", "What is 7 plus 5?"
END_TIMEOUT_S = 60
# Enough for a call to come to the step where something holds it up.
UNDER_WAY_S = 1.0
NUM_STREAMS, STREAM_TOKENS = 12, 300
# The present version of the profile and, by default, two before it.
NUM_RESIDENT = 3
DRAINING = "steering_server_draining"


@dataclass
class Ledger:
    """What the servers have acknowledged so far.

    Attributes:
        registry: folder that they run on.
        generation: of the last change.
        settings: of the profile, as the last change made them: bundle and strength.
        bundles: digests that were added.
        answer: text that the profile gives.
    """

    registry: Path
    generation: int = 0
    settings: tuple[str, float] | None = None
    bundles: list[str] = field(default_factory=list)
    answer: str | None = None


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    return Ledger(tmp_path_factory.mktemp("crashes") / "registry")


@pytest.fixture(scope="module")
def processes() -> Iterator[ThreadPoolExecutor]:
    """Threads for calls that a server does not answer as long as it stands still."""
    with ThreadPoolExecutor(NUM_STREAMS + 4) as pool:
        yield pool


@pytest.fixture
def start(start_operated: Callable[..., Any], ledger: Ledger) -> Callable[..., Any]:
    """Start a server on the registry, and compare it with what was acknowledged."""

    @contextlib.contextmanager
    def start(name: str, *flags: str) -> Iterator[Any]:
        with start_operated(f"crash-{name}", *flags, registry=ledger.registry) as operated:
            check_restored(operated, ledger)
            yield operated

    return start


def check_restored(operated: Any, ledger: Ledger) -> None:
    if ledger.settings is None:
        assert operated.admin.profiles() == []
        return
    answer = operated.server.complete(PROMPT, steering_profile=NAME, max_tokens=8)
    assert answer["steering"]["bundle"] == ledger.settings[0]
    assert answer["choices"][0]["text"] == ledger.answer
    detail = operated.admin.profile(NAME)
    assert (detail.bundle, detail.strength) == ledger.settings
    status = operated.admin.status()
    assert status.is_ready
    assert status.generation_desired == status.generation_observed == ledger.generation
    assert {bundle.digest for bundle in operated.admin.bundles()} == set(ledger.bundles)
    for worker in status.workers:
        assert set(worker.bundles) == set(ledger.bundles[-NUM_RESIDENT:])


def change(operated: Any, ledger: Ledger, file: Path) -> None:
    """Add a bundle and point the profile to it; then it stands in the ledger."""
    digest = operated.admin.upload(file).digest
    strength = 1 + len(ledger.bundles) / 8
    answer = operated.admin.put_profile(NAME, ProfileSpec(bundle=digest, strength=strength))
    ledger.bundles.append(digest)
    ledger.settings, ledger.generation = (digest, strength), answer.generation
    ledger.answer = operated.server.complete(PROMPT, steering_profile=NAME, max_tokens=8)["choices"][0]["text"]


def digest_of(file: Path) -> str:
    return f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"


def query(registry: Path, sql: str) -> list[Any]:
    """Look into the registry as nobody but a test does: at what is between two steps."""
    with contextlib.closing(sqlite3.connect(f"file:{registry / 'runtime.sqlite'}?mode=ro", uri=True)) as connection:
        return connection.execute(sql).fetchall()


def parts(operated: Any) -> tuple[psutil.Process, psutil.Process, list[psutil.Process]]:
    """Worker, engine core, and all processes of a server."""
    worker = psutil.Process(operated.admin.status().workers[0].pid)
    main = psutil.Process(operated.server.process.pid)
    return worker, worker.parent(), [main, *main.children(recursive=True)]


def status_of(operated: Any, method: str, *args: Any) -> int | None:
    """HTTP status of a change that a client of its own makes; None when the connection broke."""
    with SteeringClient(operated.server.url, key(operated)) as client:
        try:
            getattr(client, method)(*args)
        except SteeringClientError as error:
            return error.status
    return 200


def check_ended(operated: Any, everything: Sequence[psutil.Process], ledger: Ledger) -> None:
    """The server has ended by itself, as a failure, with all of its processes, and left a registry without damage."""
    assert operated.server.process.wait(END_TIMEOUT_S) != 0
    wait_until(lambda: not any(map(is_running, everything)))
    check_registry(ledger)


def is_running(process: psutil.Process) -> bool:
    """Whether it is more than an entry that nobody has asked for its status yet."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def check_registry(ledger: Ledger) -> None:
    command = [sys.executable, "-m", "server.cli", "registry", "verify", str(ledger.registry)]
    verified = subprocess.run(command, capture_output=True, text=True)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    registry = Registry.open(ledger.registry, create=False)
    try:
        snapshot = registry.snapshot()
    finally:
        registry.close()
    assert snapshot.generation == ledger.generation
    assert set(snapshot.bundles) == set(ledger.bundles)
    current = snapshot.current(NAME)
    assert current is not None
    assert current.settings is not None
    assert (current.settings.bundle, current.settings.strength) == ledger.settings


@pytest.mark.parametrize("victim", ["worker", "engine core"])
def test_killed_while_loading(
    victim: str,
    start: Callable[..., Any],
    ledger: Ledger,
    make_bundle: Callable[..., Path],
    processes: ThreadPoolExecutor,
) -> None:
    """A rank is asked to load, and its process dies: neither of two changes under way is made or acknowledged."""
    with start(victim.replace(" ", "-")) as operated:
        change(operated, ledger, make_bundle(f"before-{victim.replace(' ', '-')}", [0, 3], len(ledger.bundles)))
        new = make_bundle("new", [1, 2], 77)
        worker, core, everything = parts(operated)
        doomed = worker if victim == "worker" else core
        doomed.suspend()
        spec = ProfileSpec(bundle=ledger.bundles[-1], layers=(3,))
        calls = [
            processes.submit(status_of, operated, "upload", new),
            processes.submit(status_of, operated, "put_profile", NAME, spec),
        ]
        asked = {digest_of(new), f"{ledger.bundles[-1]}+3"}
        wait_until(lambda: asked <= {key for (key,) in query(ledger.registry, "SELECT key FROM intents")})
        doomed.kill()
        statuses = [call.result(END_TIMEOUT_S) for call in calls]
        assert all(status is None or status >= 400 for status in statuses), statuses
        check_ended(operated, everything, ledger)
        assert operated.server.process.returncode > 0


def key(operated: Any) -> str:
    header: str = operated.server.client.headers["authorization"]
    return header.removeprefix("Bearer ")


def test_api_process_killed_before_the_commit(
    start: Callable[..., Any], ledger: Ledger, make_bundle: Callable[..., Path], processes: ThreadPoolExecutor
) -> None:
    """It dies when every rank has loaded a bundle that the registry does not have yet."""
    with start("api") as operated:
        change(operated, ledger, make_bundle("before-api", [2, 4], len(ledger.bundles)))
        worker, _, everything = parts(operated)
        new = make_bundle("staged", [1, 2], 100)
        worker.suspend()
        upload = processes.submit(status_of, operated, "upload", new)
        wait_until(lambda: (digest_of(new),) in query(ledger.registry, "SELECT key FROM intents"))
        time.sleep(UNDER_WAY_S)
        # The worker will say that it has loaded, and nobody can note it.
        with contextlib.closing(sqlite3.connect(ledger.registry / "registry.sqlite", isolation_level=None)) as lock:
            lock.execute("BEGIN IMMEDIATE")
            worker.resume()
            time.sleep(UNDER_WAY_S)
            operated.server.process.kill()
            assert upload.result(END_TIMEOUT_S) is None
        check_ended(operated, everything, ledger)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_sigterm_lets_streams_end(
    num_processes: int,
    start: Callable[..., Any],
    ledger: Ledger,
    make_bundle: Callable[..., Path],
    processes: ThreadPoolExecutor,
) -> None:
    flags = ("--api-server-count", str(num_processes))
    with start(f"sigterm-{num_processes}", *flags) as operated:
        server = operated.server
        change(operated, ledger, make_bundle(f"before-sigterm-{num_processes}", [1, 5], len(ledger.bundles)))
        body = {"prompt": PROMPT, "max_tokens": STREAM_TOKENS, "ignore_eos": True, "temperature": 0}
        body |= {"steering_profile": NAME}
        streams = [processes.submit(server.stream, "/v1/completions", body) for _ in range(NUM_STREAMS)]
        wait_until(lambda: operated.admin.status().workers[0].requests == NUM_STREAMS)
        server.process.send_signal(signal.SIGTERM)
        # What the server says between the signal and its end.
        seen: dict[str, set[Any]] = {"ready": set(), "live": set(), "new": set(), "admin": set()}
        while not all(stream.done() for stream in streams):
            with contextlib.suppress(httpx.TransportError), httpx.Client(base_url=server.url, timeout=20) as client:
                client.headers["authorization"] = f"Bearer {key(operated)}"
                seen["ready"].add(client.get("/health/ready").status_code)
                seen["live"].add(client.get("/health/live").status_code)
                answer = client.post("/v1/completions", json=body | {"max_tokens": 1})
                seen["new"].add((answer.status_code, answer.json().get("error", {}).get("code")))
        for stream in streams:
            chunks = stream.result()
            assert chunks[-1]["usage"]["completion_tokens"] == STREAM_TOKENS
            receipts = [chunk["steering"] for chunk in chunks if "steering" in chunk]
            assert [receipt["bundle"] for receipt in receipts] == [ledger.settings[0] if ledger.settings else None]
            assert receipts[0]["tokens_steered"] >= STREAM_TOKENS - 1
        assert server.process.wait(END_TIMEOUT_S) == 0
        # The signal takes a moment to arrive; after it, nothing new.
        assert seen["ready"] - {200} == {503}, seen
        assert seen["live"] == {200}, seen
        assert seen["new"] - {(200, None)} == {(503, DRAINING)}, seen
        check_registry(ledger)
