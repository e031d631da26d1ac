"""Reads the desired state: bundles, versions of profiles, the snapshot of both."""

import sqlite3
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import cast, get_args

from pydantic import TypeAdapter, ValidationError

from artifacts.errors import BundleError, quoted
from artifacts.manifest import Manifest, parse_manifest
from server.registry.database import Database
from server.registry.errors import RegistryError, RegistryErrorCode
from server.registry.records import Action, BundleRecord, ProfileSettings, ProfileVersion, Snapshot

# A member that has not been heard of for this long is taken for dead.
LIVE_S = 5.0
# Parsed versions that the last snapshot did not use and another one may; more are dropped.
_MAX_VERSIONS = 16384
# Changes since the last snapshot that are read one by one.
_MAX_UPDATED = 64
_SETTINGS = TypeAdapter(ProfileSettings)
_VERSION_COLUMNS = "generation, name, settings, action, actor, at, restored_from"
_VERSIONS = f"SELECT {_VERSION_COLUMNS} FROM versions JOIN changes USING (generation)"
_BUNDLES = "SELECT digest, num_bytes, added_at, added_by, source, is_draining, signer FROM bundles"
# A live profile's newest versions, one index range each, however long its history is.
_NEWEST_OF = (
    "SELECT profiles.name, versions.generation FROM profiles JOIN versions ON versions.generation IN "
    "(SELECT generation FROM versions AS past WHERE past.name = profiles.name AND past.settings IS NOT NULL "
    "ORDER BY past.generation DESC LIMIT ?) WHERE {} ORDER BY versions.generation DESC"
)
_NEWEST, _NEWEST_OF_ONE = _NEWEST_OF.format("TRUE"), _NEWEST_OF.format("profiles.name = ?")
# Those of the dead would be loaded for nobody.
_INTENTS = "SELECT DISTINCT key FROM runtime.intents JOIN runtime.members USING (member) WHERE heartbeat >= ?"
_NEVER_NAMED = (
    "WITH added AS (SELECT target, max(generation) AS at FROM changes WHERE action = 'bundle_add' GROUP BY target), "
    "named AS (SELECT bundle, max(generation) AS at FROM versions WHERE bundle IS NOT NULL GROUP BY bundle) "
    "SELECT digest FROM bundles LEFT JOIN added ON added.target = digest LEFT JOIN named ON named.bundle = digest "
    "WHERE named.at IS NULL OR named.at < coalesce(added.at, 0)"
)


def encode_settings(settings: ProfileSettings) -> str:
    """Settings as JSON."""
    return _SETTINGS.dump_json(settings).decode()


def decode_settings(text: str) -> ProfileSettings:
    """Settings from JSON.

    Raises:
        ValueError: they are none.
    """
    return _SETTINGS.validate_json(text)


