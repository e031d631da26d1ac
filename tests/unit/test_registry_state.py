"""The registry in one process: generations, preconditions, what is wanted, what is removed, what is damaged."""

import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from artifacts.bundle import Bundle, load_bundle
from artifacts.manifest import Scope
from server.registry.errors import NotHeld, PreconditionFailed, RegistryError, RegistryErrorCode
from server.registry.export import open_export
from server.registry.records import ProfileSettings, parse_key, program_key
from server.registry.registry import Registry
from server.registry.store import ABANDONED_S


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    opened = Registry.open(tmp_path / "registry")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def files(make_bundle: Callable[..., Path]) -> list[Path]:
    return [make_bundle(f"registry-{seed}", [1, 2], seed) for seed in range(4)]


@pytest.fixture
def bundles(registry: Registry, files: list[Path]) -> list[Bundle]:
    return [add(registry, path) for path in files]


def keep(registry: Registry, path: Path) -> Bundle:
    bundle = load_bundle(path)
    copy = registry.store.incoming()
    shutil.copyfile(path, copy)
    registry.store.keep(copy, bundle.digest)
    return bundle


def add(registry: Registry, path: Path) -> Bundle:
    bundle = keep(registry, path)
    registry.add_bundle(bundle, actor="tester", source="test")
    return bundle


def settings(bundle: Bundle, strength: float = 1.0, layers: tuple[int, ...] | None = None) -> ProfileSettings:
    return ProfileSettings(bundle.digest, strength, 4.0, Scope.ALL, layers, ("tool_calls",), ("team-*",), "text")


def put(registry: Registry, name: str, wanted: ProfileSettings) -> int:
    return registry.put_profile(name, wanted, actor="tester").generation


def refused(code: RegistryErrorCode) -> "pytest.RaisesExc[RegistryError]":
    return pytest.raises(RegistryError, check=lambda error: error.code is code)


def test_program_keys() -> None:
    digest = f"sha256:{'a' * 64}"
    assert program_key(digest, None) == digest
    assert program_key(digest, (5, 2, 5)) == f"{digest}+2,5"
    assert parse_key(f"{digest}+2,5") == (digest, (2, 5))
    assert parse_key(digest) == (digest, None)
    for wrong in ("", "sha256:aa", f"{digest}+", f"{digest}+2,", f"{digest}\n", f"{digest}+²"):
        with pytest.raises(ValueError, match="program key"):
            parse_key(wrong)


def test_every_durable_change_adds_one(registry: Registry, files: list[Path]) -> None:
    first, second = add(registry, files[0]), add(registry, files[1])
    assert registry.generation() == 2
    assert registry.add_bundle(first, actor="other", source="again")[1] is False
    assert registry.generation() == 2
    assert put(registry, "calm", settings(first)) == 3
    assert put(registry, "calm", settings(first)) == 3
    assert put(registry, "calm", settings(second)) == 4
    registry.set_draining(first.digest, True, actor="tester")
    registry.set_draining(first.digest, True, actor="tester")
    assert registry.generation() == 5
    registry.remove_bundle(first.digest, actor="tester")
    assert registry.delete_profile("calm", actor="tester").generation == 7
    registry.members.join("instance", 1)
    assert registry.generation() == registry.changed()[0] == 7


def test_what_was_put_is_read(registry: Registry, bundles: list[Bundle]) -> None:
    wanted = settings(bundles[0], 0.1, (2, 1, 2))
    version = registry.put_profile("calm", wanted, actor="tester")
    registry.close()
    again = Registry.open(registry.directory)
    found = again.snapshot().current("calm")
    assert found == version
    assert found.settings == wanted
    assert found.settings.layers == (1, 2)
    record = again.snapshot().bundles[bundles[0].digest]
    assert (record.manifest, record.num_bytes, record.added_by) == (bundles[0].manifest, bundles[0].num_bytes, "tester")
    assert again.store.load(bundles[0].digest).digest == bundles[0].digest
    again.close()


