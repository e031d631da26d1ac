"""Bundles come and go: fetch, validate, load everywhere, then record at once; or change nothing."""

import asyncio
import contextlib
import difflib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

from artifacts.bundle import Bundle, load_bundle
from artifacts.errors import quoted
from server.errors import ErrorCode, SteeringRequestError
from server.operation import OperationRecorder
from server.outcomes import BundleOutcome
from server.programs import Programs
from server.reconciler import Reconciler
from server.refusals import refusal_of, refuse_unknown_spans
from server.registry.errors import RegistryError, RegistryErrorCode
from server.registry.records import BundleRecord, Snapshot, parse_key
from server.registry.registry import Registry
from server.rollout import OBSERVE_TIMEOUT_S, Rollout
from server.sources.errors import SourceError, SourceErrorCode
from server.sources.incoming_file import Received
from server.sources.remote import RemoteSources
from server.sources.root import BundleRoot
from server.sources.signature import SignaturePolicy
from server.sources.upload import receive

# After every process has seen that a bundle is not to be used, what still uses it is a running request.
_RELEASE_TIMEOUT_S = 2.0
_WAIT_STEP_S = 0.02
_MIN_DIGEST_PREFIX = len("sha256:") + 8


class BundleOperations:
    """Adds and removes bundles of the registry.

    A bundle is loaded by every rank of every live instance, which all confirm the same checksum, before the registry
    records it. What fails leaves nothing behind.
    """

    def __init__(
        self,
        registry: Registry,
        reconciler: Reconciler,
        rollout: Rollout,
        programs: Programs,
        recorder: OperationRecorder,
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
            reconciler: of this process.
            rollout: of this process.
            programs: says which bundles the served model takes.
            recorder: of this process.
            spans: names of `SPAN_NAMES` whose delimiters the engine knows.
            signatures: what is demanded of a bundle's signature.
            root: the folder that bundles may be named in; None for none.
            remote: the remote places that bundles may come from.
            max_bundle_bytes: bound of a bundle's size.
        """
        self._registry = registry
        self._reconciler = reconciler
        self._rollout = rollout
        self._programs = programs
        self._recorder = recorder
        self._spans = frozenset(spans)
        self._signatures = signatures
        self._root = root
        self._remote = remote
        self._max_bytes = max_bundle_bytes

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

    async def delete(self, digest: str, *, actor: str, drain: bool, timeout_s: float) -> None:
        """Forget a bundle and free its rows.

        Args:
            digest: or a unique prefix.
            actor: name of the key.
            drain: wait for running requests that use it; otherwise they are a reason to refuse.
            timeout_s: how long.

        Raises:
            SteeringRequestError: it does not exist (404), or something uses it (409); nothing has changed.
        """
        async with self._recorder.record("bundle.delete", actor, digest) as operation:
            record = bundle_named(await self._snapshot(), digest)
            digest = operation.digest = record.digest
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

    async def _add(
        self,
        fetch: Callable[[Path], Awaitable[Received]],
        actor: str,
        source: str,
        expected_digest: str | None,
        signature: bytes | None,
        dry_run: bool,
    ) -> BundleOutcome:
        async with self._recorder.record("bundle.add", actor, source, is_dry=dry_run) as operation:
            target = self._registry.store.incoming()
            try:
                received = await fetch(target)
                started_s = time.monotonic()
                operation.digest = received.digest
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
                refuse_unknown_spans(bundle.manifest.exclude, self._spans)
                signer = await asyncio.to_thread(self._signatures.check, target, signature)
                snapshot = await self._snapshot()
                known = snapshot.bundles.get(bundle.digest)
                if dry_run:
                    record = known or BundleRecord(
                        bundle.digest,
                        bundle.num_bytes,
                        bundle.manifest,
                        datetime.now(UTC),
                        actor,
                        source,
                        False,
                        signer,
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

    async def _wait_released(self, digest: str, timeout_s: float) -> bool:
        """Wait until no live instance holds a program of a bundle."""
        deadline = time.monotonic() + timeout_s
        while any(parse_key(key)[0] == digest for key in await asyncio.to_thread(self._registry.members.held)):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(_WAIT_STEP_S)
            await self._reconciler.refresh()
        return True


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
        message = f"{len(found)} bundles begin with {quoted(digest)}; give more digits."
        raise SteeringRequestError(ErrorCode.REQUEST_INVALID, message, param=param)
    return found[0]


def _without_credentials(uri: str) -> str:
    """An address as logs may show it."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        return "an address that cannot be read"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
