"""What of a registry may go, and what of it is damaged."""

import sqlite3
from collections.abc import Collection

from server.registry.database import Database
from server.registry.records import Snapshot, parse_key

_NAMED = "SELECT DISTINCT versions.bundle FROM versions JOIN profiles USING (name) WHERE versions.bundle IS NOT NULL"


def unneeded(connection: sqlite3.Connection, state: Snapshot, held: Collection[str]) -> list[str]:
    """Digests of the bundles that nobody goes back to, in the order in which they were added.

    Args:
        connection: to the registry, in a transaction.
        state: with as many versions of each live profile as count.
        held: program keys that running servers hold.
    """
    recent = {
        version.settings.bundle
        for versions in state.profiles.values()
        for version in versions
        if version.settings is not None
    }
    ever = {digest for (digest,) in connection.execute(_NAMED)}
    used = ever & _digests(held)
    kept = recent | used | _digests(state.intents)
    return [digest for digest in state.bundles if digest not in kept]


def database_problems(database: Database) -> list[str]:
    """What is wrong with the durable database itself, one sentence each."""
    with database.read() as connection:
        found = [row[0] for row in connection.execute("PRAGMA main.integrity_check(8)") if row[0] != "ok"]
        broken = [row[0] for row in connection.execute("PRAGMA main.foreign_key_check")]
    return found + [f"A row of table {table} refers to one that does not exist." for table in broken]


def _digests(keys: Collection[str]) -> set[str]:
    return {parse_key(key)[0] for key in keys}
