"""The connection to the registry's two SQLite databases: transactions, and errors in our words."""

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from artifacts.errors import quoted
from server.registry import schema
from server.registry.directory import Use, opening
from server.registry.errors import RegistryError, RegistryErrorCode

DURABLE, RUNTIME = "registry.sqlite", "runtime.sqlite"
BUSY_TIMEOUT_S = 10.0
_PRIMARY_CODE = 0xFF


class Database:
    """One connection for all threads of this process. A transaction sees and locks both databases.

    `registry.sqlite` survives a loss of power. `runtime.sqlite` describes running processes: whoever opens the registry
    while nobody else uses it starts a new one, so that nothing in it outlives a crash of the machine.
    """

    def __init__(self, directory: Path) -> None:
        """Open the databases, made or migrated where necessary.

        Raises:
            RegistryError: code newer_schema, in_use (an older version to migrate), locked or io.
        """
        self._directory = directory
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._is_writing = self._is_closed = False
        with opening(directory):
            self._use = Use(directory)
            try:
                with self._translated():
                    self._connection = self._connect()
            except BaseException:
                self._use.end()
                raise

    def close(self) -> None:
        """Close the connection. A second call does nothing."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._connection.close()
                self._use.end()

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Transaction that reads; the outer one where there is one.

        Raises:
            RegistryError: code locked or io.
        """
        with self._transaction(writes=False) as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """Transaction that writes and keeps all others from writing; the outer one where there is one.

        Raises:
            RegistryError: code locked or io; nothing was changed.
        """
        with self._transaction(writes=True) as connection:
            yield connection

    @contextmanager
    def _transaction(self, writes: bool) -> Iterator[sqlite3.Connection]:
        assert os.getpid() == self._pid, "a connection does not survive a fork; open the registry in the new process"
        with self._lock, self._translated():
            connection = self._connection
            if connection.in_transaction:
                assert self._is_writing or not writes, "a transaction that reads cannot begin to write"
                yield connection
                return
            connection.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
            self._is_writing = writes
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def _connect(self) -> sqlite3.Connection:
        durable, runtime = self._directory / DURABLE, self._directory / RUNTIME
        if self._use.is_first:
            for suffix in ("", "-wal", "-shm"):
                runtime.with_name(RUNTIME + suffix).unlink(missing_ok=True)
        for path in (durable, runtime):
            # SQLite would let the umask decide who may read it.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(
            durable, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False, cached_statements=256
        )
        try:
            connection.execute("ATTACH DATABASE ? AS runtime", (str(runtime),))
            self._configure(connection)
            self._upgrade(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _configure(self, connection: sqlite3.Connection) -> None:
        for name, synchronous in (("main", "FULL"), ("runtime", "OFF")):
            mode = connection.execute(f"PRAGMA {name}.journal_mode = WAL").fetchone()[0]
            if mode != "wal":
                raise RegistryError(
                    RegistryErrorCode.IO,
                    f"The file system of {quoted(str(self._directory), 200)} cannot share memory between processes; "
                    "put the registry on a local one.",
                )
            connection.execute(f"PRAGMA {name}.synchronous = {synchronous}")
        connection.execute("PRAGMA foreign_keys = ON")

    def _upgrade(self, connection: sqlite3.Connection) -> None:
        found, known = schema.version(connection, "main"), len(schema.MIGRATIONS)
        if found > known:
            raise self._newer(found, known)
        if 0 < found < known and not self._use.is_first:
            raise RegistryError(
                RegistryErrorCode.IN_USE,
                f"The registry has schema {found}, is to get schema {known}, and is in use; stop the servers of the "
                "older version first.",
            )
        connection.execute("BEGIN IMMEDIATE")
        schema.migrate(connection)
        connection.execute("COMMIT")
        connection.execute("BEGIN IMMEDIATE")
        found = schema.version(connection, "runtime")
        if found == 0:
            schema.create_runtime(connection)
        connection.execute("COMMIT")
        if found not in (0, schema.RUNTIME_VERSION):
            raise self._newer(found, schema.RUNTIME_VERSION)

    def _newer(self, found: int, known: int) -> RegistryError:
        return RegistryError(
            RegistryErrorCode.NEWER_SCHEMA,
            f"{quoted(str(self._directory), 200)} has schema {found} and this version reads up to {known}; "
            "run the version that made it.",
        )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) & _PRIMARY_CODE in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise RegistryError(
                    RegistryErrorCode.LOCKED,
                    f"Another process has kept the registry locked for {BUSY_TIMEOUT_S:g} s; try again.",
                ) from error
            raise self._failed(str(error)) from error
        except OSError as error:
            raise self._failed(error.strerror or str(error)) from error

    def _failed(self, reason: str) -> RegistryError:
        return RegistryError(
            RegistryErrorCode.IO,
            f"The registry in {quoted(str(self._directory), 200)} cannot be read or written ({reason}); check the disk "
            "and run `expertsteer registry verify`.",
        )