def test_preconditions(registry: Registry, bundles: list[Bundle]) -> None:
    with pytest.raises(PreconditionFailed) as missing:
        registry.put_profile("calm", settings(bundles[0]), actor="tester", if_match=3)
    assert missing.value.found is None
    first = registry.put_profile("calm", settings(bundles[0]), actor="tester", must_be_new=True)
    for wrong in ({"must_be_new": True}, {"if_match": first.generation - 1}):
        with pytest.raises(PreconditionFailed) as stale:
            registry.put_profile("calm", settings(bundles[1]), actor="tester", **wrong)
        assert stale.value.found == first.generation
    with pytest.raises(PreconditionFailed):
        registry.delete_profile("calm", actor="tester", if_match=first.generation + 1)
    assert registry.snapshot().current("calm") == first
    second = registry.put_profile("calm", settings(bundles[1]), actor="tester", if_match=first.generation)
    assert registry.delete_profile("calm", actor="tester", if_match=second.generation).settings is None
    with refused(RegistryErrorCode.NOT_FOUND):
        registry.delete_profile("calm", actor="tester")


def test_no_profile_names_what_is_absent_or_draining(
    registry: Registry, bundles: list[Bundle], files: list[Path]
) -> None:
    first, second = bundles[:2]
    registry.set_draining(first.digest, True, actor="tester")
    for absent in (first, replace(first, digest=f"sha256:{'0' * 64}")):
        with refused(RegistryErrorCode.BUNDLE_MISSING):
            put(registry, "calm", settings(absent))
    add(registry, files[0])
    put(registry, "calm", settings(first))
    for change in (
        lambda: registry.set_draining(first.digest, True, actor="tester"),
        lambda: registry.remove_bundle(first.digest, actor="tester"),
    ):
        with refused(RegistryErrorCode.IN_USE):
            change()
    put(registry, "calm", settings(second))
    registry.remove_bundle(first.digest, actor="tester")
    assert not registry.store.has(first.digest)
    assert registry.has_ever_named("calm", first.digest)
    assert not registry.has_ever_named("other", first.digest)
    with refused(RegistryErrorCode.NOT_FOUND):
        registry.remove_bundle(first.digest, actor="tester")
    with refused(RegistryErrorCode.BUNDLE_MISSING):
        registry.add_bundle(first, actor="tester", source="no file")


def test_rollback_goes_further_back_each_time(registry: Registry, bundles: list[Bundle]) -> None:
    one, two, three = (put(registry, "calm", settings(bundle)) for bundle in bundles[:3])

    def roll_back(to: int | None = None) -> int | None:
        target = registry.rollback_target("calm", to)
        restored = target.restored_from or target.generation
        registry.put_profile("calm", target.settings, actor="tester", action="rollback", restored_from=restored)
        return restored

    assert roll_back() == two
    assert roll_back() == one
    with refused(RegistryErrorCode.NOT_FOUND):
        registry.rollback_target("calm", None)
    assert roll_back(three) == three
    assert roll_back() == two
    deleted = registry.delete_profile("calm", actor="tester").generation
    with refused(RegistryErrorCode.NOT_FOUND):
        registry.rollback_target("calm", deleted)
    assert registry.rollback_target("calm", None).settings == settings(bundles[1])
    for name, to in (("other", None), ("calm", 10**9)):
        with refused(RegistryErrorCode.NOT_FOUND):
            registry.rollback_target(name, to)


def test_history_pages(registry: Registry, bundles: list[Bundle]) -> None:
    made = [put(registry, "calm", settings(bundles[0], strength / 10)) for strength in range(5)]
    made.append(registry.delete_profile("calm", actor="tester").generation)
    newest = made[::-1]
    assert [version.generation for version in registry.history("calm")] == newest
    page = registry.history("calm", limit=2)
    assert [version.action for version in page] == ["delete", "put"]
    assert [each.generation for each in registry.history("calm", limit=2, before=page[-1].generation)] == newest[2:4]
    assert registry.history("other") == []
    assert "calm" not in registry.snapshot().profiles
    put(registry, "calm", settings(bundles[0]))
    assert len(registry.snapshot(3).profiles["calm"]) == 3


