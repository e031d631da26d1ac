"""Changes of what is served: validate, load everywhere, then switch at once; or change nothing."""

import asyncio
import contextlib
import difflib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from artifacts.bundle import Bundle, load_bundle
from artifacts.errors import BundleError, quoted
from artifacts.manifest import ExcludedSpan, Manifest
from server.auth.audit import REQUEST_ID, AuditLog
from server.engine.client import SteeringEngine, SteeringEngineError
from server.errors import ErrorCode, SteeringRequestError
from server.metrics.metrics import SteeringMetrics
from server.outcomes import BundleOutcome, ProfileOutcome, ProfileSpec
from server.preconditions import expected_generation, failed, must_be_new
from server.profiles import checked_layers, recommended_settings
from server.programs import Programs
from server.reconciler import Reconciler, StagingError, spans_of
from server.refusals import refusal_of
from server.registry.errors import RegistryError, RegistryErrorCode
from server.registry.records import BundleRecord, ProfileSettings, ProfileVersion, Snapshot, parse_key
from server.registry.registry import Registry
from server.rollout import OBSERVE_TIMEOUT_S, Rollout
from server.sources.errors import SourceError, SourceErrorCode
from server.sources.incoming_file import Received
from server.sources.remote import RemoteSources
from server.sources.root import BundleRoot
from server.sources.signature import SignaturePolicy
from server.sources.upload import receive

# Who makes the changes of --steering-declaration; the name of no key.
DECLARATION = "declaration file"
# After every process has seen that a bundle is not to be used, what still uses it is a running request.
_RELEASE_TIMEOUT_S = 2.0
_WAIT_STEP_S = 0.02
_MIN_DIGEST_PREFIX = len("sha256:") + 8
_KNOWN_ERRORS = (BundleError, SourceError, RegistryError, StagingError, SteeringEngineError, ValueError)


