"""The bundle root: names stay inside it, whatever they spell and whatever changes on disk meanwhile."""

import hashlib
import os
import socket
import threading
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from server.sources.errors import SourceError, SourceErrorCode
from server.sources.names import MAX_PART_BYTES, MAX_PARTS, name_parts
from server.sources.root import MAX_LISTED, BundleRoot

SECRET, CONTENT = b"secret", b"bundle"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A root with a few bundles, beside a file that must stay out of reach."""
    (tmp_path / "secret.safetensors").write_bytes(SECRET)
    root = tmp_path / "root"
    (root / "team" / "deep").mkdir(parents=True)
    for name in ("a.safetensors", "team/b.safetensors", "team/deep/größe 1.safetensors"):
        (root / name).write_bytes(CONTENT)
    return root


def _refused(root: Path, name: str) -> SourceErrorCode:
    target = root.parent / "copy"
    with pytest.raises(SourceError) as caught:
        BundleRoot(root).fetch(name, target, 1000)
    assert not target.exists()
    assert str(root.parent) not in str(caught.value)
    return caught.value.code


@pytest.mark.parametrize("name", ["a.safetensors", "team/b.safetensors", "team/deep/größe 1.safetensors"])
def test_a_file_inside_is_copied_with_its_digest(folder: Path, name: str) -> None:
    received = BundleRoot(folder).fetch(name, folder.parent / "copy", len(CONTENT))
    assert received == (len(CONTENT), f"sha256:{hashlib.sha256(CONTENT).hexdigest()}")
    assert (folder.parent / "copy").read_bytes() == CONTENT


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        ".safetensors",
        "/a.safetensors",
        "//a.safetensors",
        "../secret.safetensors",
        "team/../a.safetensors",
        "team/../../secret.safetensors",
        "./a.safetensors",
        "team//b.safetensors",
        "team/b.safetensors/",
        "team\\b.safetensors",
        "a.safetensors\0",
        "a\0.safetensors",
        "a\n.safetensors",
        "a\u202e.safetensors",
        "a\u200b.safetensors",
        "a\ud800.safetensors",
        unicodedata.normalize("NFD", "größe.safetensors"),
        ".hidden.safetensors",
        "team/.git/b.safetensors",
        "a.bin",
        "a.safetensors.txt",
        "x" * 2000 + ".safetensors",
        "x" * MAX_PART_BYTES + ".safetensors",
        "ö" * 130 + ".safetensors",
        "/".join(["ö" * 100] * 12) + ".safetensors",
        "d/" * MAX_PARTS + "a.safetensors",
    ],
)
def test_a_name_of_another_form_is_refused_unread(folder: Path, name: str) -> None:
    assert _refused(folder, name) == SourceErrorCode.BAD_NAME


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.one_of(
        st.text(max_size=40),
        st.lists(
            st.sampled_from(["..", ".", "", "team", "deep", "secret", "root", "~", "%2e%2e", "\\"]), max_size=7
        ).map("/".join),
        st.text(alphabet="./\\a\0é", max_size=12),
    ).flatmap(lambda text: st.sampled_from([text, f"{text}.safetensors", f"{text}/secret.safetensors"]))
)
@example("../secret.safetensors")
@example("team/../../secret.safetensors")
def test_no_name_reaches_outside(folder: Path, name: str) -> None:
    target = folder.parent / "copy"
    try:
        BundleRoot(folder).fetch(name, target, 1000)
    except SourceError as error:
        assert error.code in {SourceErrorCode.BAD_NAME, SourceErrorCode.NOT_FOUND}
        assert str(error).isprintable()
        assert len(str(error)) < 400
        assert not target.exists()
    else:
        assert target.read_bytes() == CONTENT
        target.unlink()


@given(st.text(max_size=60).map(lambda text: unicodedata.normalize("NFC", f"{text}.safetensors")))
def test_an_accepted_name_is_the_path_it_looks_like(name: str) -> None:
    try:
        parts = name_parts(name)
    except SourceError:
        return
    assert "/".join(parts) == name == os.path.normpath(name)
    assert all(part and part[0] != "." and part.isprintable() for part in parts)


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("inside", [True, False])
def test_a_symbolic_link_anywhere_is_not_followed(folder: Path, position: int, inside: bool) -> None:
    name = "team/deep/c.safetensors"
    (folder / name).write_bytes(CONTENT)
    parts = Path(name).parts
    original = folder.joinpath(*parts[: position + 1])
    moved = (folder if inside else folder.parent) / "moved"
    original.rename(moved)
    original.symlink_to(moved)
    assert (folder / name).read_bytes() == CONTENT
    assert _refused(folder, name) == SourceErrorCode.NOT_FOUND
    assert name not in BundleRoot(folder).list()


def test_links_to_links_absolute_links_and_loops_are_not_followed(folder: Path) -> None:
    (folder / "one.safetensors").symlink_to("/etc/hostname")
    (folder / "two.safetensors").symlink_to("one.safetensors")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    (folder / "up").symlink_to("..")
    (folder / "self").symlink_to(".")
    for name in ("one", "two", "loop", "up/secret", "self/a", "up/root/a"):
        assert _refused(folder, f"{name}.safetensors") == SourceErrorCode.NOT_FOUND
    assert BundleRoot(folder).list() == ("a.safetensors", "team/b.safetensors", "team/deep/größe 1.safetensors")


def test_the_root_itself_may_be_a_link_and_may_move(folder: Path) -> None:
    link = folder.parent / "link"
    link.symlink_to(folder)
    root = BundleRoot(link)
    assert "a.safetensors" in root.list()
    newer = folder.parent / "newer"
    newer.mkdir()
    (newer / "n.safetensors").write_bytes(CONTENT)
    link.unlink()
    link.symlink_to(newer)
    assert root.list() == ("n.safetensors",)
    newer.rename(folder.parent / "gone")
    with pytest.raises(SourceError) as caught:
        root.fetch("n.safetensors", folder.parent / "copy", 1000)
    assert caught.value.code == SourceErrorCode.UNAVAILABLE


def test_a_part_that_becomes_a_link_between_two_opens_is_not_followed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = folder.parent / "outside"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep" / "c.safetensors").write_bytes(SECRET)
    (folder / "team/deep/c.safetensors").write_bytes(CONTENT)
    original = os.open
    opened: list[object] = []

    def swapping_open(path: object, *args: object, **options: object) -> int:
        descriptor: int = original(path, *args, **options)  # type: ignore[arg-type]
        opened.append(path)
        if path == "team":
            (folder / "team").rename(folder / "was")
            (folder / "team").symlink_to(outside)
        return descriptor

    monkeypatch.setattr("server.sources.root.os.open", swapping_open)
    received = BundleRoot(folder).fetch("team/deep/c.safetensors", folder.parent / "copy", 1000)
    assert "team" in opened
    assert received.num_bytes == len(CONTENT)
    assert (folder.parent / "copy").read_bytes() == CONTENT


def test_a_thread_that_swaps_a_folder_and_a_link_never_leaks(folder: Path) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "b.safetensors").write_bytes(SECRET)
    (folder / "link").symlink_to(outside)
    stop = threading.Event()

    def swap() -> None:
        spare = folder / "spare"
        while not stop.is_set():
            for first, second in (("team", "link"), ("link", "team")):
                (folder / first).rename(spare)
                (folder / second).rename(folder / first)
                spare.rename(folder / second)

    thread = threading.Thread(target=swap)
    thread.start()
    root, outcomes = BundleRoot(folder), set()
    try:
        for number in range(1500):
            target = folder.parent / f"copy{number}"
            try:
                root.fetch("team/b.safetensors", target, 1000)
                outcomes.add(target.read_bytes())
            except SourceError as error:
                outcomes.add(error.code)
    finally:
        stop.set()
        thread.join()
    assert outcomes <= {CONTENT, SourceErrorCode.NOT_FOUND}
    assert CONTENT in outcomes


def test_only_regular_files_are_read_and_nothing_waits(folder: Path) -> None:
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "folder.safetensors").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket.safetensors"))
        for name in ("pipe", "folder", "socket"):
            assert _refused(folder, f"{name}.safetensors") == SourceErrorCode.NOT_A_FILE
    assert len(BundleRoot(folder).list()) == 3


def test_a_device_is_refused(folder: Path) -> None:
    try:
        os.mknod(folder / "zero.safetensors", 0o20666, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("making a device node needs privileges")
    try:
        assert _refused(folder, "zero.safetensors") in {SourceErrorCode.NOT_A_FILE, SourceErrorCode.UNREADABLE}
    finally:
        (folder / "zero.safetensors").unlink()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_told_apart(folder: Path) -> None:
    (folder / "a.safetensors").chmod(0)
    assert _refused(folder, "a.safetensors") == SourceErrorCode.UNREADABLE


@pytest.mark.parametrize("name", ["absent.safetensors", "absent/a.safetensors", "a.safetensors/b.safetensors"])
def test_an_absent_file_is_not_found(folder: Path, name: str) -> None:
    assert _refused(folder, name) == SourceErrorCode.NOT_FOUND


def test_size_is_bounded_below_and_above(folder: Path) -> None:
    (folder / "empty.safetensors").touch()
    assert _refused(folder, "empty.safetensors") == SourceErrorCode.EMPTY
    os.truncate(folder / "a.safetensors", 1 << 40)
    assert _refused(folder, "a.safetensors") == SourceErrorCode.TOO_LARGE


def test_a_file_that_grows_while_it_is_copied_is_cut_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.read

    def growing_read(descriptor: int, num_bytes: int) -> bytes:
        with (folder / "a.safetensors").open("ab") as stream:
            stream.write(CONTENT)
        return original(descriptor, num_bytes)

    monkeypatch.setattr("server.sources.root.os.read", growing_read)
    assert _refused(folder, "a.safetensors") == SourceErrorCode.TOO_LARGE


def test_no_descriptor_is_left_behind(folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    root = BundleRoot(folder)
    for name in ("a.safetensors", "team/b.safetensors", "absent.safetensors", "team/absent/b.safetensors", "team"):
        target = folder.parent / "copy"
        try:
            root.fetch(name, target, 1000)
            target.unlink()
        except SourceError:
            pass
        root.list()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_list_is_bounded_and_each_name_can_be_fetched(folder: Path) -> None:
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.safetensors").write_bytes(CONTENT)
    (folder / "notes.txt").write_bytes(CONTENT)
    (folder / os.fsdecode(b"\xff.safetensors")).write_bytes(CONTENT)
    deep = folder.joinpath(*["d"] * MAX_PARTS)
    deep.mkdir(parents=True)
    (deep / "x.safetensors").write_bytes(CONTENT)
    root = BundleRoot(folder)
    names = root.list()
    assert names == ("a.safetensors", "team/b.safetensors", "team/deep/größe 1.safetensors")
    for number, name in enumerate(names):
        root.fetch(name, folder.parent / f"copy{number}", 1000)
    for number in range(MAX_LISTED + 5):
        (folder / f"n{number}.safetensors").touch()
    assert len(root.list()) == MAX_LISTED


@pytest.mark.parametrize("kind", ["absent", "file"])
def test_a_root_that_is_no_directory_is_refused_at_the_start(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "root"
    if kind == "file":
        path.touch()
    with pytest.raises(SourceError, match="--steering-bundle-root") as caught:
        BundleRoot(path)
    assert caught.value.code == SourceErrorCode.UNAVAILABLE
