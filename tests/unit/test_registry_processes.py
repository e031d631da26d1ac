"""The registry over processes: races, kill -9 at every step, another schema."""

import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from artifacts.bundle import Bundle, load_bundle
from artifacts.manifest import Scope, to_metadata
from server.registry import schema
from server.registry.errors import PreconditionFailed, RegistryError, RegistryErrorCode
from server.registry.records import ProfileSettings
from server.registry.registry import Registry

# Newer Pythons warn of a fork beside other threads; the children here use none of theirs.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
FORK = multiprocessing.get_context("fork")
NUM_PROCESSES, NUM_OPERATIONS = 8, 100


@pytest.fixture(scope="module")
def files(make_bundle: Callable[..., Path]) -> list[Path]:
    return [make_bundle(f"process-{seed}", [1], seed) for seed in range(3)]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "registry"


def add(registry: Registry, path: Path) -> Bundle:
    bundle = load_bundle(path)
    copy = registry.store.incoming()
    shutil.copyfile(path, copy)
    registry.store.keep(copy, bundle.digest)
    registry.add_bundle(bundle, actor="tester", source="test")
    return bundle


def settings(digest: str, strength: float = 1.0) -> ProfileSettings:
    return ProfileSettings(digest, strength, 4.0, Scope.ALL)


