"""Profiles are put, rolled back and deleted: load what they name everywhere, then switch at once; or change nothing."""

import asyncio
import time
from collections.abc import Collection
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path

from artifacts.manifest import Manifest
from server.bundle_operations import bundle_named
from server.errors import ErrorCode, SteeringRequestError
from server.operation import OperationRecorder
from server.outcomes import ProfileOutcome, ProfileSpec
from server.preconditions import expected_generation, failed, must_be_new
from server.profiles import checked_layers, recommended_settings
from server.reconciler import Reconciler
from server.refusals import refuse_unknown_spans
from server.registry.records import ProfileSettings, ProfileVersion, Snapshot
from server.registry.registry import Registry
from server.rollout import Rollout

# Who makes the changes of --steering-declaration; the name of no key.
DECLARATION = "declaration file"
_WAIT_STEP_S = 0.02


class ProfileOperations:
    """Changes what the names of profiles mean.

    The program that a version needs is loaded by every rank of every live instance, which all confirm the same
    checksum, before the registry commits it; until then requests see the version before.
    """

    def __init__(
        self,
        registry: Registry,
        reconciler: Reconciler,
        rollout: Rollout,
        recorder: OperationRecorder,
        *,
        spans: Collection[str],
    ) -> None:
        """Take what is needed.

        Args:
            registry: the state to change.
            reconciler: of this process.
            rollout: of this process.
            recorder: of this process.
            spans: names of `SPAN_NAMES` whose delimiters the engine knows.
        """
        self._registry = registry
        self._reconciler = reconciler
        self._rollout = rollout
        self._recorder = recorder
        self._spans = frozenset(spans)
        self._declaration: Path | None = None
        self._declared: Collection[str] = ()

    def declare(self, path: Path, names: Collection[str]) -> None:
        """Leave the profiles that a file declares to that file.

        Args:
            path: of the file.
            names: of the profiles.
        """
        self._declaration, self._declared = path, frozenset(names)

    async def put(
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
        async with self._recorder.record("profile.put", actor, name, is_dry=dry_run) as operation:
            self._refuse_declared(name, actor)
            snapshot = await self._snapshot()
            settings = self.settings_of(spec, snapshot)
            manifest = snapshot.bundles[settings.bundle].manifest
            operation.digest = settings.bundle
            previous, is_new_only = snapshot.current(name), must_be_new(if_none_match)
            expected = expected_generation(previous, if_match)
            if is_new_only and previous is not None:
                raise failed(
                    f"Profile {name!r} exists already, made by generation {previous.generation}.", "If-None-Match"
                )
            operation.before = previous.generation if previous is not None else None
            if dry_run:
                version = ProfileVersion(name, snapshot.generation + 1, settings, "put", actor, datetime.now(UTC), None)
                is_changed = previous is None or previous.settings != settings
                return ProfileOutcome(version, manifest, previous, is_changed, False, True)
            version = await self._rollout.commit(
                settings.key,
                lambda: self._registry.put_profile(
                    name, settings, actor=actor, if_match=expected, must_be_new=is_new_only
                ),
            )
            operation.after = version.generation
            return await self._shown(version, manifest, previous)

    async def rollback(
        self, name: str, *, actor: str, to: int | None = None, if_match: str | None = None
    ) -> ProfileOutcome:
        """Make an earlier version of a profile the current one.

        Args:
            name: of the profile.
            actor: name of the key.
            to: generation of the version; None for the last different one before the current.
            if_match: see `put`.

        Raises:
            SteeringRequestError: no such version (404), its bundle is gone (409), or the current one is another (412).
        """
        async with self._recorder.record("profile.rollback", actor, name) as operation:
            self._refuse_declared(name, actor)
            previous = (await self._snapshot()).current(name)
            expected = expected_generation(previous, if_match)
            operation.before = previous.generation if previous is not None else None
            target = await asyncio.to_thread(self._registry.rollback_target, name, to)
            settings = target.settings
            assert settings is not None
            operation.digest = settings.bundle
            refuse_unknown_spans(settings.exclude, self._spans)
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
            operation.after = version.generation
            return await self._shown(version, manifest, previous)

    async def delete(
        self, name: str, *, actor: str, if_match: str | None = None, drain: bool = False, timeout_s: float = 0.0
    ) -> None:
        """Take a name away. Requests that were admitted under it go on as they began.

        Args:
            name: of the profile.
            actor: name of the key.
            if_match: see `put`.
            drain: return only when the workers have freed what nothing else uses, or the time is over.
            timeout_s: that time.

        Raises:
            SteeringRequestError: it does not exist (404), or the current version is another (412).
        """
        async with self._recorder.record("profile.delete", actor, name) as operation:
            self._refuse_declared(name, actor)
            previous = (await self._snapshot()).current(name)
            expected = expected_generation(previous, if_match)
            operation.before = previous.generation if previous is not None else None
            version = await asyncio.to_thread(self._registry.delete_profile, name, actor=actor, if_match=expected)
            operation.after = version.generation
            await self._rollout.catch_up()
            if drain and previous is not None and previous.settings is not None:
                await self._wait_unwanted(previous.settings.key, timeout_s)

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
        refuse_unknown_spans(exclude, self._spans)
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

    async def _snapshot(self) -> Snapshot:
        return await asyncio.to_thread(self._registry.snapshot)

    async def _shown(
        self, version: ProfileVersion, manifest: Manifest, previous: ProfileVersion | None
    ) -> ProfileOutcome:
        observed = await self._rollout.catch_up()
        is_changed = previous is None or version.generation != previous.generation
        return ProfileOutcome(version, manifest, previous, is_changed, observed, False)

    def _refuse_declared(self, name: str, actor: str) -> None:
        if name in self._declared and actor != DECLARATION:
            raise SteeringRequestError(
                ErrorCode.CONFLICT_STATE,
                f"Profile {name!r} is declared in {self._declaration}; change it there.",
                HTTPStatus.CONFLICT,
                "name",
            )

    async def _wait_unwanted(self, key: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if key in self._reconciler.wanted or key not in await asyncio.to_thread(self._registry.members.held):
                return
            await asyncio.sleep(_WAIT_STEP_S)


def _layers(layers: tuple[int, ...] | None, manifest: Manifest) -> tuple[int, ...] | None:
    try:
        return checked_layers(layers, manifest)
    except ValueError as error:
        raise _invalid(str(error), "layers") from None


def _invalid(message: str, param: str) -> SteeringRequestError:
    return SteeringRequestError(ErrorCode.REQUEST_INVALID, message, param=param)
