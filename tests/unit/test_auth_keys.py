"""Keys: who a request is from, the file of keys, and its rotation while the server runs."""

import argparse
import hashlib
import hmac
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.auth import keys as keys_module
from server.auth.identity import Key, hash_key
from server.auth.key_file import MAX_FILE_BYTES, MAX_KEYS, append_entry, make_entry, read_entries, read_keys
from server.auth.keys import ANONYMOUS, Identity, KeyRing, Role
from server.commands import key as key_command

OPS, READER, CLINIC = "ops-key-0123456789", "reader-key-0123456789", "clinic-key-0123456789"


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


ENTRIES: list[dict[str, Any]] = [
    {"name": "ops", "sha256": digest(OPS), "role": "write"},
    {"name": "reader", "key": READER, "role": "read"},
    {
        "name": "clinic",
        "sha256": digest(CLINIC),
        "role": "inference",
        "profiles": ["med-*", "careful"],
        "maximum_strength": 1.5,
    },
]


@pytest.fixture
def write_keys(tmp_path: Path) -> Callable[[object], Path]:
    """Replace the file of keys, as a rotation does: by another file, readable by its owner only."""

    def write(content: object) -> Path:
        path, temporary = tmp_path / "keys.yaml", tmp_path / "new"
        temporary.write_text(content if isinstance(content, str) else yaml.safe_dump({"keys": content}))
        temporary.chmod(0o600)
        temporary.replace(path)
        return path

    return write


def name_of(ring: KeyRing, key: str | None) -> str | None:
    identity = ring.identify(key)
    return None if identity is None else identity.name


def test_identifies_every_kind_of_key(write_keys: Callable[[object], Path]) -> None:
    ring = KeyRing.load(
        write_keys(ENTRIES), ["client-key-0123456789", "", "other-key-0123456789"], "root-key-0123456789"
    )
    assert ring.identify(OPS) == Identity("ops", Role.WRITE)
    assert ring.identify(READER) == Identity("reader", Role.READ)
    assert ring.identify(CLINIC) == Identity("clinic", Role.INFERENCE, ("med-*", "careful"), 1.5)
    assert ring.identify("client-key-0123456789") == Identity("api-key-1", Role.INFERENCE)
    assert ring.identify("other-key-0123456789") == Identity("api-key-2", Role.INFERENCE)
    assert ring.identify("root-key-0123456789") == Identity("admin", Role.WRITE)
    assert ring.has_any and ring.has_admin


@pytest.mark.parametrize("key", [None, "", OPS[:-1], OPS + "x", OPS.upper(), digest(OPS), "x" * 100_000, "\ud800", "é"])
def test_other_keys_are_nobody(write_keys: Callable[[object], Path], key: str | None) -> None:
    assert KeyRing.load(write_keys(ENTRIES)).identify(key) is None


