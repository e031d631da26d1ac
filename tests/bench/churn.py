"""Bundles that come and go, streams that break off, and what both leave behind."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from traffic import Address, ask, http_client

from artifacts.bundle import load_bundle, write_bundle
from server.admin_schema import ProfileSpec
from server.client import SteeringClient

_SETTLE_TIMEOUT_S, _STEP_S = 30.0, 0.1
_AT_A_TIME = 16
# Of a stream, if it were not left.
MAX_TOKENS = 300


@dataclass(frozen=True)
class Left:
    """What the server still holds for requests and bundles; zero everywhere when nothing is left."""

    bundles: int
    rows: int
    slots: int
    requests: int
    running: float
    active: float


NOTHING = Left(0, 0, 0, 0, 0.0, 0.0)


@dataclass
class Churn:
    """What came of it.

    Attributes:
        rounds: cycles, or streams.
        left: afterwards.
        growth_mib: of the memory of all processes, from the end of the warm-up.
        by_process: the same by process, first and last, in MiB.
        problems: all that should not be.
        duration_s: of the rounds.
    """

    rounds: int
    left: Left = NOTHING
    growth_mib: float = 0.0
    by_process: dict[str, tuple[float, float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    duration_s: float = 0.0


def cycle(server: Address, file: Path, folder: Path, num_cycles: int, num_warm_up: int) -> Churn:
    """Add a bundle that was never there, use it, and remove it, again and again.

    Args:
        server: with a write key.
        file: bundle that all of them are copies of, under other names.
        folder: for the copies.
        num_cycles: after the warm-up.
        num_warm_up: cycles before the memory is looked at first.
    """
    found = Churn(num_cycles)
    bundle, copy = load_bundle(file), folder / "cycle.safetensors"
    with SteeringClient(server.url, server.key) as admin, http_client(server) as client:

        def once(number: int) -> None:
            write_bundle(copy, bundle.manifest.model_copy(update={"name": f"cycle-{number}"}), bundle.rows)
            digest = admin.upload(copy).digest
            admin.put_profile("cycle", ProfileSpec(bundle=digest))
            receipt = ask(client, "cycle", max_tokens=2).raise_for_status().json()["steering"]
            if receipt["bundle"] != digest:
                found.problems.append(f"cycle {number}: asked for {digest}, got {receipt}")
            admin.delete_profile("cycle")
            admin.delete_bundle(digest, drain=True)

        for number in range(num_warm_up):
            once(number)
        before = memory_mib(server)
        started_s = time.monotonic()
        for number in range(num_warm_up, num_warm_up + num_cycles):
            once(number)
        found.duration_s = time.monotonic() - started_s
        after = memory_mib(server)
        found.by_process = {name: (before.get(name, 0.0), each) for name, each in after.items()}
        found.growth_mib = sum(after.values()) - sum(before.values())
        found.left = _settled(server, admin, client)
    return found


def abort(server: Address, file: Path, num_streams: int) -> Churn:
    """Leave streams after their first words, then remove what they used.

    Args:
        server: with a write key.
        file: bundle that they use.
        num_streams: all of them.
    """
    found = Churn(num_streams)
    with SteeringClient(server.url, server.key) as admin, http_client(server) as client:
        digest = admin.upload(file).digest
        admin.put_profile("aborted", ProfileSpec(bundle=digest))
        started_s = time.monotonic()
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            statuses = list(pool.map(lambda number: _leave(client, number), range(num_streams)))
        found.duration_s = time.monotonic() - started_s
        found.problems += [f"a stream was answered with {status}" for status in statuses if status != httpx.codes.OK]
        admin.delete_profile("aborted")
        # Refused if a request, or a forgotten reference to one, were still there.
        admin.delete_bundle(digest, drain=True)
        found.left = _settled(server, admin, client)
    return found


def memory_mib(server: Address) -> dict[str, float]:
    """Resident memory of the server's processes, by what they call themselves."""
    with SteeringClient(server.url, server.key) as admin:
        main = psutil.Process(admin.status().members[0].pid)
    # With several API processes, the one that they and the engines come from is above.
    if any(name in (main.parent().cmdline() if main.parent() else []) for name in ("server.cli",)):
        main = main.parent()
    found: dict[str, float] = {}
    for number, process in enumerate([main, *main.children(recursive=True)]):
        name = "API" if not number else f"{' '.join(process.cmdline())[:24]} {number}"
        found[name] = process.memory_info().rss / 2**20
    return found


def _leave(client: httpx.Client, number: int) -> int:
    body: dict[str, Any] = {
        "prompt": f"What is {number} plus 5?",
        "max_tokens": MAX_TOKENS,
        "ignore_eos": True,
        "stream": True,
        "n": 1 + number % 2,
        "steering_profile": "aborted",
    }
    with client.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                break
        return response.status_code


def _settled(server: Address, admin: SteeringClient, client: httpx.Client) -> Left:
    """What is left, once nothing is or no longer gets less."""
    return _wait(lambda: _left(admin, client))


def _wait(look: Callable[[], Left]) -> Left:
    deadline = time.monotonic() + _SETTLE_TIMEOUT_S
    while (left := look()) != NOTHING and time.monotonic() < deadline:
        time.sleep(_STEP_S)
    return left


def _left(admin: SteeringClient, client: httpx.Client) -> Left:
    workers = admin.status().workers
    return Left(
        bundles=max(len(worker.bundles) for worker in workers),
        rows=max(worker.rows_used for worker in workers),
        slots=max(worker.slots_used for worker in workers),
        requests=max(worker.requests for worker in workers),
        running=_metric(client, "vllm:num_requests_running"),
        active=_metric(client, "steering_active_requests"),
    )


def _metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.partition("{")[0].partition(" ")[0] == name)
