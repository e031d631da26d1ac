"""Many administrators who change one name at once, and whether the history agrees with what each was told."""

import random
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx
from traffic import Address, ask, http_client

Change = Literal["put", "rollback", "delete"]

_PROFILES, _BUNDLES = "/v1/steering/profiles", "/v1/steering/bundles"
# What each call may be answered with: it was done, or the state that others left does not allow it.
_EXPECTED = {
    "put": {200, 201, 404, 409},
    "rollback": {200, 404, 409},
    "delete": {204, 404},
    "upload": {200, 201, 409},
    "remove": {204, 404, 409},
    "ask": {200, 400, 404},
}
_WEIGHTS = {"put": 6, "rollback": 3, "delete": 2, "upload": 2, "remove": 1, "ask": 2}
_DONE = {200, 201, 204}


class Acknowledged(NamedTuple):
    """A change of the name that was acknowledged; a deletion is not told its generation."""

    action: Change
    begin_s: float
    end_s: float
    generation: int | None
    bundle: str | None
    strength: float | None


@dataclass
class Race:
    """What came of it.

    Attributes:
        calls: made.
        statuses: how often each operation was answered with each status.
        changes: acknowledged ones, by action.
        problems: all that should not be; empty when the server is right.
        duration_s: of the calls.
    """

    calls: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    duration_s: float = 0.0


def race(server: Address, files: Sequence[Path], num_threads: int, num_calls: int, name: str = "contested") -> Race:
    """Let threads add bundles, put, roll back and delete one profile, then hold its history against their answers.

    The server is left without the profile and the bundles.

    Args:
        server: with a write key.
        files: bundles that the name is pointed to.
        num_threads: administrators.
        num_calls: of each.
        name: of the profile; nobody else may use it.
    """
    found = Race(calls=num_threads * num_calls)
    with http_client(server) as client:
        digests = [_upload(client, file).raise_for_status().json()["digest"] for file in files]
        # A history that an earlier race left is not this one's.
        since = client.get("/v1/steering/status").json()["generation_desired"]
        started_s = time.monotonic()
        with ThreadPoolExecutor(num_threads) as pool:
            runs = [
                pool.submit(_administrate, client, found, files, digests, name, thread, num_calls)
                for thread in range(num_threads)
            ]
            acknowledged = _distinct([change for run in runs for change in run.result()[1]])
        found.statuses = dict(sum((run.result()[0] for run in runs), Counter()))
        found.duration_s = time.monotonic() - started_s
        found.changes = dict(Counter(change.action for change in acknowledged))
        _check_final_state(client, found, name, acknowledged)
        # A deleted name shows its history to nobody, so it comes back for a moment.
        digest = _upload(client, files[0]).raise_for_status().json()["digest"]
        last = _put(client, name, digest, 0.0)
        _check_history(found, _history(client, name, since, last.json()["generation"]), acknowledged)
        _clean_up(client, found, name, files)
    return found


def _administrate(
    client: httpx.Client,
    found: Race,
    files: Sequence[Path],
    digests: Sequence[str],
    name: str,
    thread: int,
    num_calls: int,
) -> tuple[Counter[str], list[Acknowledged]]:
    choices = random.Random(thread)
    statuses: Counter[str] = Counter()
    acknowledged = []
    for call in range(num_calls):
        operation = choices.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
        index = choices.randrange(len(files))
        # Exact in binary, and of this very call.
        strength = (1 + thread * num_calls + call) / 2**14
        begin_s = time.monotonic()
        response = _call(client, operation, name, files[index], digests[index], strength)
        end_s = time.monotonic()
        statuses[f"{operation} {response.status_code}"] += 1
        if response.status_code not in _EXPECTED[operation]:
            found.problems.append(f"{operation} was answered with {response.status_code}: {response.text[:300]}")
        elif operation in ("put", "rollback", "delete") and response.status_code in _DONE:
            body: dict[str, Any] = response.json() if response.content else {}
            if body.get("changed", True):
                acknowledged.append(
                    Acknowledged(
                        operation,  # type: ignore[arg-type]
                        begin_s,
                        end_s,
                        body.get("generation"),
                        body.get("bundle"),
                        body.get("strength"),
                    )
                )
            if operation == "put" and (body["bundle"], body["strength"]) != (digests[index], strength):
                found.problems.append(f"put of {strength} answered {body}")
    return statuses, acknowledged


def _distinct(acknowledged: Sequence[Acknowledged]) -> list[Acknowledged]:
    """One of those that speak of the same change: two who roll back the same version at once both see it restored."""
    changes = {change.generation: change for change in acknowledged if change.generation is not None}
    return [*changes.values(), *(change for change in acknowledged if change.generation is None)]