def in_processes(work: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> list[Any]:
    """Results of `work` for each tuple of arguments, each in a process of its own."""
    pipes = []
    for each in arguments:
        receiver, sender = FORK.Pipe(duplex=False)
        process = FORK.Process(target=lambda sender=sender, each=each: sender.send(work(*each)))
        process.start()
        sender.close()
        pipes.append((process, receiver))
    results = [receiver.recv() for _, receiver in pipes]
    for process, _ in pipes:
        process.join(60)
        assert process.exitcode == 0
    return results


def check_sound(directory: Path) -> None:
    registry = Registry.open(directory)
    assert registry.verify() == []
    registry.close()


def random_changes(directory: Path, files: list[Path], seed: int) -> list[tuple[int, str, str | None]]:
    """Acknowledged changes as (generation, name, digest or None for deleted)."""
    chosen, registry = random.Random(seed), Registry.open(directory)
    digests = [load_bundle(path).digest for path in files]
    done: list[tuple[int, str, str | None]] = []
    for number in range(NUM_OPERATIONS):
        name, index = f"profile-{chosen.randrange(3)}", chosen.randrange(len(files))
        try:
            match chosen.randrange(6):
                case 0:
                    add(registry, files[index])
                case 1:
                    registry.remove_bundle(digests[index], actor="tester")
                case 2:
                    version = registry.delete_profile(name, actor="tester")
                    done.append((version.generation, name, None))
                case _:
                    # A strength of its own makes each put a change.
                    wanted = settings(digests[index], (seed * NUM_OPERATIONS + number) / 1000)
                    version = registry.put_profile(name, wanted, actor="tester")
                    done.append((version.generation, name, digests[index]))
        except RegistryError as error:
            assert error.code in ("bundle_missing", "in_use", "not_found"), error
    registry.close()
    return done


def test_many_processes_make_one_history(directory: Path, files: list[Path]) -> None:
    arguments = [(directory, files, seed) for seed in range(NUM_PROCESSES)]
    done = sorted(change for changes in in_processes(random_changes, arguments) for change in changes)
    assert len(done) > NUM_PROCESSES * NUM_OPERATIONS / 8
    check_sound(directory)
    registry = Registry.open(directory)
    snapshot = registry.snapshot()
    generations = [generation for generation, _, _ in done]
    assert len(set(generations)) == len(generations)
    last = {name: digest for _, name, digest in done}
    current = {name: versions[0].settings.bundle for name, versions in snapshot.profiles.items()}
    assert current == {name: digest for name, digest in last.items() if digest is not None}
    with sqlite3.connect(directory / "registry.sqlite") as connection:
        recorded = [row[0] for row in connection.execute("SELECT generation FROM changes ORDER BY generation")]
        assert recorded == list(range(1, snapshot.generation + 1))
        made = connection.execute("SELECT generation FROM versions ORDER BY generation").fetchall()
        assert [row[0] for row in made] == generations
    connection.close()
    assert {path.stem for path in (directory / "bundles").iterdir()} == {
        digest.removeprefix("sha256:") for digest in snapshot.bundles
    }
    registry.close()


def compete(directory: Path, digest: str, expected: int, number: int) -> int | None:
    registry = Registry.open(directory)
    try:
        wanted = settings(digest, number / 10)
        return registry.put_profile("calm", wanted, actor="tester", if_match=expected).generation
    except PreconditionFailed:
        return None
    finally:
        registry.close()


def test_one_of_many_wins_with_the_same_precondition(directory: Path, files: list[Path]) -> None:
    registry = Registry.open(directory)
    digest = add(registry, files[0]).digest
    generation = registry.put_profile("calm", settings(digest, 2.0), actor="tester").generation
    results = in_processes(compete, [(directory, digest, generation, number) for number in range(NUM_PROCESSES)])
    assert sorted(results, key=str) == [generation + 1] + [None] * (NUM_PROCESSES - 1)
    winner = registry.snapshot().current("calm")
    assert winner.generation == generation + 1
    assert winner.settings.strength == results.index(generation + 1) / 10
    registry.close()


def put_and_join(directory: Path, digest: str) -> None:
    registry = Registry.open(directory)
    registry.put_profile("calm", settings(digest, 0.5), actor="tester")
    registry.members.hold("instance", digest, "checksum")
    registry.close()


def test_changes_of_another_process_are_seen(directory: Path, files: list[Path]) -> None:
    registry = Registry.open(directory)
    digest = add(registry, files[0]).digest
    before, snapshot = registry.changed(), registry.snapshot()
    assert registry.changed() == before
    in_processes(put_and_join, [(directory, digest)])
    after = registry.changed()
    assert after[0] == before[0] + 1
    assert after[1] != before[1]
    assert snapshot.current("calm") is None
    assert registry.snapshot().current("calm").settings.strength == 0.5
    registry.close()


def die(*_: Any, **__: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def die_at(registry: Registry, statement: str) -> None:
    """Die when SQLite begins a statement, before it has any effect."""
    registry._database._connection.set_trace_callback(lambda text: die() if text.startswith(statement) else None)


# Where a process dies while it adds a bundle, by what it does next.
ADD_POINTS: dict[str, Callable[[Registry, pytest.MonkeyPatch], None]] = {
    "write": lambda _, patch: patch.setattr("shutil.copyfile", die),
    "fsync": lambda _, patch: patch.setattr("os.fsync", die),
    "rename": lambda _, patch: patch.setattr("os.replace", die),
    "fsync of the folder": lambda registry, patch: patch.setattr(registry.store, "_sync_folder", die),
    "begin": lambda registry, _: die_at(registry, "BEGIN IMMEDIATE"),
    "record": lambda registry, _: die_at(registry, "INSERT INTO bundles"),
    "count": lambda registry, _: die_at(registry, "INSERT INTO changes"),
    "commit": lambda registry, _: die_at(registry, "COMMIT"),
}
PUT_POINTS = ("BEGIN IMMEDIATE", "INSERT INTO changes", "INSERT INTO versions", "INSERT INTO profiles", "COMMIT")
REMOVE_POINTS = ("DELETE FROM bundles", "INSERT INTO changes", "COMMIT")


def killed(work: Callable[[], Any]) -> None:
    process = FORK.Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("point", ADD_POINTS)
def test_a_kill_while_adding(directory: Path, files: list[Path], point: str) -> None:
    registry = Registry.open(directory)
    old = add(registry, files[0]).digest
    registry.put_profile("calm", settings(old), actor="tester")
    before = registry.snapshot()

    def work() -> None:
        mine = Registry.open(directory)
        ADD_POINTS[point](mine, pytest.MonkeyPatch())
        add(mine, files[1])

    killed(work)
    assert registry.snapshot() == before
    assert registry.verify() == []
    new = add(registry, files[1]).digest
    assert registry.snapshot().bundles.keys() == {old, new}
    registry.close()
    check_sound(directory)


def test_a_kill_after_the_commit(directory: Path, files: list[Path]) -> None:
    def work() -> None:
        mine = Registry.open(directory)
        mine.put_profile("calm", settings(add(mine, files[0]).digest), actor="tester")
        die()

    killed(work)
    check_sound(directory)
    registry = Registry.open(directory)
    assert registry.generation() == 2
    assert registry.snapshot().current("calm").settings == settings(load_bundle(files[0]).digest)
    assert registry.store.load(load_bundle(files[0]).digest)
    registry.close()


@pytest.mark.parametrize("point", PUT_POINTS)
def test_a_kill_while_putting(directory: Path, files: list[Path], point: str) -> None:
    registry = Registry.open(directory)
    old, new = (add(registry, path).digest for path in files[:2])
    registry.put_profile("calm", settings(old), actor="tester")
    before = registry.snapshot()
    registry.close()

    def work() -> None:
        mine = Registry.open(directory)
        die_at(mine, point)
        mine.put_profile("calm", settings(new), actor="tester")

    killed(work)
    check_sound(directory)
    registry = Registry.open(directory)
    assert registry.snapshot() == before
    assert registry.put_profile("calm", settings(new), actor="tester").generation == before.generation + 1
    registry.close()


@pytest.mark.parametrize("point", [*REMOVE_POINTS, "file"])
def test_a_kill_while_removing(directory: Path, files: list[Path], point: str) -> None:
    registry = Registry.open(directory)
    digest = add(registry, files[0]).digest
    registry.close()

    def work() -> None:
        mine = Registry.open(directory)
        if point == "file":
            mine.discard = die  # type: ignore[method-assign]
        else:
            die_at(mine, point)
        mine.remove_bundle(digest, actor="tester")

    killed(work)
    check_sound(directory)
    registry = Registry.open(directory)
    assert (digest in registry.snapshot().bundles) == (point != "file")
    assert add(registry, files[0]).digest == digest
    assert registry.verify() == []
    registry.close()


def test_what_the_dead_held_does_not_outlive_them(directory: Path) -> None:
    def work() -> None:
        mine = Registry.open(directory)
        member = mine.members.join("instance", os.getpid())
        mine.members.beat(member, observed=0, pins=(), state="ready")
        mine.members.hold("instance", "key", "checksum")
        die()

    killed(work)
    # As after a loss of power, which this file does not survive.
    (directory / "runtime.sqlite").write_bytes(b"not a database at all" * 1000)
    registry = Registry.open(directory)
    assert registry.members.list() == []
    assert registry.members.holdings("instance") == {}
    member = registry.members.join("other", os.getpid())
    again = Registry.open(directory)
    assert [row.member for row in again.members.list()] == [member]
    again.close()
    registry.close()


# The tables of schema 1 as they were released, and one row of each kind.
SCHEMA_1 = """
CREATE TABLE changes (generation INTEGER PRIMARY KEY, action TEXT NOT NULL, target TEXT NOT NULL,
    actor TEXT NOT NULL, at TEXT NOT NULL);
CREATE TABLE bundles (digest TEXT PRIMARY KEY, num_bytes INTEGER NOT NULL, manifest TEXT NOT NULL,
    added_at TEXT NOT NULL, added_by TEXT NOT NULL, source TEXT NOT NULL, signer TEXT, is_draining INTEGER NOT NULL);
CREATE TABLE versions (generation INTEGER PRIMARY KEY REFERENCES changes (generation), name TEXT NOT NULL,
    restored_from INTEGER REFERENCES versions (generation), bundle TEXT, settings TEXT,
    CHECK ((bundle IS NULL) = (settings IS NULL)));
CREATE INDEX versions_by_name ON versions (name, generation);
CREATE INDEX versions_by_bundle ON versions (bundle);
CREATE TABLE profiles (name TEXT PRIMARY KEY, generation INTEGER NOT NULL REFERENCES versions (generation),
    bundle TEXT NOT NULL REFERENCES bundles (digest));
CREATE INDEX profiles_by_bundle ON profiles (bundle);
PRAGMA user_version = 1;
"""
SETTINGS_1 = (
    '{"bundle": "%s", "strength": 0.5, "maximum_strength": 2.0, "scope": "prompt", "layers": [1], "exclude": '
    '["reasoning"], "allowed_keys": ["a"], "description": "old"}'
)


def write_schema_1(directory: Path, file: Path) -> str:
    bundle = load_bundle(file)
    (directory / "bundles").mkdir(parents=True, mode=0o700)
    directory.chmod(0o700)
    shutil.copyfile(file, directory / "bundles" / f"{bundle.digest.removeprefix('sha256:')}.safetensors")
    connection = sqlite3.connect(directory / "registry.sqlite")
    connection.executescript(SCHEMA_1)
    at, manifest = "2026-01-02T03:04:05.000006+00:00", to_metadata(bundle.manifest)["manifest"]
    row = (bundle.digest, bundle.num_bytes, manifest, at, "root", "file", None, 0)
    connection.execute("INSERT INTO bundles VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
    for generation, action, target in ((1, "bundle_add", bundle.digest), (2, "put", "calm")):
        connection.execute("INSERT INTO changes VALUES (?, ?, ?, 'root', ?)", (generation, action, target, at))
    version = ("calm", bundle.digest, SETTINGS_1 % bundle.digest)
    connection.execute("INSERT INTO versions VALUES (2, ?, NULL, ?, ?)", version)
    connection.execute("INSERT INTO profiles VALUES ('calm', 2, ?)", (bundle.digest,))
    connection.commit()
    connection.close()
    return bundle.digest


def check_schema_1(registry: Registry, digest: str) -> None:
    current = registry.snapshot().current("calm")
    assert (current.generation, current.actor, current.at.isoformat()) == (
        2,
        "root",
        "2026-01-02T03:04:05.000006+00:00",
    )
    assert current.settings == ProfileSettings(
        digest, 0.5, 2.0, Scope.PROMPT, (1,), exclude=("reasoning",), allowed_keys=("a",), description="old"
    )
    assert registry.verify() == []
    assert registry.put_profile("calm", settings(digest), actor="tester").generation == 3


def test_schema_1_is_read(directory: Path, files: list[Path]) -> None:
    digest = write_schema_1(directory, files[0])
    registry = Registry.open(directory)
    check_schema_1(registry, digest)
    registry.close()


def test_an_old_schema_is_migrated(directory: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    digest = write_schema_1(directory, files[0])

    def extend(connection: sqlite3.Connection) -> None:
        connection.execute("ALTER TABLE profiles ADD COLUMN colour TEXT NOT NULL DEFAULT 'grey'")

    def fail(connection: sqlite3.Connection) -> None:
        connection.execute("DROP TABLE profiles")
        connection.execute("DROP TABLE nonesuch")

    before = Registry.open(directory)
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, extend))
    with pytest.raises(RegistryError, match="in use") as error:
        Registry.open(directory)
    assert error.value.code is RegistryErrorCode.IN_USE
    before.close()

    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS[:-1], fail))
    with pytest.raises(RegistryError, match="no such table") as error:
        Registry.open(directory)
    assert error.value.code is RegistryErrorCode.IO

    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS[:-1], extend))
    registry = Registry.open(directory)
    connection = registry._database._connection
    assert connection.execute("SELECT colour FROM profiles").fetchall() == [("grey",)]
    assert schema.version(connection, "main") == 2
    check_schema_1(registry, digest)
    registry.close()


