"""Damaged bundles, uploaded while requests run: all are refused, and nothing else happens."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import mutations
from traffic import Address, Traffic, http_client

from artifacts.bundle import parse_bundle
from artifacts.errors import BundleError
from server.admin_schema import ProfileSpec
from server.client import SteeringClient

_PROFILE = "steady"
_HEADERS = {"content-type": "application/octet-stream"}


@dataclass
class Damaged:
    """What came of it.

    Attributes:
        files: sent.
        statuses: how often each code came.
        answers: to the requests that ran meanwhile.
        problems: all that should not be.
    """

    files: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    answers: int = 0
    problems: list[str] = field(default_factory=list)


def upload_damaged(server: Address, steady: Path, good: Path, num_files: int, number: int = 0) -> Damaged:
    """Send damaged bundles, and compare the server's state with the one before.

    What the parser takes although it was damaged is a good bundle, and sent as a dry run.

    Args:
        server: with a write key.
        steady: bundle of the requests that run meanwhile.
        good: bundle to damage.
        num_files: how many times.
        number: of the run; another one sends other files.

    Raises:
        AssertionError: the smallest file that is not treated as it should be.
    """
    found = Damaged()
    with SteeringClient(server.url, server.key) as admin, http_client(server) as client:
        digest = admin.upload(steady).digest
        admin.put_profile(_PROFILE, ProfileSpec(bundle=digest))
        before = _state(admin)
        with Traffic(server, _PROFILE) as traffic:
            mutations.run(good.read_bytes(), num_files, lambda data: _check(client, found, data), number)
        found.answers = traffic.answers.total()
        found.problems += traffic.problems
        if (after := _state(admin)) != before:
            found.problems.append(f"the state was {before} and is {after}")
        admin.delete_profile(_PROFILE)
        admin.delete_bundle(digest, drain=True)
    return found


def _check(client: httpx.Client, found: Damaged, data: bytes) -> None:
    try:
        parse_bundle(data)
        is_good = True
    except BundleError:
        is_good = False
    response = client.post("/v1/steering/bundles", params={"dry_run": is_good}, content=data, headers=_HEADERS)
    found.files += 1
    status = f"{response.status_code}{' dry run' if is_good else ''}"
    found.statuses[status] = found.statuses.get(status, 0) + 1
    if response.status_code == httpx.codes.OK:
        assert is_good, f"a damaged bundle was accepted: {response.text[:300]}"
        return
    # A good bundle may be for another model, or have a trigger that the model has no token for.
    assert response.status_code in ((400, 409) if is_good else (400,)), f"{response.status_code}: {response.text[:300]}"
    error = response.json()["error"]
    assert error["code"] in ("steering_bundle_invalid", "steering_bundle_mismatch", "steering_unsupported") or is_good
    assert error["message"].isprintable(), error["message"]
    assert len(error["message"]) < 1000, error["message"]


def _state(admin: SteeringClient) -> Any:
    status = admin.status()
    return {
        "generation": status.generation_desired,
        "bundles": [bundle.digest for bundle in admin.bundles()],
        "profiles": [profile.model_dump() for profile in admin.profiles()],
        "workers": [(sorted(worker.bundles), worker.rows_used, worker.pid) for worker in status.workers],
    }