def test_every_key_is_compared(write_keys: Callable[[object], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    ring = KeyRing.load(write_keys(ENTRIES), ["client-key-0123456789"])
    compared = []
    real = hmac.compare_digest

    def compare(left: bytes, right: bytes) -> bool:
        compared.append(right)
        return real(left, right)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for key in ("client-key-0123456789", OPS, CLINIC, "nobody"):
        compared.clear()
        ring.identify(key)
        assert len(compared) == 4
        assert all(len(right) == 32 for right in compared)


def test_no_key_text_stays_in_memory(write_keys: Callable[[object], Path]) -> None:
    ring = KeyRing.load(write_keys(ENTRIES), ["client-key-0123456789"], "root-key-0123456789")
    held = repr(vars(ring))
    for key in (OPS, READER, CLINIC, "client-key-0123456789", "root-key-0123456789"):
        assert key not in held


def test_allow_list() -> None:
    clinic = Identity("clinic", Role.INFERENCE, ("med-*", "careful"))
    assert [clinic.may_use(name) for name in ("med-1", "careful", "carefully", "Med-1", "x-med-1")] == [
        *(True, True),
        *(False, False, False),
    ]
    assert ANONYMOUS.may_use("anything")
    assert not Identity("none", Role.INFERENCE, ()).may_use("anything")


def test_nobody_needs_a_key_where_there_is_none() -> None:
    ring = KeyRing.load(None, ["", ""], "")
    assert not ring.has_any
    assert not ring.has_admin
    assert not ring.is_due()


@pytest.mark.parametrize("content", ["keys:\n", "keys: []\n"])
def test_a_file_without_keys_lets_nobody_in(write_keys: Callable[[object], Path], content: str) -> None:
    ring = KeyRing.load(write_keys(content))
    assert ring.has_any
    assert not ring.has_admin


def test_keys_expire() -> None:
    now = datetime(2030, 1, 1, tzinfo=UTC)
    keys = [Key(hash_key(OPS), Identity("ops", Role.WRITE), now)]
    ring = KeyRing(keys, now=lambda: now)
    assert name_of(ring, OPS) == "ops"
    late = KeyRing(keys, now=lambda: now + timedelta(microseconds=1))
    assert late.identify(OPS) is None
    assert not late.has_admin
    assert late.has_any, "a server whose keys have all expired is not an open one"


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2030-01-31", datetime(2030, 1, 31, 23, 59, 59, 999999, tzinfo=UTC)),
        ("'2030-01-31'", datetime(2030, 1, 31, 23, 59, 59, 999999, tzinfo=UTC)),
        ("2030-01-31T12:00:00Z", datetime(2030, 1, 31, 12, tzinfo=UTC)),
        ("2030-01-31 12:00:00", datetime(2030, 1, 31, 12, tzinfo=UTC)),
        ("'2030-01-31T12:00'", datetime(2030, 1, 31, 12, tzinfo=UTC)),
        ("2030-01-31T12:00:00+02:00", datetime(2030, 1, 31, 10, tzinfo=UTC)),
    ],
)
def test_times(write_keys: Callable[[object], Path], text: str, moment: datetime) -> None:
    path = write_keys(f"keys:\n- {{name: a, role: read, sha256: {digest('a')}, not_after: {text}}}\n")
    assert read_keys(path)[0].not_after == moment


def changed(**fields: object) -> list[dict[str, Any]]:
    return [{"name": "a", "sha256": digest("a"), "role": "inference"} | fields]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (changed(role="root"), ["key 1", "role", "'inference', 'read' or 'write'"]),
        (changed(role=None), ["role"]),
        (changed(key="a" * 20), ["exactly one of key and sha256"]),
        ([{"name": "a", "role": "read"}], ["exactly one of key and sha256"]),
        ([{"name": "a", "role": "read", "key": "two words"}], ["visible ASCII"]),
        ([{"name": "a", "role": "read", "key": ""}], ["visible ASCII"]),
        (changed(sha256="ab"), ["sha256"]),
        (changed(sha256=digest("a") + "\n"), ["sha256"]),
        (changed(sha256=digest("a").upper()), ["sha256"]),
        (changed(name=""), ["name"]),
        (changed(name="a\n"), ["name"]),
        (changed(name="a b"), ["name"]),
        (changed(name=7), ["name"]),
        (changed(roll="read"), ["roll"]),
        (changed(role="write", profiles=["x"]), ["belong to role inference"]),
        (changed(role="read", maximum_strength=1.0), ["belong to role inference"]),
        (changed(profiles="med"), ["profiles"]),
        (changed(profiles=[""]), ["profiles.0"]),
        (changed(maximum_strength=0), ["maximum_strength"]),
        (changed(maximum_strength=float("nan")), ["maximum_strength"]),
        (changed(maximum_strength=float("inf")), ["maximum_strength"]),
        (changed(maximum_strength=True), ["maximum_strength"]),
        (changed(maximum_strength="1"), ["maximum_strength"]),
        (changed(not_after="soon"), ["not_after", "'soon'"]),
        (changed(not_after=5), ["not_after", "5"]),
        ("keys:\n- {name: a, role: read, not_after: 2030-13-01}", ["holds a value that cannot be"]),
        (changed() + changed(sha256=digest("b")), ["Two keys are called 'a'"]),
        (changed() + changed(name="b"), ["'a' and 'b' are the same key"]),
        (changed() + changed(name="b", sha256=None, key="a"), ["'a' and 'b' are the same key"]),
        ("keys: [", ["line"]),
        ("- 1", ["of the form"]),
        ("", ["of the form"]),
        ("keys: 5", ["of the form"]),
        ("keys: []\nkey: []", ["of the form"]),
        ("keys: []\nkeys: []", ["'keys' is given twice"]),
        ("keys:\n- {name: a, role: read, role: write}", ["'role' is given twice"]),
        ("keys: [5]", ["key 1"]),
        ("keys: !!python/object/apply:os.getcwd []", ["line 1"]),
        ("keys: &a [*a]", ["line 1", "alias *a"]),
        ("{" * 50_000, ["lists and mappings are more than 8 deep"]),
        ("\x00", ["is no YAML"]),
        ("keys:\n" + "# a long comment\n" * (MAX_FILE_BYTES // 16), ["more than 1048576 bytes"]),
        (
            [{"name": f"n{i}", "sha256": digest(str(i)), "role": "read"} for i in range(MAX_KEYS + 1)],
            ["more than 1024"],
        ),
    ],
    ids=range(43),
)
def test_refuses_a_bad_file(write_keys: Callable[[object], Path], content: object, parts: list[str]) -> None:
    path = write_keys(content)
    with pytest.raises(ValueError) as caught:
        KeyRing.load(path)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message
    assert len(message) < 400