@pytest.mark.parametrize("name", ["registry", "runtime"])
def test_a_newer_schema_is_refused(directory: Path, name: str) -> None:
    first = Registry.open(directory)
    connection = sqlite3.connect(directory / f"{name}.sqlite")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(RegistryError, match="schema 99") as error:
        Registry.open(directory)
    assert error.value.code is RegistryErrorCode.NEWER_SCHEMA
    first.close()


def test_a_foreign_file_is_refused(directory: Path) -> None:
    directory.mkdir(mode=0o700)
    (directory / "registry.sqlite").write_bytes(b"something else entirely" * 100)
    with pytest.raises(RegistryError, match="not a database") as error:
        Registry.open(directory)
    assert error.value.code is RegistryErrorCode.IO
    assert (directory / "registry.sqlite").read_bytes() == b"something else entirely" * 100


def test_a_writer_that_hangs_is_named(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.registry.database.BUSY_TIMEOUT_S", 0.05)
    registry = Registry.open(directory)
    other = sqlite3.connect(directory / "registry.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(RegistryError) as error:
        registry.members.join("instance", 1)
    assert error.value.code is RegistryErrorCode.LOCKED
    assert registry.generation() == 0
    other.execute("ROLLBACK")
    other.close()
    registry.members.join("instance", 1)
    registry.close()
