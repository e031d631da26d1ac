"""The registry: which bundles and profiles there are, durably, for all processes that open its directory."""

import os
import sqlite3
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from artifacts.bundle import Bundle
from artifacts.errors import quoted
from artifacts.manifest import to_metadata
from server.registry.database import DURABLE, RUNTIME, Database
from server.registry.desired import Desired, encode_settings
from server.registry.directory import prepare
from server.registry.errors import NotHeld, PreconditionFailed, RegistryError, RegistryErrorCode
from server.registry.export import write_export
from server.registry.members import Members
from server.registry.records import Action, BundleRecord, ProfileSettings, ProfileVersion, Snapshot
from server.registry.store import BundleStore
from server.registry.upkeep import database_problems, unneeded

# Versions of a profile that a snapshot holds.
DEFAULT_HISTORY = 8


# A file of this size or less is a new database to SQLite.
_NO_DATABASE_BYTES = 1


class Registry:
    """A directory that several servers on one machine may use at once; SQLite's write-ahead log needs a local disk.

    Every durable change adds 1 to the generation. All methods may be called from any thread and block for the disk, and
    for up to 10 s while other processes write. Besides what they list, they raise RegistryError with code locked or io.

    Attributes:
        directory: where it lies.
        store: the files of the bundles.
        members: the processes that use it.
    """

    def __init__(self, directory: Path, database: Database, clock: Callable[[], float]) -> None:
        self.directory = directory
        self.store = BundleStore(directory)
        self._database = database
        self._desired = Desired(database, clock)
        self.members = Members(database, self._desired, clock)

    @staticmethod
    def open(directory: Path, *, create: bool = True, clock: Callable[[], float] = time.monotonic) -> "Registry":
        """Open a registry, brought to the newest schema.

        Args:
            directory: where it lies.
            create: make it when there is none.
            clock: seconds, the same in all processes of the machine.

        Raises:
            RegistryError: code not_found, unsafe_directory (others can write into it), newer_schema, in_use (servers of
                an older version run on it), locked or io.
        """
        prepare(directory, create)
        if not create and not (directory / DURABLE).is_file():
            raise RegistryError(
                RegistryErrorCode.NOT_FOUND, f"{quoted(str(directory), 200)} holds no registry; name one that does."
            )
        _refuse_emptied(directory)
        registry = Registry(directory, Database(directory), clock)
        registry.store.sweep()
        return registry

    def close(self) -> None:
        """Close it. A second call does nothing."""
        self._database.close()

    def generation(self) -> int:
        """Number of changes so far."""
        return self._desired.generation()

    def written(self) -> tuple[int, ...]:
        """Numbers that nearly every write of any process changes, for looking often: no query, no lock, no thread.

        They are sizes and times of the write-ahead logs, so a write within the same tick of the file system's clock may
        not show; ask `changed` now and then.
        """
        found: list[int] = []
        for name in (DURABLE, RUNTIME):
            try:
                status = os.stat(self.directory / f"{name}-wal")
            except FileNotFoundError:
                continue
            found += [status.st_mtime_ns, status.st_size]
        return tuple(found)

    def last_change_at_s(self) -> float | None:
        """Unix time of the last change; None before the first."""
        with self._database.read() as connection:
            found = connection.execute("SELECT at FROM changes ORDER BY generation DESC LIMIT 1").fetchone()
            return None if found is None else datetime.fromisoformat(found[0]).timestamp()

    def changed(self) -> tuple[int, int]:
        """Two numbers for polling: the first differs after every durable change, whoever made it, the second after
        every change of running processes that another process made.
        """
        with self._database.read() as connection:
            runtime = connection.execute("PRAGMA runtime.data_version").fetchone()[0]
            return self._desired.generation(), int(runtime)

    def snapshot(self, history: int = DEFAULT_HISTORY) -> Snapshot:
        """The desired state now; cheap when it did not change.

        Args:
            history: bound of the versions of each profile, the current one included.
        """
        return self._desired.snapshot(history)

    def add_bundle(
        self, bundle: Bundle, *, actor: str, source: str, signer: str | None = None
    ) -> tuple[BundleRecord, bool]:
        """Record a bundle whose file is in the store already. One that drains is present again.

        Args:
            bundle: what the file holds.
            actor: who adds it.
            source: where it came from.
            signer: whose signature was checked; None leaves what is known.

        Returns:
            The record, and whether it is new.

        Raises:
            RegistryError: code bundle_missing; the file is not in the store.
        """
        with self._database.write() as connection:
            if not self.store.has(bundle.digest):
                raise _missing(bundle.digest, "is not in the store; add its file again")
            found = self._desired.bundle(bundle.digest)
            if found is None:
                manifest = to_metadata(bundle.manifest)["manifest"]
                row = (bundle.digest, bundle.num_bytes, manifest, _now(), actor, source, signer, False)
                connection.execute("INSERT INTO bundles VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
                self._record(connection, "bundle_add", bundle.digest, actor)
            elif found.is_draining or (signer is not None and signer != found.signer):
                connection.execute(
                    "UPDATE bundles SET is_draining = FALSE, signer = coalesce(?, signer) WHERE digest = ?",
                    (signer, bundle.digest),
                )
                self._record(connection, "bundle_add", bundle.digest, actor)
            record = self._desired.bundle(bundle.digest)
            assert record is not None
            return record, found is None

    def set_draining(self, digest: str, draining: bool, *, actor: str) -> None:
        """Keep profiles from naming a bundle, or let them again.

        Raises:
            RegistryError: code not_found; or in_use, since a live profile names it.
        """
        with self._database.write() as connection:
            record = self._bundle(digest)
            if draining:
                self._refuse_named(connection, digest)
            if record.is_draining != draining:
                connection.execute("UPDATE bundles SET is_draining = ? WHERE digest = ?", (draining, digest))
                self._record(connection, "bundle_drain" if draining else "bundle_keep", digest, actor)

    def end_drains(self) -> None:
        """Let profiles name again what a process that died was about to remove; nothing while any process lives."""
        with self._database.write():
            if not self.members.list():
                for digest, record in self._desired.bundles().items():
                    if record.is_draining:
                        self.set_draining(digest, False, actor="restart")

    def remove_bundle(self, digest: str, *, actor: str) -> None:
        """Forget a bundle and remove its file. History keeps its digest.

        Raises:
            RegistryError: code not_found; or in_use, since a live profile names it.
        """
        with self._database.write() as connection:
            self._bundle(digest)
            self._refuse_named(connection, digest)
            file = self._forget(connection, digest, actor)
        # After the commit: a crash between leaves a stray file, and not a record without one.
        if file is not None:
            self.discard(digest, file)

    def put_profile(
        self,
        name: str,
        settings: ProfileSettings,
        *,
        actor: str,
        action: Action = "put",
        if_match: int | None = None,
        must_be_new: bool = False,
        restored_from: int | None = None,
    ) -> ProfileVersion:
        """Make a profile mean something from now on. Settings that it has already change nothing.

        Args:
            name: of the profile.
            settings: what it shall mean.
            actor: who wants it.
            action: kind of change.
            if_match: generation of the version that must be the current one.
            must_be_new: the profile must not exist.
            restored_from: generation of the version that a rollback brings back.

        Returns:
            The current version afterwards.

        Raises:
            RegistryError: code precondition_failed (PreconditionFailed), bundle_missing, or not_held (NotHeld).
        """
        with self._database.write() as connection:
            current = self._desired.current(name)
            _check_precondition(name, current, if_match, must_be_new)
            if current is not None and current.settings == settings:
                return current
            record = self._desired.bundle(settings.bundle)
            if record is None or record.is_draining:
                what = "is draining" if record else "is not in the registry"
                raise _missing(settings.bundle, f"{what}; add it and try again")
            lacking = self.members.instances_without(settings.key)
            if lacking:
                raise NotHeld(
                    f"{settings.key} is not held by every running server ({', '.join(lacking)}); try again when it is.",
                    lacking,
                )
            generation = self._record(connection, action, name, actor)
            connection.execute(
                "INSERT INTO versions (generation, name, restored_from, bundle, settings) VALUES (?, ?, ?, ?, ?)",
                (generation, name, restored_from, settings.bundle, encode_settings(settings)),
            )
            connection.execute(
                "INSERT INTO profiles (name, generation, bundle) VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE "
                "SET generation = excluded.generation, bundle = excluded.bundle",
                (name, generation, settings.bundle),
            )
            return self._version(name, generation)

    def delete_profile(self, name: str, *, actor: str, if_match: int | None = None) -> ProfileVersion:
        """Take a profile away; its history stays.

        Returns:
            The version without settings that stands for the change.

        Raises:
            RegistryError: code not_found, or precondition_failed (PreconditionFailed).
        """
        with self._database.write() as connection:
            current = self._desired.current(name)
            if current is None:
                raise _unknown(name)
            _check_precondition(name, current, if_match, must_be_new=False)
            generation = self._record(connection, "delete", name, actor)
            connection.execute("INSERT INTO versions (generation, name) VALUES (?, ?)", (generation, name))
            connection.execute("DELETE FROM profiles WHERE name = ?", (name,))
            return self._version(name, generation)

    def history(self, name: str, *, limit: int = 50, before: int | None = None) -> list[ProfileVersion]:
        """Versions of a profile, newest first, also of a deleted one; empty when it never existed.

        Args:
            name: of the profile.
            limit: bound of their number.
            before: only versions of an earlier generation.
        """
        return self._desired.history(name, limit, before)

    def rollback_target(self, name: str, to: int | None) -> ProfileVersion:
        """The version that a rollback of a profile would bring back.

        Args:
            name: of the profile; a deleted one can be rolled back too.
            to: generation of the version; None for the newest that is older than the current one, or than the one that
                the current one restored, and means something else.

        Raises:
            RegistryError: code not_found.
        """
        with self._database.read():
            latest = next(iter(self._desired.history(name, 1, None)), None)
            if latest is None:
                raise _unknown(name)
            if to is not None:
                target = self._desired.version(name, to)
                if target is None or target.settings is None:
                    raise RegistryError(
                        RegistryErrorCode.NOT_FOUND,
                        f"Profile {quoted(name)} has no version {to} to go back to; its history lists them.",
                    )
                return target
            before = latest.restored_from or latest.generation
            while older := self._desired.history(name, 50, before):
                for version in older:
                    if version.settings is not None and version.settings != latest.settings:
                        return version
                before = older[-1].generation
        raise RegistryError(
            RegistryErrorCode.NOT_FOUND, f"Profile {quoted(name)} has no older version to go back to; put one."
        )

    def has_ever_named(self, profile: str, digest: str) -> bool:
        """Whether any version of a profile, live or not, named a bundle."""
        return self._desired.has_ever_named(profile, digest)

    def gc(self, *, keep_history: int = 8, dry_run: bool = False, actor: str = "gc") -> list[str]:
        """Remove bundles that nobody goes back to, and files that crashes left.

        A bundle stays while the last versions of a live profile name it or a change is about to; also while a running
        server holds it and any version of a live profile names it.

        Args:
            keep_history: versions of each live profile that count; at least 1.
            dry_run: change nothing.
            actor: who wants it.

        Returns:
            Digests of the bundles that were, or would be, removed.
        """
        with self._database.write() as connection:
            digests = unneeded(connection, self._desired.snapshot(max(1, keep_history)), self.members.held())
            stray = self.store.stray(self._desired.bundles())
            if dry_run:
                return digests
            files = {digest: self._forget(connection, digest, actor) for digest in digests}
            for path in stray:
                path.unlink(missing_ok=True)
        for digest, file in files.items():
            if file is not None:
                self.discard(digest, file)
        return digests

    def discard(self, digest: str, file: tuple[int, int] | None = None) -> None:
        """Remove a file from the store unless there is a record of it.

        Args:
            digest: of its content.
            file: `BundleStore.file_identity`, to remove this very file and none that was kept since; None for any.
        """
        with self._database.write():
            if self._desired.bundle(digest) is None:
                self.store.remove(digest, file)

    def verify(self) -> list[tuple[str, str]]:
        """Read every file and check the databases.

        Returns:
            (digest or name of a database, what is wrong with it) for all that is damaged.
        """
        problems = [(DURABLE, problem) for problem in database_problems(self._database)]
        for digest, record in self._desired.bundles().items():
            try:
                if self.store.load(digest).manifest != record.manifest:
                    problems.append((digest, "Its record holds another manifest than its file; add it again."))
            except RegistryError as error:
                # Somebody may have removed it since.
                if self._desired.bundle(digest) is not None:
                    problems.append((digest, str(error)))
        return problems

    def export(self, path: Path) -> None:
        """Write all bundles and the current profiles into a .tar file, which appears complete or not at all.

        Args:
            path: where to; an existing file is replaced.

        Raises:
            RegistryError: code store_damaged; a file is missing.
            OSError: the file cannot be written.
        """
        write_export(path, self.snapshot(1), self.store)

    def _bundle(self, digest: str) -> BundleRecord:
        record = self._desired.bundle(digest)
        if record is None:
            raise RegistryError(RegistryErrorCode.NOT_FOUND, f"Bundle {quoted(digest)} is not in the registry.")
        return record

    def _version(self, name: str, generation: int) -> ProfileVersion:
        version = self._desired.version(name, generation)
        assert version is not None
        return version

    def _refuse_named(self, connection: sqlite3.Connection, digest: str) -> None:
        rows = connection.execute("SELECT name FROM profiles WHERE bundle = ? ORDER BY name LIMIT 4", (digest,))
        names = [name for (name,) in rows.fetchall()]
        if names:
            listed = ", ".join(names[:3]) + (", ..." if names[3:] else "")
            raise RegistryError(
                RegistryErrorCode.IN_USE,
                f"Bundle {digest} is what these profiles mean now: {listed}; change or delete them first.",
            )

    def _forget(self, connection: sqlite3.Connection, digest: str, actor: str) -> tuple[int, int] | None:
        """Remove the record of a bundle; which file it had is what `discard` wants."""
        connection.execute("DELETE FROM bundles WHERE digest = ?", (digest,))
        self._record(connection, "bundle_remove", digest, actor)
        return self.store.file_identity(digest)

    def _record(self, connection: sqlite3.Connection, action: str, target: str, actor: str) -> int:
        """Count a change and return the generation that it makes."""
        row = (action, target, actor, _now())
        cursor = connection.execute("INSERT INTO changes (action, target, actor, at) VALUES (?, ?, ?, ?)", row)
        assert cursor.lastrowid is not None
        return cursor.lastrowid


def _refuse_emptied(directory: Path) -> None:
    """SQLite takes a file that lost its content for a new database, and everything would seem to be gone."""
    try:
        is_empty = (directory / DURABLE).stat().st_size <= _NO_DATABASE_BYTES
    except FileNotFoundError:
        is_empty = True
    if is_empty and BundleStore(directory).is_used():
        raise RegistryError(
            RegistryErrorCode.IO,
            f"{quoted(str(directory), 200)} holds bundles, and its {DURABLE} is empty or missing; restore it, or "
            "remove the folder bundles to begin anew.",
        )


def _check_precondition(name: str, current: ProfileVersion | None, if_match: int | None, must_be_new: bool) -> None:
    found = None if current is None else current.generation
    if must_be_new and found is not None:
        raise PreconditionFailed(
            f"Profile {quoted(name)} exists, at version {found}; name that version to change it.", found
        )
    if if_match is not None and if_match != found:
        at = "does not exist" if found is None else f"is at version {found}"
        raise PreconditionFailed(
            f"Profile {quoted(name)} {at}, not at version {if_match}; read it again and decide anew.", found
        )


def _missing(digest: str, what: str) -> RegistryError:
    return RegistryError(RegistryErrorCode.BUNDLE_MISSING, f"Bundle {quoted(digest)} {what}.")


def _unknown(name: str) -> RegistryError:
    return RegistryError(RegistryErrorCode.NOT_FOUND, f"Profile {quoted(name)} does not exist.")


def _now() -> str:
    return datetime.now(UTC).isoformat()