class Desired:
    """The durable database as objects. What never changes is parsed once."""

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock
        self._manifests: dict[str, Manifest] = {}
        self._versions: dict[int, ProfileVersion] = {}
        self._last: dict[int, Snapshot] = {}

    def generation(self) -> int:
        """Number of changes so far."""
        with self._database.read() as connection:
            return int(connection.execute("SELECT coalesce(max(generation), 0) FROM changes").fetchone()[0])

    def snapshot(self, history: int) -> Snapshot:
        """The state now, with up to `history` versions of each live profile."""
        with self._database.read() as connection:
            # Before the durable state: a key leaves the intents only after a version names it, so none is overlooked.
            intents = frozenset(key for (key,) in connection.execute(_INTENTS, (self._clock() - LIVE_S,)))
            generation = self.generation()
            last = self._last.get(history)
            if last is None or last.generation != generation:
                updated = None if last is None else self._updated(connection, last, generation)
                last = self._last[history] = updated or self._read(connection, history, generation)
            return replace(last, intents=intents)

    def bundles(self) -> dict[str, BundleRecord]:
        """All bundles by digest, in the order in which they were added."""
        with self._database.read() as connection:
            rows = connection.execute(f"{_BUNDLES} ORDER BY rowid").fetchall()
            return {row[0]: self._bundle(connection, row) for row in rows}

    def bundle(self, digest: str) -> BundleRecord | None:
        """One bundle; None for an unknown digest."""
        with self._database.read() as connection:
            row = connection.execute(f"{_BUNDLES} WHERE digest = ?", (digest,)).fetchone()
            return None if row is None else self._bundle(connection, row)

    def current(self, name: str) -> ProfileVersion | None:
        """Current version of a live profile; None for an unknown name."""
        with self._database.read() as connection:
            row = connection.execute(f"{_VERSIONS} JOIN profiles USING (generation, name) WHERE name = ?", (name,))
            found = row.fetchone()
            return None if found is None else _version(found)

    def version(self, name: str, generation: int) -> ProfileVersion | None:
        """One version of a profile, live or not; None when there is none."""
        with self._database.read() as connection:
            row = connection.execute(f"{_VERSIONS} WHERE name = ? AND generation = ?", (name, generation)).fetchone()
            return None if row is None else _version(row)

    def history(self, name: str, limit: int, before: int | None) -> list[ProfileVersion]:
        """Versions of a profile, live or not, newest first; only those older than `before`."""
        with self._database.read() as connection:
            rows = connection.execute(
                f"{_VERSIONS} WHERE name = ? AND (? IS NULL OR generation < ?) ORDER BY generation DESC LIMIT ?",
                (name, before, before, limit),
            ).fetchall()
        return [_version(row) for row in rows]

    def has_ever_named(self, name: str, digest: str) -> bool:
        """Whether any version of a profile named a bundle."""
        with self._database.read() as connection:
            found = connection.execute("SELECT 1 FROM versions WHERE bundle = ? AND name = ? LIMIT 1", (digest, name))
            return found.fetchone() is not None

    def _read(self, connection: sqlite3.Connection, history: int, generation: int) -> Snapshot:
        """The whole state."""
        bundles = self.bundles()
        self._manifests = {digest: record.manifest for digest, record in bundles.items()}
        rows = connection.execute(_NEWEST, (history,)).fetchall()
        profiles: dict[str, list[ProfileVersion]] = {}
        for name, made_by in rows:
            profiles.setdefault(name, []).append(self._version_at(connection, made_by))
        return Snapshot(
            generation=generation,
            bundles=bundles,
            profiles={name: tuple(profiles[name]) for name in sorted(profiles)},
            never_named=frozenset(digest for (digest,) in connection.execute(_NEVER_NAMED)),
            history=history,
        )

    def _updated(self, connection: sqlite3.Connection, last: Snapshot, generation: int) -> Snapshot | None:
        """The state after an earlier one, if only a few profiles changed since; None otherwise.

        With a thousand profiles, reading all of them again would be most of what a change of one costs.
        """
        if not last.generation < generation <= last.generation + _MAX_UPDATED:
            return None
        since = connection.execute("SELECT action, target FROM changes WHERE generation > ?", (last.generation,))
        changes = since.fetchall()
        if any(action not in get_args(Action) for action, _ in changes):
            return None
        profiles = dict(last.profiles)
        for name in {target for _, target in changes}:
            rows = connection.execute(_NEWEST_OF_ONE, (last.history, name)).fetchall()
            profiles[name] = tuple(self._version_at(connection, made_by) for _, made_by in rows)
        named = connection.execute("SELECT bundle FROM versions WHERE generation > ?", (last.generation,))
        return Snapshot(
            generation=generation,
            bundles=last.bundles,
            profiles={name: profiles[name] for name in sorted(profiles) if profiles[name]},
            never_named=last.never_named.difference(bundle for (bundle,) in named.fetchall()),
            history=last.history,
        )

    def _version_at(self, connection: sqlite3.Connection, generation: int) -> ProfileVersion:
        version = self._versions.get(generation)
        if version is None:
            while len(self._versions) >= _MAX_VERSIONS:
                del self._versions[next(iter(self._versions))]
            row = connection.execute(f"{_VERSIONS} WHERE generation = ?", (generation,)).fetchone()
            version = self._versions[generation] = _version(row)
        return version

    def _bundle(
        self, connection: sqlite3.Connection, row: tuple[str, int, str, str, str, int, str | None]
    ) -> BundleRecord:
        digest, num_bytes, added_at, added_by, source, is_draining, signer = row
        manifest = self._manifests.get(digest)
        if manifest is None:
            text = connection.execute("SELECT manifest FROM bundles WHERE digest = ?", (digest,)).fetchone()[0]
            try:
                manifest = self._manifests[digest] = parse_manifest(text)
            except BundleError as error:
                raise RegistryError(
                    RegistryErrorCode.STORE_DAMAGED, f"The record of bundle {digest} is damaged: {error}"
                ) from None
        added = datetime.fromisoformat(added_at)
        return BundleRecord(digest, num_bytes, manifest, added, added_by, source, bool(is_draining), signer)


def _version(row: tuple[int, str, str | None, str, str, str, int | None]) -> ProfileVersion:
    generation, name, settings, action, actor, at, restored_from = row
    try:
        decoded = None if settings is None else decode_settings(settings)
    except ValidationError as error:
        raise RegistryError(
            RegistryErrorCode.STORE_DAMAGED,
            f"Version {generation} of profile {quoted(name)} is damaged: {quoted(str(error.errors()[0]['msg']))}; "
            "restore the registry from an export.",
        ) from None
    assert action in get_args(Action)
    at_time = datetime.fromisoformat(at)
    return ProfileVersion(name, generation, decoded, cast(Action, action), actor, at_time, restored_from)