def test_messages_never_hold_a_key(write_keys: Callable[[object], Path], caplog: pytest.LogCaptureFixture) -> None:
    secret = "secret value with spaces"
    for content in (
        [{"name": "a", "role": "read", "key": secret}],
        [{"name": "a", "role": "nobody", "key": secret}],
        [{"name": "a", "role": "read", "sha256": secret}],
        [{"name": "a", "role": "read", "key": [secret]}],
        f"keys:\n- name: a\n  key: {secret}\n role: read\n",
        f"keys:\n- name: a\n  key: '{secret}\n",
    ):
        with pytest.raises(ValueError) as caught:
            KeyRing.load(write_keys(content))
        assert "secret" not in str(caught.value)
    with pytest.raises(ValueError) as caught:
        KeyRing.load(None, [secret])
    assert "secret" not in str(caught.value)
    assert "--api-key number 1" in str(caught.value)
    assert "secret" not in caplog.text


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_refuses_what_is_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "keys.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(ValueError, match=str(path)):
        KeyRing.load(path)


def test_flags_and_file_must_differ(write_keys: Callable[[object], Path]) -> None:
    path = write_keys(ENTRIES)
    with pytest.raises(ValueError, match="'api-key-1' and 'ops' are the same key"):
        KeyRing.load(path, [OPS])
    with pytest.raises(ValueError, match="'api-key-1' and 'admin' are the same key"):
        KeyRing.load(None, [OPS], OPS)
    with pytest.raises(ValueError, match="Two keys are called 'admin'"):
        KeyRing.load(write_keys(changed(name="admin", role="write")), [], OPS)


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, False), (0o644, True), (0o620, True)])
def test_warns_about_an_open_file(
    write_keys: Callable[[object], Path], caplog: pytest.LogCaptureFixture, mode: int, warned: bool
) -> None:
    path = write_keys(ENTRIES)
    path.chmod(mode)
    KeyRing.load(path)
    assert ("open to others" in caplog.text) == warned


def test_warns_about_a_key_that_can_be_guessed(caplog: pytest.LogCaptureFixture) -> None:
    KeyRing.load(None, ["hunter2"], "root-key-0123456789")
    assert "--api-key number 1 has 7 characters" in caplog.text
    assert "hunter2" not in caplog.text
    assert "admin key" not in caplog.text