def test_keys_wanted(registry: Registry, bundles: list[Bundle]) -> None:
    one, two, three, unnamed = bundles
    for bundle in (one, two, three):
        put(registry, "calm", settings(bundle, layers=(1,)))
    put(registry, "gone", settings(one))
    registry.delete_profile("gone", actor="tester")
    member = registry.members.join("instance", 1)
    registry.members.intend(member, f"{one.digest}+2")

    snapshot = registry.snapshot()
    always = {f"{three.digest}+1", f"{one.digest}+2", unnamed.digest}
    assert snapshot.keys_needed() == {f"{three.digest}+1"}
    assert snapshot.keys_wanted(0) == always
    assert snapshot.keys_wanted(1) == always | {f"{two.digest}+1"}
    assert snapshot.keys_wanted(2) == always | {f"{two.digest}+1", f"{one.digest}+1"}

    registry.members.leave(member)
    registry.set_draining(unnamed.digest, True, actor="tester")
    registry.remove_bundle(two.digest, actor="tester")
    assert registry.snapshot().keys_wanted(2) == {f"{three.digest}+1", f"{one.digest}+1"}
    member = registry.members.join("instance", 1)
    coming = {two.digest, unnamed.digest}
    for digest in coming:
        registry.members.intend(member, digest)
    assert registry.snapshot().keys_wanted(0) == {f"{three.digest}+1"} | coming


def test_gc_keeps_what_somebody_goes_back_to(registry: Registry, bundles: list[Bundle]) -> None:
    one, two, three, unnamed = (bundle.digest for bundle in bundles)
    for bundle in bundles[:3]:
        put(registry, "calm", settings(bundle))
    member = registry.members.join("instance", 1)
    registry.members.hold("instance", one, "checksum")
    assert registry.gc(keep_history=1, dry_run=True) == [two, unnamed]
    assert registry.gc(keep_history=9, dry_run=True) == [unnamed]
    registry.members.intend(member, f"{two}+1")
    assert registry.gc(keep_history=1) == [unnamed]
    assert registry.generation() == 8
    registry.members.leave(member)
    assert registry.gc(keep_history=0) == [one, two]
    assert list(registry.snapshot().bundles) == [three]
    assert [path.stem for path in (registry.directory / "bundles").iterdir()] == [three.removeprefix("sha256:")]
    assert registry.verify() == []


def test_gc_removes_old_stray_files_only(registry: Registry, files: list[Path]) -> None:
    fresh, old = keep(registry, files[0]), keep(registry, files[1])
    abandoned, arriving = registry.store.incoming(), registry.store.incoming()
    for path in (abandoned, arriving):
        path.write_bytes(b"half")
    past = time.time() - ABANDONED_S - 1
    for path in (registry.store.path(old.digest), abandoned):
        os.utime(path, (past, past))
    registry.gc()
    assert registry.store.has(fresh.digest)
    assert not registry.store.has(old.digest)
    registry.close()
    Registry.open(registry.directory).close()
    assert arriving.exists()
    assert not abandoned.exists()