def _call(client: httpx.Client, operation: str, name: str, file: Path, digest: str, strength: float) -> httpx.Response:
    match operation:
        case "put":
            return _put(client, name, digest, strength)
        case "rollback":
            return client.post(f"{_PROFILES}/{name}/rollback")
        case "delete":
            return client.delete(f"{_PROFILES}/{name}")
        case "upload":
            return _upload(client, file)
        case "remove":
            return client.delete(f"{_BUNDLES}/{digest}")
        case _:
            return ask(client, name, max_tokens=2)


def _put(client: httpx.Client, name: str, digest: str, strength: float) -> httpx.Response:
    return client.put(f"{_PROFILES}/{name}", json={"bundle": digest, "strength": strength})


def _upload(client: httpx.Client, file: Path) -> httpx.Response:
    headers = {"content-type": "application/octet-stream"}
    return client.post(_BUNDLES, content=file.read_bytes(), headers=headers)


def _check_final_state(client: httpx.Client, found: Race, name: str, acknowledged: Sequence[Acknowledged]) -> None:
    """What the API shows, what requests get, and the last acknowledged change must be one thing."""
    shown, answer = client.get(f"{_PROFILES}/{name}"), ask(client, name)
    if shown.status_code == httpx.codes.NOT_FOUND:
        if answer.status_code == httpx.codes.OK:
            found.problems.append("the profile is deleted, and requests still get it")
        return
    state = shown.json()
    known = {change.generation: change for change in acknowledged}.get(state["generation"])
    if known is None:
        found.problems.append(f"the final state, generation {state['generation']}, was acknowledged to nobody")
    elif (known.bundle, known.strength) != (state["bundle"], state["strength"]):
        found.problems.append(f"the final state is {state}, acknowledged as {known}")
    newest = max((change.generation for change in acknowledged if change.generation is not None), default=0)
    if state["generation"] < newest:
        found.problems.append(f"the final state is generation {state['generation']}, acknowledged was {newest}")
    receipt = answer.json().get("steering", {})
    if (receipt.get("bundle"), receipt.get("strength")) != (state["bundle"], state["strength"]):
        found.problems.append(f"the final state is {state}, and a request was answered with {answer.text[:300]}")


def _history(client: httpx.Client, name: str, since: int, before: int) -> list[dict[str, Any]]:
    """Changes of a profile between two generations, oldest first."""
    changes: list[dict[str, Any]] = []
    cursor: int | None = before
    while cursor is not None and cursor > since:
        page = client.get(f"{_PROFILES}/{name}", params={"limit": 200, "before": cursor}).raise_for_status().json()
        changes += [change for change in page["history"] if change["generation"] > since]
        cursor = page["next"]
    return changes[::-1]


def _check_history(found: Race, history: Sequence[dict[str, Any]], acknowledged: Sequence[Acknowledged]) -> None:
    """Every change that the registry has was acknowledged, with these values, and none else; and in this order."""
    recorded = dict(Counter(change["action"] for change in history))
    if recorded != found.changes:
        found.problems.append(f"the history has {recorded}, acknowledged were {found.changes}")
    by_generation = {change["generation"]: change for change in history}
    for change in acknowledged:
        if change.generation is not None:
            entry = by_generation.get(change.generation, {})
            settings = entry.get("settings") or {}
            if (entry.get("action"), settings.get("bundle"), settings.get("strength")) != (
                change.action,
                change.bundle,
                change.strength,
            ):
                found.problems.append(f"{change} stands in the history as {entry}")
    # A change that was over before another began must come before it: from the newest back, the earliest end so far.
    earliest_end_s = float("inf")
    for change in sorted(
        (change for change in acknowledged if change.generation is not None),
        key=lambda change: change.generation or 0,
        reverse=True,
    ):
        if earliest_end_s < change.begin_s:
            found.problems.append(f"{change} began after a later generation was acknowledged")
        earliest_end_s = min(earliest_end_s, change.end_s)


def _clean_up(client: httpx.Client, found: Race, name: str, files: Sequence[Path]) -> None:
    client.delete(f"{_PROFILES}/{name}").raise_for_status()
    for file in files:
        digest = _upload(client, file).raise_for_status().json()["digest"]
        response = client.delete(f"{_BUNDLES}/{digest}", params={"drain": True, "timeout_s": 30})
        if response.status_code != httpx.codes.NO_CONTENT:
            found.problems.append(f"a bundle that nothing uses could not be removed: {response.text[:300]}")
