"""The admin routes of a real application over HTTP, on a real registry; only what an engine would do is left out."""

import contextlib
import hashlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from artifacts.bundle import load_bundle
from artifacts.errors import BundleError
from server import preconditions
from server.auth.audit import AuditLog
from server.auth.keys import KeyRing
from server.auth.middleware import AccessMiddleware
from server.auth.rate import RateLimit
from server.errors import ErrorCode, SteeringRequestError
from server.outcomes import BundleOutcome, ProfileOutcome, ProfileSpec
from server.profiles import recommended_settings
from server.registry.errors import PreconditionFailed, RegistryError, RegistryErrorCode
from server.registry.records import BundleRecord, ProfileSettings, ProfileVersion
from server.registry.registry import Registry
from server.routes.admin import audit, bundles, profiles, root, status

_EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
INFERENCE, READ, WRITE = "inference-key-" + "i" * 24, "read-key-" + "r" * 24, "write-key-" + "w" * 24
KEYS = f"""keys:
  - {{name: reader, key: {READ}, role: read}}
  - {{name: doctor, key: {INFERENCE}, role: inference, profiles: ["med*"]}}
"""


Calls = list[tuple[str, dict[str, Any]]]


@dataclass
class BundleOperations:
    """What the routes call, as the class of the same name promises it, with the registry and without an engine."""

    registry: Registry
    calls: Calls
    chunks: list[int] = field(default_factory=list)
    in_use: set[str] = field(default_factory=set)
    num_root_files: int = 2

    async def upload(self, chunks: AsyncIterator[bytes], **fields: Any) -> BundleOutcome:
        self.calls.append(("upload", fields))
        target, digest = self.registry.store.incoming(), hashlib.sha256()
        try:
            with target.open("xb") as file:
                async for chunk in chunks:
                    self.chunks.append(len(chunk))
                    digest.update(chunk)
                    file.write(chunk)
            found, expected = f"sha256:{digest.hexdigest()}", fields["expected_digest"]
            if expected not in (None, found):
                raise SteeringRequestError(ErrorCode.DIGEST_MISMATCH, f"The digest is {found}.", HTTPStatus.CONFLICT)
            return self._add(target, fields)
        finally:
            target.unlink(missing_ok=True)

    async def add_from_root(self, name: str, **fields: Any) -> BundleOutcome:
        self.calls.append(("add_from_root", {"name": name, **fields}))
        raise SteeringRequestError(ErrorCode.SOURCE_REFUSED, "There is no bundle root.", HTTPStatus.FORBIDDEN, "path")

    async def root_files(self) -> tuple[str, ...]:
        return tuple(f"team/{number}.safetensors" for number in range(self.num_root_files))

    async def add_from_remote(self, uri: str, digest: str, **fields: Any) -> BundleOutcome:
        self.calls.append(("add_from_remote", {"uri": uri, "digest": digest, **fields}))
        raise SteeringRequestError(
            ErrorCode.SOURCE_REFUSED, "No remote source is enabled.", HTTPStatus.FORBIDDEN, "uri"
        )

    async def delete(self, digest: str, **fields: Any) -> None:
        self.calls.append(("delete_bundle", {"digest": digest, **fields}))
        digest = _bundle(self.registry, digest).digest
        if digest in self.in_use and not fields["drain"]:
            raise SteeringRequestError(ErrorCode.BUNDLE_IN_USE, "Requests use it.", HTTPStatus.CONFLICT, "digest")
        with _refused(ErrorCode.BUNDLE_IN_USE):
            self.registry.remove_bundle(digest, actor=fields["actor"])

    def _add(self, path: Path, fields: dict[str, Any]) -> BundleOutcome:
        checks: list[tuple[str, str]] = []
        try:
            bundle = load_bundle(path, lambda check, found: checks.append((check, found)))
        except BundleError as error:
            raise SteeringRequestError(ErrorCode.BUNDLE_INVALID, str(error), param="body") from error
        if fields["dry_run"]:
            known = self.registry.snapshot().bundles.get(bundle.digest)
            record = known or BundleRecord(
                bundle.digest, bundle.num_bytes, bundle.manifest, _EPOCH, fields["actor"], "upload", False, None
            )
            return BundleOutcome(record, known is None, False, checks, True, 0.1)
        self.registry.store.keep(path, bundle.digest)
        record, created = self.registry.add_bundle(bundle, actor=fields["actor"], source=fields["source"])
        return BundleOutcome(record, created, True, checks, False, 0.1)