class TestRotation:
    """The file changes while the server runs."""

    @pytest.fixture(autouse=True)
    def always_due(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(keys_module, "CHECK_INTERVAL_S", 0.0)

    def test_follows_the_file(self, write_keys: Callable[[object], Path]) -> None:
        ring = KeyRing.load(write_keys(ENTRIES[:2]), [], "root-key-0123456789")
        write_keys(ENTRIES[1:])
        assert ring.is_due()
        ring.refresh()
        assert ring.identify(OPS) is None
        assert [name_of(ring, key) for key in (READER, CLINIC, "root-key-0123456789")] == ["reader", "clinic", "admin"]

    def test_follows_a_change_in_place(self, write_keys: Callable[[object], Path]) -> None:
        path = write_keys(ENTRIES[:1])
        ring = KeyRing.load(path)
        path.write_text(yaml.safe_dump({"keys": ENTRIES[1:]}))
        ring.refresh()
        assert ring.identify(OPS) is None
        assert name_of(ring, CLINIC) == "clinic"

    def test_follows_a_link(self, write_keys: Callable[[object], Path], tmp_path: Path) -> None:
        """As orchestrators mount secrets: a link to a folder, replaced as a whole."""
        for name, entries in (("one", ENTRIES[:1]), ("two", ENTRIES[1:])):
            (tmp_path / name).mkdir()
            write_keys(entries).rename(tmp_path / name / "keys.yaml")
        (tmp_path / "now").symlink_to(tmp_path / "one")
        ring = KeyRing.load(tmp_path / "now" / "keys.yaml")
        assert name_of(ring, OPS) == "ops"
        (tmp_path / "next").symlink_to(tmp_path / "two")
        (tmp_path / "next").replace(tmp_path / "now")
        ring.refresh()
        assert ring.identify(OPS) is None
        assert name_of(ring, READER) == "reader"

    @pytest.mark.parametrize("broken", ["keys: [", "", None, [ENTRIES[0], ENTRIES[0]]], ids=range(4))
    def test_a_broken_file_changes_nothing(
        self, write_keys: Callable[[object], Path], caplog: pytest.LogCaptureFixture, broken: object
    ) -> None:
        path = write_keys(ENTRIES)
        ring = KeyRing.load(path)
        if broken is None:
            path.unlink()
        else:
            write_keys(broken)
        for _ in range(3):
            ring.refresh()
        assert [name_of(ring, key) for key in (OPS, READER, CLINIC)] == ["ops", "reader", "clinic"]
        errors = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert len(errors) == 1
        assert "The keys stay as they were" in errors[0].getMessage()
        write_keys(ENTRIES[:1])
        ring.refresh()
        assert name_of(ring, OPS) == "ops"
        assert ring.identify(READER) is None

    def test_what_could_not_be_read_is_read_again(
        self, write_keys: Callable[[object], Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A file whose permissions are repaired has the same bytes and the same time as before."""
        ring = KeyRing.load(write_keys(ENTRIES[:1]))
        write_keys(ENTRIES[1:])
        with monkeypatch.context() as patch:

            def fail(_: Path) -> None:
                raise ValueError("permission denied")

            patch.setattr(keys_module, "read_keys", fail)
            ring.refresh()
        assert name_of(ring, OPS) == "ops"
        ring.refresh()
        assert ring.identify(OPS) is None
        assert name_of(ring, READER) == "reader"

    def test_emptied_file_closes(self, write_keys: Callable[[object], Path]) -> None:
        ring = KeyRing.load(write_keys(ENTRIES))
        write_keys([])
        ring.refresh()
        assert ring.identify(OPS) is None
        assert ring.has_any


def test_looks_at_the_file_once_a_second(write_keys: Callable[[object], Path]) -> None:
    ring = KeyRing.load(write_keys(ENTRIES))
    assert not ring.is_due()


def command(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    key_command.add_arguments(parser)
    return key_command.run(parser.parse_args(arguments))


class TestCommand:
    """`expertsteer key`."""

    def test_new_key_is_accepted(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "keys.yaml"
        assert command(["new", "--name", "ops", "--role", "write", "--file", str(path)]) == 0
        ops = capsys.readouterr().out.strip()
        limits = ["--profiles", "med-*,careful", "--maximum-strength", "1.5", "--not-after", "2999-01-31"]
        assert command(["new", "--name", "c", "--role", "inference", *limits, "--file", str(path)]) == 0
        clinic = capsys.readouterr().out.strip()
        ring = KeyRing.load(path)
        assert ring.identify(ops) == Identity("ops", Role.WRITE)
        assert ring.identify(clinic) == Identity("c", Role.INFERENCE, ("med-*", "careful"), 1.5)
        assert ops not in path.read_text() and clinic not in path.read_text()
        assert len(ops) > 40
        assert path.stat().st_mode & 0o777 == 0o600
        assert list(tmp_path.iterdir()) == [path]

        assert command(["list", "--file", str(path)]) == 0
        shown = capsys.readouterr().out
        assert "ops" in shown and "write" in shown and "2999-01-31" in shown

    def test_printed_entry_is_accepted(
        self, write_keys: Callable[[object], Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert command(["new", "--name", "ops", "--role", "read", "--not-after", "2999-01-31T10:00"]) == 0
        out, error = capsys.readouterr()
        path = write_keys("keys:\n" + error[error.index("- name") :])
        assert KeyRing.load(path).identify(out.strip()) == Identity("ops", Role.READ)

    @pytest.mark.parametrize(
        ("flags", "part"),
        [
            (["--name", "o p", "--role", "read"], "name"),
            (["--name", "ops", "--role", "read", "--profiles", "x"], "role inference"),
            (["--name", "ops", "--role", "inference", "--maximum-strength", "-1"], "maximum_strength"),
            (["--name", "ops", "--role", "inference", "--not-after", "soon"], "'soon'"),
            (["--name", "taken", "--role", "read"], "has a key 'taken' already"),
        ],
    )
    def test_refuses(
        self, write_keys: Callable[[object], Path], capsys: pytest.CaptureFixture[str], flags: list[str], part: str
    ) -> None:
        path = write_keys(changed(name="taken"))
        before = path.read_bytes()
        assert command(["new", *flags, "--file", str(path)]) == 1
        out, error = capsys.readouterr()
        assert out == ""
        assert error.startswith("expertsteer key: ")
        assert part in error
        assert path.read_bytes() == before

    def test_bad_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert command(["list", "--file", str(tmp_path / "none.yaml")]) == 1
        assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "# ours\nkeys:\n- name: a  # first\n  role: read\n  sha256: {0}\n",
        "keys:\n    - name: a\n      role: read\n      sha256: {0}",
        "keys: [] # none yet\n",
        "",
    ],
)
def test_appending_keeps_the_rest(write_keys: Callable[[object], Path], text: str) -> None:
    path = write_keys(text.format(digest("a")))
    present = read_entries(path) if text else []
    entry = make_entry({"name": "b", "role": "write", "sha256": digest("b"), "not_after": "2030-01-31"})
    append_entry(path, entry)
    assert read_entries(path) == [*present, entry]
    if "ours" in text:
        assert path.read_text().startswith("# ours\nkeys:\n- name: a  # first\n")


def test_appending_where_it_cannot(write_keys: Callable[[object], Path]) -> None:
    path = write_keys(f"keys: [{{name: a, role: read, sha256: {digest('a')}}}]\n")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="by hand"):
        append_entry(path, make_entry({"name": "b", "role": "write", "sha256": digest("b")}))
    assert path.read_bytes() == before


def test_appending_from_several_processes(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    code = (
        "import sys; from pathlib import Path; from server.auth.key_file import append_entry, make_entry\n"
        "for i in range(10):\n"
        "    fields = {'name': f'{sys.argv[2]}-{i}', 'role': 'read', 'sha256': f'{int(sys.argv[2]):032x}{i:032x}'}\n"
        "    append_entry(Path(sys.argv[1]), make_entry(fields))\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), str(index)]) for index in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    assert {entry.name for entry in read_entries(path)} == {f"{writer}-{i}" for writer in range(3) for i in range(10)}
