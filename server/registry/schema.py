"""Tables of the two databases, and the migrations that lead to them."""

import sqlite3
from collections.abc import Callable, Sequence

Migration = Callable[[sqlite3.Connection], None]

# A process that holds the runtime database in another form cannot share it.
RUNTIME_VERSION = 1

_TABLES_1 = (
    # Every durable change, in order: the generation is their number.
    "CREATE TABLE changes (generation INTEGER PRIMARY KEY, action TEXT NOT NULL, target TEXT NOT NULL, "
    "actor TEXT NOT NULL, at TEXT NOT NULL)",
    "CREATE TABLE bundles (digest TEXT PRIMARY KEY, num_bytes INTEGER NOT NULL, manifest TEXT NOT NULL, "
    "added_at TEXT NOT NULL, added_by TEXT NOT NULL, source TEXT NOT NULL, signer TEXT, is_draining INTEGER NOT NULL)",
    # History outlives bundles, so it does not refer to their table.
    "CREATE TABLE versions (generation INTEGER PRIMARY KEY REFERENCES changes (generation), name TEXT NOT NULL, "
    "restored_from INTEGER REFERENCES versions (generation), bundle TEXT, settings TEXT, "
    "CHECK ((bundle IS NULL) = (settings IS NULL)))",
    "CREATE INDEX versions_by_name ON versions (name, generation)",
    "CREATE INDEX versions_by_bundle ON versions (bundle)",
    # Live profiles only.
    "CREATE TABLE profiles (name TEXT PRIMARY KEY, generation INTEGER NOT NULL REFERENCES versions (generation), "
    "bundle TEXT NOT NULL REFERENCES bundles (digest))",
    "CREATE INDEX profiles_by_bundle ON profiles (bundle)",
)
_RUNTIME_TABLES = (
    "CREATE TABLE runtime.members (member TEXT PRIMARY KEY, instance TEXT NOT NULL, pid INTEGER NOT NULL, "
    "host TEXT NOT NULL, heartbeat REAL NOT NULL, observed INTEGER NOT NULL, pins TEXT NOT NULL, state TEXT NOT NULL, "
    "problem TEXT, counters TEXT)",
    "CREATE TABLE runtime.holdings (instance TEXT NOT NULL, key TEXT NOT NULL, checksum TEXT NOT NULL, "
    "PRIMARY KEY (instance, key))",
    "CREATE TABLE runtime.intents (member TEXT NOT NULL REFERENCES members (member) ON DELETE CASCADE, "
    "key TEXT NOT NULL, PRIMARY KEY (member, key))",
)


def _create(connection: sqlite3.Connection) -> None:
    """Version 1."""
    for statement in _TABLES_1:
        connection.execute(statement)


# The i-th leads from version i to i + 1. Released ones never change.
MIGRATIONS: Sequence[Migration] = (_create,)


def version(connection: sqlite3.Connection, schema: str) -> int:
    """Version of a database, 0 when it is new.

    Args:
        connection: to the registry.
        schema: "main" or "runtime".
    """
    return int(connection.execute(f"PRAGMA {schema}.user_version").fetchone()[0])


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the durable database to the newest version; inside a transaction."""
    for number, migration in enumerate(MIGRATIONS[version(connection, "main") :], version(connection, "main") + 1):
        migration(connection)
        connection.execute(f"PRAGMA main.user_version = {number}")


def create_runtime(connection: sqlite3.Connection) -> None:
    """Make the tables of a new runtime database; inside a transaction."""
    for statement in _RUNTIME_TABLES:
        connection.execute(statement)
    connection.execute(f"PRAGMA runtime.user_version = {RUNTIME_VERSION}")