@dataclass
class ProfileOperations:
    """What the routes call, as the class of the same name promises it, with the registry and without an engine."""

    registry: Registry
    audit: AuditLog
    calls: Calls
    observed: bool = True

    async def put(self, name: str, spec: ProfileSpec, **fields: Any) -> ProfileOutcome:
        assert isinstance(spec, ProfileSpec)
        self.calls.append(("put_profile", {"name": name, "spec": spec, **fields}))
        record = _bundle(self.registry, spec.bundle)
        asked = {key: value for key, value in vars(spec).items() if value is not None and key != "bundle"}
        settings = ProfileSettings(**(vars(recommended_settings(record.digest, record.manifest)) | asked))
        snapshot = self.registry.snapshot()
        previous = snapshot.current(name)
        expected = preconditions.expected_generation(previous, fields["if_match"])
        is_new = preconditions.must_be_new(fields["if_none_match"])
        if fields["dry_run"]:
            version = ProfileVersion(
                name, snapshot.generation + 1, settings, "put", fields["actor"], record.added_at, None
            )
            is_changed = previous is None or previous.settings != settings
            return ProfileOutcome(version, record.manifest, previous, is_changed, False, True)
        with _refused(ErrorCode.PRECONDITION_FAILED):
            version = self.registry.put_profile(
                name, settings, actor=fields["actor"], if_match=expected, must_be_new=is_new
            )
        self.audit.write(fields["actor"], "profile.put", name, digest=record.digest, outcome="ok")
        return self._shown(version, previous)

    async def rollback(self, name: str, **fields: Any) -> ProfileOutcome:
        self.calls.append(("rollback", {"name": name, **fields}))
        previous = self.registry.snapshot().current(name)
        expected = preconditions.expected_generation(previous, fields["if_match"])
        with _refused(ErrorCode.PROFILE_NOT_FOUND):
            target = self.registry.rollback_target(name, fields["to"])
            version = self.registry.put_profile(
                name,
                target.settings,
                actor=fields["actor"],
                action="rollback",
                if_match=expected,
                restored_from=target.generation,
            )
        return self._shown(version, previous)

    async def delete(self, name: str, **fields: Any) -> None:
        self.calls.append(("delete_profile", {"name": name, **fields}))
        expected = preconditions.expected_generation(self.registry.snapshot().current(name), fields["if_match"])
        with _refused(ErrorCode.PROFILE_NOT_FOUND):
            self.registry.delete_profile(name, actor=fields["actor"], if_match=expected)

    def _shown(self, version: ProfileVersion, previous: ProfileVersion | None) -> ProfileOutcome:
        is_changed = previous is None or previous.generation != version.generation
        assert version.settings is not None
        manifest = self.registry.snapshot().bundles[version.settings.bundle].manifest
        return ProfileOutcome(version, manifest, previous, is_changed, self.observed, False)


def _bundle(registry: Registry, reference: str) -> BundleRecord:
    for digest, record in registry.snapshot().bundles.items():
        if digest.startswith(reference):
            return record
    raise SteeringRequestError(ErrorCode.BUNDLE_NOT_FOUND, "There is no such bundle.", HTTPStatus.NOT_FOUND, "bundle")


@contextlib.contextmanager
def _refused(code: ErrorCode) -> Iterator[None]:
    statuses = {
        RegistryErrorCode.NOT_FOUND: HTTPStatus.NOT_FOUND,
        RegistryErrorCode.PRECONDITION_FAILED: HTTPStatus.PRECONDITION_FAILED,
    }
    try:
        yield
    except RegistryError as error:
        code = ErrorCode.PRECONDITION_FAILED if isinstance(error, PreconditionFailed) else code
        raise SteeringRequestError(code, str(error), statuses.get(error.code, HTTPStatus.CONFLICT), None) from error