def test_a_file_kept_while_its_bundle_is_removed_stays(
    registry: Registry, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = add(registry, files[0])
    discard = registry.discard
    monkeypatch.setattr(registry, "discard", lambda *args: (keep(registry, files[0]), discard(*args)))
    registry.remove_bundle(bundle.digest, actor="tester")
    assert registry.store.has(bundle.digest)
    registry.add_bundle(bundle, actor="tester", source="test")
    assert registry.verify() == []


def test_only_a_file_without_a_record_is_discarded(registry: Registry, files: list[Path]) -> None:
    known, unknown = add(registry, files[0]), keep(registry, files[1])
    for bundle in (known, unknown):
        registry.discard(bundle.digest)
    assert registry.store.has(known.digest)
    assert not registry.store.has(unknown.digest)


def test_damage_is_found(registry: Registry, bundles: list[Bundle], files: list[Path]) -> None:
    cut, swapped, missing, _sound = bundles
    put(registry, "calm", settings(cut))
    for bundle, content in ((cut, files[0].read_bytes()[:-4]), (swapped, files[2].read_bytes())):
        path = registry.store.path(bundle.digest)
        path.unlink()
        path.write_bytes(content)
    registry.store.path(missing.digest).unlink()
    problems = dict(registry.verify())
    assert problems.keys() == {cut.digest, swapped.digest, missing.digest}
    assert f"its file is now {missing.digest}" in problems[swapped.digest]
    assert "its file is missing" in problems[missing.digest]
    for bundle in (cut, swapped, missing):
        with refused(RegistryErrorCode.STORE_DAMAGED):
            registry.store.load(bundle.digest)
    for path in files:
        keep(registry, path)
    assert registry.verify() == []


@pytest.mark.parametrize("size", [None, 0, 1])
def test_a_database_that_lost_its_content_is_not_a_new_one(
    registry: Registry, bundles: list[Bundle], size: int | None
) -> None:
    registry.close()
    database = registry.directory / "registry.sqlite"
    if size is None:
        database.unlink()
    else:
        os.truncate(database, size)
    with refused(RegistryErrorCode.IO) as caught:
        Registry.open(registry.directory)
    assert "restore it" in str(caught.value)


@pytest.mark.parametrize("digest", ["", "sha256:", "sha256:../../x", f"sha256:{'A' * 64}", f"sha256:{'a' * 64}\n"])
def test_no_name_leads_out_of_the_store(registry: Registry, digest: str) -> None:
    with refused(RegistryErrorCode.NOT_FOUND):
        registry.store.path(digest)


def test_export_holds_everything(registry: Registry, bundles: list[Bundle], tmp_path: Path) -> None:
    put(registry, "calm", settings(bundles[0], 0.3, (2,)))
    put(registry, "calm", settings(bundles[1], 0.4))
    target = tmp_path / "export.tar"
    target.write_bytes(b"old")
    registry.export(target)
    with open_export(target) as exported:
        assert exported.state.profiles == {"calm": settings(bundles[1], 0.4)}
        assert set(exported.state.bundles) == {bundle.digest for bundle in bundles}
        for bundle in bundles:
            with exported.open_bundle(bundle.digest) as file:
                assert file.read() == registry.store.path(bundle.digest).read_bytes()
    first = target.read_bytes()
    registry.export(target)
    assert target.read_bytes() == first
    registry.store.path(bundles[2].digest).unlink()
    with refused(RegistryErrorCode.STORE_DAMAGED):
        registry.export(target)
    assert target.read_bytes() == first
    assert list(tmp_path.glob(".*")) == []


def test_an_export_that_leads_out_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("{}")
    path = tmp_path / "bad.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("state.json")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        archive.addfile(link)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"generation": 1, "bundles": ["sha256:../x"], "profiles": {}}))
    for wrong in (path, folder, secret, tmp_path / "none.tar"):
        with refused(RegistryErrorCode.STORE_DAMAGED), open_export(wrong):
            pass


def test_the_directory_is_ours_alone(tmp_path: Path) -> None:
    Registry.open(tmp_path / "new").close()
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    for name in ("registry.sqlite", "incoming", "bundles", "locks"):
        assert (tmp_path / "new" / name).stat().st_mode & 0o077 == 0
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o770)
    with refused(RegistryErrorCode.UNSAFE_DIRECTORY):
        Registry.open(shared)
    file = tmp_path / "file"
    file.touch()
    for path in (file, tmp_path / "none", tmp_path):
        with refused(RegistryErrorCode.NOT_FOUND):
            Registry.open(path, create=False)
    assert not (tmp_path / "registry.sqlite").exists()


def test_not_held_names_the_servers(registry: Registry, bundles: list[Bundle]) -> None:
    member = registry.members.join("slow", 1)
    put(registry, "calm", settings(bundles[0]))
    registry.members.beat(member, observed=0, pins=(), state="ready")
    with pytest.raises(NotHeld) as error:
        put(registry, "calm", settings(bundles[1], layers=(2,)))
    assert error.value.instances == ("slow",)
    assert registry.snapshot().current("calm").settings == settings(bundles[0])
    registry.members.hold("slow", f"{bundles[1].digest}+2", "checksum")
    put(registry, "calm", settings(bundles[1], layers=(2,)))


def test_errors_of_sqlite_become_ours(registry: Registry, bundles: list[Bundle]) -> None:
    put(registry, "calm", settings(bundles[0]))
    generation = registry.generation()
    connection = registry._database._connection
    pages = connection.execute("PRAGMA main.page_count").fetchone()[0]
    connection.execute(f"PRAGMA main.max_page_count = {pages}")
    with refused(RegistryErrorCode.IO):
        for strength in range(200):
            put(registry, "calm", replace(settings(bundles[0], strength / 100), description="x" * 4000))
    before = registry.generation()
    with refused(RegistryErrorCode.IO):
        put(registry, "calm", replace(settings(bundles[0], 3.5), description="x" * 9000))
    assert registry.generation() == before >= generation
    connection.execute("PRAGMA main.max_page_count = 1000000")
    assert put(registry, "calm", settings(bundles[1])) == before + 1