class Operations:
    """Changes of the registry with everything that belongs to them: checks, loading, audit, metrics.

    A change is loaded by every rank of every live instance, which all confirm the same checksum, before the registry
    commits it; until then requests see the state before. What fails leaves that state as it is.
    """

    def __init__(
        self,
        registry: Registry,
        engine: SteeringEngine,
        reconciler: Reconciler,
        programs: Programs,
        metrics: SteeringMetrics,
        audit: AuditLog,
        *,
        spans: Collection[str],
        signatures: SignaturePolicy,
        root: BundleRoot | None,
        remote: RemoteSources,
        max_bundle_bytes: int,
    ) -> None:
        """Take what is needed.

        Args:
            registry: the state to change.
            engine: of this instance.
            reconciler: of this process.
            programs: says which bundles the served model takes.
            metrics: of this process.
            audit: where every change is written.
            spans: names of `SPAN_NAMES` whose delimiters the engine knows.
            signatures: what is demanded of a bundle's signature.
            root: the folder that bundles may be named in; None for none.
            remote: the remote places that bundles may come from.
            max_bundle_bytes: bound of a bundle's size.
        """
        self._registry = registry
        self._engine = engine
        self._reconciler = reconciler
        self._programs = programs
        self._metrics = metrics
        self._audit = audit
        self._spans = frozenset(spans)
        self._signatures = signatures
        self._root = root
        self._remote = remote
        self._max_bytes = max_bundle_bytes
        self._rollout = Rollout(registry, reconciler)
        self._declaration: Path | None = None
        self._declared: Collection[str] = ()

    async def upload(
        self,
        chunks: AsyncIterator[bytes],
        *,
        actor: str,
        source: str,
        expected_digest: str | None = None,
        signature: bytes | None = None,
        dry_run: bool = False,
    ) -> BundleOutcome:
        """Take a bundle from a request's body.

        Args:
            chunks: the bytes.
            actor: name of the key.
            source: where it comes from, for people.
            expected_digest: "sha256:<hex>" that the bytes must have.
            signature: of the package `model-signing`.
            dry_run: check only.

        Raises:
            SteeringRequestError: it is refused; nothing has changed.
        """

        async def fetch(target: Path) -> Received:
            return await receive(chunks, target, self._max_bytes)

        return await self._add(fetch, actor, source, expected_digest, signature, dry_run)

    def declare(self, path: Path, names: Collection[str]) -> None:
        """Leave the profiles that a file declares to that file.

        Args:
            path: of the file.
            names: of the profiles.
        """
        self._declaration, self._declared = path, frozenset(names)

    async def add_from_root(
        self,
        name: str,
        *,
        actor: str,
        digest: str | None = None,
        signature: bytes | None = None,
        dry_run: bool = False,
    ) -> BundleOutcome:
        """Take a bundle from the configured folder.

        Args:
            name: relative path in it.
            digest: that it must have; None for any.
            actor, signature, dry_run: see `upload`.

        Raises:
            SteeringRequestError: it is refused; nothing has changed.
        """
        root = self._root
        if root is None:
            raise SteeringRequestError(
                ErrorCode.SOURCE_REFUSED,
                "This server takes no bundles by path; upload the file, or start it with --steering-bundle-root.",
                HTTPStatus.FORBIDDEN,
                "path",
            )

        async def fetch(target: Path) -> Received:
            try:
                return await asyncio.to_thread(root.fetch, name, target, self._max_bytes)
            except SourceError as error:
                if error.code is not SourceErrorCode.NOT_FOUND:
                    raise
                near = difflib.get_close_matches(name, await asyncio.to_thread(root.list), n=3, cutoff=0.4)
                raise SourceError(error.code, f"{error}; near names: {', '.join(near) or 'none'}") from None

        return await self._add(fetch, actor, f"path:{name}", digest, signature, dry_run)

    async def root_files(self) -> tuple[str, ...]:
        """Names of the files that `add_from_root` could take, at most `MAX_LISTED` of them.

        Raises:
            SteeringRequestError: there is no such folder, or it cannot be read.
        """
        if self._root is None:
            raise SteeringRequestError(
                ErrorCode.SOURCE_REFUSED,
                "This server has no folder of bundles; start it with --steering-bundle-root.",
                HTTPStatus.FORBIDDEN,
                None,
            )
        try:
            return await asyncio.to_thread(self._root.list)
        except SourceError as error:
            raise refusal_of(error) from error

    async def add_from_remote(
        self, uri: str, digest: str, *, actor: str, signature: bytes | None = None, dry_run: bool = False
    ) -> BundleOutcome:
        """Take a bundle from a model hub or an object store.

        Args:
            uri: "hf://org/repo@commit/file" or "s3://bucket/key".
            digest: that it must have.
            actor, signature, dry_run: see `upload`.

        Raises:
            SteeringRequestError: it is refused; nothing has changed.
        """

        async def fetch(target: Path) -> Received:
            return await self._remote.fetch(uri, digest, target, self._max_bytes)

        return await self._add(fetch, actor, _without_credentials(uri), digest, signature, dry_run)

    async def delete_bundle(self, digest: str, *, actor: str, drain: bool, timeout_s: float) -> None:
        """Forget a bundle and free its rows.

        Args:
            digest: or a unique prefix.
            actor: name of the key.
            drain: wait for running requests that use it; otherwise they are a reason to refuse.
            timeout_s: how long.

        Raises:
            SteeringRequestError: it does not exist (404), or something uses it (409); nothing has changed.
        """
        async with self._change("bundle.delete", actor, digest) as change:
            record = bundle_named(await self._snapshot(), digest)
            digest = change.digest = record.digest
            await asyncio.to_thread(self._registry.set_draining, digest, True, actor=actor)
            removed = False
            try:
                if not await self._rollout.catch_up():
                    raise SteeringRequestError(
                        ErrorCode.CONFLICT_STATE,
                        f"Not every server process has seen in {OBSERVE_TIMEOUT_S:g} s that bundle {digest} goes; see "
                        "/v1/steering/status, and try again.",
                        HTTPStatus.CONFLICT,
                        None,
                    )
                if not await self._wait_released(digest, timeout_s if drain else _RELEASE_TIMEOUT_S):
                    raise SteeringRequestError(
                        ErrorCode.BUNDLE_IN_USE,
                        f"Running requests use bundle {digest}; try again later, or with drain=true and more time.",
                        HTTPStatus.CONFLICT,
                        "digest",
                    )
                try:
                    await asyncio.to_thread(self._registry.remove_bundle, digest, actor=actor)
                except RegistryError as error:
                    # `expertsteer registry gc` was faster.
                    if error.code is not RegistryErrorCode.NOT_FOUND:
                        raise
                removed = True
            finally:
                if not removed:
                    with contextlib.suppress(RegistryError):
                        await asyncio.shield(asyncio.to_thread(self._registry.set_draining, digest, False, actor=actor))
            await self._rollout.catch_up()

    async def put_profile(
        self,
        name: str,
        spec: ProfileSpec,
        *,
        actor: str,
        if_match: str | None = None,
        if_none_match: str | None = None,
        dry_run: bool = False,
    ) -> ProfileOutcome:
        """Create a profile, or point it to something else.

        Args:
            name: of the profile.
            spec: what it is to be.
            actor: name of the key.
            if_match: entity tags of which the current version must have one; "*" for any version.
            if_none_match: "*" for a name that must be new.
            dry_run: check only.

        Raises:
            SteeringRequestError: it is refused; nothing has changed.
        """
        async with self._change("profile.put", actor, name, is_dry=dry_run) as change:
            self._refuse_declared(name, actor)
            snapshot = await self._snapshot()
            settings = self.settings_of(spec, snapshot)
            manifest = snapshot.bundles[settings.bundle].manifest
            change.digest = settings.bundle
            previous, is_new_only = snapshot.current(name), must_be_new(if_none_match)
            expected = expected_generation(previous, if_match)
            if is_new_only and previous is not None:
                raise failed(
                    f"Profile {name!r} exists already, made by generation {previous.generation}.", "If-None-Match"
                )
            change.before = previous.generation if previous is not None else None
            if dry_run:
                version = ProfileVersion(name, snapshot.generation + 1, settings, "put", actor, _now(), None)
                is_changed = previous is None or previous.settings != settings
                return ProfileOutcome(version, manifest, previous, is_changed, False, True)
            version = await self._rollout.commit(
                settings.key,
                lambda: self._registry.put_profile(
                    name, settings, actor=actor, if_match=expected, must_be_new=is_new_only
                ),
            )
            change.after = version.generation
            return await self._shown(version, manifest, previous)

    async def rollback(
        self, name: str, *, actor: str, to: int | None = None, if_match: str | None = None
    ) -> ProfileOutcome:
        """Make an earlier version of a profile the current one.

        Args:
            name: of the profile.
            actor: name of the key.
            to: generation of the version; None for the last different one before the current.
            if_match: see `put_profile`.

        Raises:
            SteeringRequestError: no such version (404), its bundle is gone (409), or the current one is another (412).
        """
        async with self._change("profile.rollback", actor, name) as change:
            self._refuse_declared(name, actor)
            previous = (await self._snapshot()).current(name)
            expected = expected_generation(previous, if_match)
            change.before = previous.generation if previous is not None else None
            target = await asyncio.to_thread(self._registry.rollback_target, name, to)
            settings = target.settings
            assert settings is not None
            change.digest = settings.bundle
            self._refuse_unknown_spans(settings.exclude)
            manifest = bundle_named(await self._snapshot(), settings.bundle, status=HTTPStatus.CONFLICT).manifest
            version = await self._rollout.commit(
                settings.key,
                lambda: self._registry.put_profile(
                    name,
                    settings,
                    actor=actor,
                    action="rollback",
                    if_match=expected,
                    restored_from=target.restored_from or target.generation,
                ),
            )
            change.after = version.generation
            return await self._shown(version, manifest, previous)

    async def delete_profile(
        self, name: str, *, actor: str, if_match: str | None = None, drain: bool = False, timeout_s: float = 0.0
    ) -> None:
        """Take a name away. Requests that were admitted under it go on as they began.

        Args:
            name: of the profile.
            actor: name of the key.
            if_match: see `put_profile`.
            drain: return only when the workers have freed what nothing else uses, or the time is over.
            timeout_s: that time.

        Raises:
            SteeringRequestError: it does not exist (404), or the current version is another (412).
        """
        async with self._change("profile.delete", actor, name) as change:
            self._refuse_declared(name, actor)
            previous = (await self._snapshot()).current(name)
            expected = expected_generation(previous, if_match)
            change.before = previous.generation if previous is not None else None
            version = await asyncio.to_thread(self._registry.delete_profile, name, actor=actor, if_match=expected)
            change.after = version.generation
            await self._rollout.catch_up()
            if drain and previous is not None and previous.settings is not None:
                await self._wait_unwanted(previous.settings.key, timeout_s)

    async def status(self) -> dict[str, Any]:
        """State of the registry's followers, and of every worker of this server."""
        rows = await asyncio.to_thread(self._registry.members.list)
        reconciler = self._reconciler
        return {
            "is_ready": reconciler.is_ready,
            "generation_desired": await asyncio.to_thread(self._registry.generation),
            "generation_observed": min(
                (row.observed for row in rows if row.instance == reconciler.instance and row.state != "starting"),
                default=reconciler.generation_observed,
            ),
            "members": [
                {
                    "member": row.member,
                    "instance": row.instance,
                    "pid": row.pid,
                    "state": row.state,
                    "observed": row.observed,
                    "problem": row.problem,
                }
                for row in rows
            ],
            "workers": await self._engine.status(),
        }

    async def _add(
        self,
        fetch: Callable[[Path], Awaitable[Received]],
        actor: str,
        source: str,
        expected_digest: str | None,
        signature: bytes | None,
        dry_run: bool,
    ) -> BundleOutcome:
        async with self._change("bundle.add", actor, source, is_dry=dry_run) as change:
            target = self._registry.store.incoming()
            try:
                received = await fetch(target)
                started_s = time.monotonic()
                change.digest = received.digest
                if expected_digest is not None and expected_digest != received.digest:
                    raise SteeringRequestError(
                        ErrorCode.DIGEST_MISMATCH,
                        f"The bytes received have the digest {received.digest}, not {quoted(expected_digest)}; send "
                        "them again.",
                        HTTPStatus.CONFLICT,
                        "digest",
                    )
                checks: list[tuple[str, str]] = []
                bundle = await asyncio.to_thread(
                    load_bundle, target, lambda check, found: checks.append((check, found))
                )
                await asyncio.to_thread(self._programs.check, bundle)
                self._refuse_unknown_spans(bundle.manifest.exclude)
                signer = await asyncio.to_thread(self._signatures.check, target, signature)
                snapshot = await self._snapshot()
                known = snapshot.bundles.get(bundle.digest)
                if dry_run:
                    record = known or BundleRecord(
                        bundle.digest, bundle.num_bytes, bundle.manifest, _now(), actor, source, False, signer
                    )
                    return BundleOutcome(record, known is None, False, checks, True, time.monotonic() - started_s)
                record, created = await self._take(target, bundle, actor, source, signer)
                await self._rollout.catch_up()
                is_resident = await self._reconciler.is_held(record.digest)
                return BundleOutcome(record, created, is_resident, checks, False, time.monotonic() - started_s)
            finally:
                target.unlink(missing_ok=True)

    async def _take(
        self, target: Path, bundle: Bundle, actor: str, source: str, signer: str | None
    ) -> tuple[BundleRecord, bool]:
        """Put a bundle into the store, load it everywhere, and record it; whatever fails leaves nothing behind."""
        store, digest = self._registry.store, bundle.digest
        async with self._rollout.intended(digest):
            await asyncio.to_thread(store.keep, target, digest)
            kept = await asyncio.to_thread(store.file_identity, digest)
            is_recorded = False
            try:
                await self._rollout.load_everywhere(digest)
                record, created = await asyncio.to_thread(
                    lambda: self._registry.add_bundle(bundle, actor=actor, source=source, signer=signer)
                )
                is_recorded = True
            finally:
                if not is_recorded:
                    await asyncio.shield(asyncio.to_thread(self._registry.discard, digest, kept))
        return record, created

    async def _snapshot(self) -> Snapshot:
        return await asyncio.to_thread(self._registry.snapshot)

    async def _shown(
        self, version: ProfileVersion, manifest: Manifest, previous: ProfileVersion | None
    ) -> ProfileOutcome:
        observed = await self._rollout.catch_up()
        is_changed = previous is None or version.generation != previous.generation
        return ProfileOutcome(version, manifest, previous, is_changed, observed, False)

    def settings_of(self, spec: ProfileSpec, snapshot: Snapshot) -> ProfileSettings:
        """What a profile of this specification would mean.

        Args:
            spec: what is asked for.
            snapshot: with the bundle.

        Raises:
            SteeringRequestError: there is no such bundle, or it does not allow that.
        """
        record = bundle_named(snapshot, spec.bundle, param="bundle")
        recommended = recommended_settings(record.digest, record.manifest)
        maximum = recommended.maximum_strength if spec.maximum_strength is None else spec.maximum_strength
        if not 0 < maximum <= recommended.maximum_strength:
            raise _invalid(
                f"maximum_strength is {maximum:g}; bundle {record.manifest.name!r} allows up to "
                f"{recommended.maximum_strength:g}.",
                "maximum_strength",
            )
        strength = spec.strength
        if strength is None:
            strength = max(-maximum, min(maximum, recommended.strength))
        if abs(strength) > maximum:
            raise _invalid(f"strength is {strength:g}; the maximum is {maximum:g}.", "strength")
        exclude = recommended.exclude if spec.exclude is None else spec.exclude
        self._refuse_unknown_spans(exclude)
        return ProfileSettings(
            bundle=record.digest,
            strength=strength,
            maximum_strength=maximum,
            scope=recommended.scope if spec.scope is None else spec.scope,
            layers=_layers(spec.layers, record.manifest),
            exclude=exclude,
            allowed_keys=spec.allowed_keys,
            description=recommended.description if spec.description is None else spec.description,
        )

    def _refuse_declared(self, name: str, actor: str) -> None:
        if name in self._declared and actor != DECLARATION:
            raise SteeringRequestError(
                ErrorCode.CONFLICT_STATE,
                f"Profile {name!r} is declared in {self._declaration}; change it there.",
                HTTPStatus.CONFLICT,
                "name",
            )

    def _refuse_unknown_spans(self, exclude: Sequence[ExcludedSpan]) -> None:
        for name in spans_of(exclude):
            if name not in self._spans:
                raise SteeringRequestError(
                    ErrorCode.UNSUPPORTED,
                    f"This server does not know which tokens open and close {name}; start it with "
                    f"--steering-span {name}=OPEN,CLOSE, or leave {name} out of exclude.",
                    HTTPStatus.CONFLICT,
                    "exclude",
                )

    async def _wait_released(self, digest: str, timeout_s: float) -> bool:
        """Wait until no live instance holds a program of a bundle."""
        deadline = time.monotonic() + timeout_s
        while any(parse_key(key)[0] == digest for key in await asyncio.to_thread(self._registry.members.held)):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(_WAIT_STEP_S)
            await self._reconciler.refresh()
        return True

    async def _wait_unwanted(self, key: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if key in self._reconciler.wanted or key not in await asyncio.to_thread(self._registry.members.held):
                return
            await asyncio.sleep(_WAIT_STEP_S)

    @contextlib.asynccontextmanager
    async def _change(
        self, operation: str, actor: str, target: str, *, is_dry: bool = False
    ) -> AsyncIterator["_Change"]:
        """Time an operation, turn what went wrong into a refusal, and write it into the audit log."""
        change = _Change()
        try:
            with self._metrics.operation(operation):
                try:
                    yield change
                except _KNOWN_ERRORS as error:
                    raise refusal_of(error) from error
        except SteeringRequestError as error:
            change.outcome, change.reason = "refused", f"{error.code.value}: {error}"
            raise
        except BaseException as error:
            change.outcome, change.reason = "failed", repr(error)
            raise
        finally:
            await asyncio.shield(
                asyncio.to_thread(
                    self._audit.write,
                    actor=actor,
                    action=f"{operation}.dry_run" if is_dry else operation,
                    target=target,
                    digest=change.digest,
                    before=change.before,
                    after=change.after,
                    outcome=change.outcome,
                    reason=change.reason,
                    request_id=REQUEST_ID.get(),
                )
            )


@dataclass
class _Change:
    """What the audit log says about an operation."""

    digest: str | None = None
    before: int | None = None
    after: int | None = None
    outcome: str = "ok"
    reason: str | None = None


def bundle_named(
    snapshot: Snapshot, digest: str, param: str = "digest", status: HTTPStatus = HTTPStatus.NOT_FOUND
) -> BundleRecord:
    """The bundle with a digest, or with a prefix of it that no other bundle has.

    Args:
        snapshot: where to look.
        digest: "sha256:" and at least 8 digits.
        param: field of the request that named it.
        status: of the refusal when there is none.

    Raises:
        SteeringRequestError: there is none, or there are several (400).
    """
    exact = snapshot.bundles.get(digest)
    if exact is not None:
        return exact
    found = [record for known, record in snapshot.bundles.items() if known.startswith(digest)]
    if len(digest) < _MIN_DIGEST_PREFIX or not found:
        raise SteeringRequestError(
            ErrorCode.BUNDLE_NOT_FOUND,
            f"There is no bundle {quoted(digest)}; upload it first, and name it by sha256: and at least 8 digits.",
            status,
            param,
        )
    if len(found) > 1:
        raise _invalid(f"{len(found)} bundles begin with {quoted(digest)}; give more digits.", param)
    return found[0]


def _layers(layers: tuple[int, ...] | None, manifest: Manifest) -> tuple[int, ...] | None:
    try:
        return checked_layers(layers, manifest)
    except ValueError as error:
        raise _invalid(str(error), "layers") from None


def _without_credentials(uri: str) -> str:
    """An address as logs may show it."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        return "an address that cannot be read"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _invalid(message: str, param: str) -> SteeringRequestError:
    return SteeringRequestError(ErrorCode.REQUEST_INVALID, message, param=param)


def _now() -> datetime:
    return datetime.now(UTC)