@dataclass
class Engine:
    """Two ranks that hold every bundle."""

    registry: Registry

    async def status(self) -> list[dict[str, Any]]:
        worker = {
            **{"rows_used": 1, "rows_total": 8, "slots_used": 0, "slots_total": 4, "requests": 0, "layers": 6},
            **{"fused_layers": [0], "in_place_layers": [1], "backend": "reference"},
        }
        keys = [key for digest in self.registry.snapshot().bundles for key in (digest, f"{digest}+2")]
        keys.append("self-test-1")  # resident for a moment at a start, and no bundle's
        return [{"replica": 0, "rank": rank, "bundles": keys, **worker} for rank in (0, 1)]


async def _status(registry: Registry, engine: Engine) -> dict[str, Any]:
    return {
        "is_ready": True,
        "generation_desired": registry.generation(),
        "generation_observed": registry.generation(),
        "members": [{"member": "m1", "instance": "i1", "pid": 7, "state": "ready", "observed": 3, "host": "here"}],
        "workers": await engine.status(),
        "added_later": {"deep": [1]},
    }


@dataclass
class Admin:
    """A running application, and what is behind it."""

    url: str
    port: int
    app: FastAPI
    registry: Registry
    bundles: BundleOperations
    profiles: ProfileOperations
    calls: Calls
    http: httpx.Client
    write_key: str = WRITE
    read_key: str = READ
    inference_key: str = INFERENCE

    def call(self, method: str, path: str, *, key: str | None = None, **fields: Any) -> httpx.Response:
        """One request below /v1/steering, with the write key unless another is given."""
        headers = {"authorization": f"Bearer {key or WRITE}"} | dict(fields.pop("headers", {}))
        return self.http.request(method, f"/v1/steering{path}", headers=headers, **fields)

    def add(self, path: Path) -> str:
        """Upload a bundle and return its digest."""
        headers = {"content-type": "application/octet-stream"}
        answer = self.call("POST", "/bundles", content=path.read_bytes(), headers=headers)
        assert answer.status_code in (200, 201), answer.text
        digest: str = answer.json()["digest"]
        return digest

    def refused(self, answer: httpx.Response, status: int, param: str | None = None) -> str:
        """Check that an answer is a refusal in the promised form, and return its code."""
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code", "title", "status", "instance"}
        assert error["status"] == status and error["title"] == HTTPStatus(status).phrase
        assert error["instance"] == answer.request.url.path and error["message"].endswith(".")
        if param is not None:
            assert error["param"] == param, error
        code: str = error["code"]
        return code


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FastAPI, int]]:
    """An application with the admin routes behind the keys, and the port where it listens."""
    keys_file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    keys_file.write_text(KEYS)
    keys_file.chmod(0o600)
    app = FastAPI()
    for module in (bundles, root, profiles, status, audit):
        app.include_router(module.router)

    @app.get("/health/ready")
    async def ready() -> JSONResponse:
        return JSONResponse({})

    app.add_middleware(AccessMiddleware, keys=KeyRing.load(keys_file, [], WRITE), limit=RateLimit(1e6, 10**6))
    with _serving(app) as port:
        yield app, port


@pytest.fixture
def admin(served: tuple[FastAPI, int], tmp_path: Path) -> Iterator[Admin]:
    """The application on a registry of its own for each test."""
    app, port = served
    registry, log = Registry.open(tmp_path / "registry"), AuditLog(tmp_path / "audit.jsonl")
    calls: Calls = []
    bundle_operations = BundleOperations(registry, calls)
    profile_operations = ProfileOperations(registry, log, calls)
    engine = Engine(registry)
    app.state.steering = SimpleNamespace(
        bundle_operations=bundle_operations,
        profile_operations=profile_operations,
        registry=registry,
        engine=engine,
        status=lambda: _status(registry, engine),
        audit=log,
        reconciler=None,
        convergence=None,
    )
    url = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=url, trust_env=False) as http:
        yield Admin(url, port, app, registry, bundle_operations, profile_operations, calls, http)
    registry.close()


@contextlib.contextmanager
def _serving(app: FastAPI) -> Iterator[int]:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < deadline and thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield sock.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        sock.close()
        assert not thread.is_alive()


@pytest.fixture
def bundle(make_bundle: Callable[..., Path]) -> Path:
    """A bundle that steers layers 2 and 5."""
    return make_bundle("medical", [2, 5], 1, description="Careful about doses.")


@pytest.fixture
def other_bundle(make_bundle: Callable[..., Path]) -> Path:
    """Another one, of one layer."""
    return make_bundle("legal", [3], 2)
