"""Audit log: whole lines from several processes, through rotation and full disks, and its pages."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.auth import audit as audit_module
from server.auth.audit import MAX_LINE_BYTES, AuditLog


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


def write(log: AuditLog, target: str, **fields: Any) -> None:
    log.write("ops", "put_profile", target, **{"outcome": "ok"} | fields)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_writes_every_field(path: Path) -> None:
    log = AuditLog(path)
    fields = {
        **{"digest": "sha256:ab", "before": {"strength": 1.0}, "after": None, "outcome": "refused"},
        **{"reason": "line\nbreak é \ud800", "request_id": "r1"},
    }
    write(log, "medical", **fields)
    assert path.read_bytes().count(b"\n") == 1
    [entry] = lines(path)
    assert entry.pop("at").endswith("+00:00")
    assert entry == {"actor": "ops", "action": "put_profile", "target": "medical", **fields}
    assert path.stat().st_mode & 0o777 == 0o600


def test_lines_of_several_processes_stay_whole(path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from server.auth.audit import AuditLog\n"
        "log = AuditLog(Path(sys.argv[1]))\n"
        "for i in range(500):\n"
        "    log.write(sys.argv[2], 'put_profile', str(i), outcome='ok', after='x' * (i * 7 % 3000))\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), str(index)]) for index in range(4)]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0, 0]
    written = lines(path)
    assert len(written) == 2000
    for index in range(4):
        mine = [entry for entry in written if entry["actor"] == str(index)]
        assert [entry["target"] for entry in mine] == [str(i) for i in range(500)]
        assert all(len(entry["after"]) == int(entry["target"]) * 7 % 3000 for entry in mine)


def test_rotation(path: Path) -> None:
    log = AuditLog(path)
    write(log, "one")
    path.rename(path.with_suffix(".1"))
    assert log.tail().entries == []
    write(log, "two")
    assert [entry["target"] for entry in lines(path.with_suffix(".1"))] == ["one"]
    assert [entry["target"] for entry in lines(path)] == ["two"]


def test_goes_on_after_half_a_line(path: Path) -> None:
    log = AuditLog(path)
    write(log, "one")
    with path.open("a") as file:
        file.write('{"actor": "op')
    write(log, "two")
    write(log, "three")
    assert [entry["target"] for entry in log.tail().entries] == ["three", "two", "one"]


def test_never_raises_after_the_start(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog(path)
    endless: list[Any] = []
    endless.append(endless)
    write(log, "a cycle", after=endless)
    with monkeypatch.context() as patch:
        patch.setattr(audit_module.os, "write", lambda descriptor, data: os.pwrite(descriptor, data[:5], 0))
        write(log, "a full disk")
    path.unlink()
    path.mkdir()
    write(log, "a folder")
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    for target, message in zip(("a cycle", "a full disk", "a folder"), messages, strict=True):
        assert f"misses put_profile of '{target}' by ops (ok)" in message


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "no folder"])
def test_refuses_what_is_no_file_at_the_start(path: Path, kind: str) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(path.parent / "elsewhere")
    else:
        path = path / "audit.jsonl"
    with pytest.raises((OSError, ValueError)):
        AuditLog(path)


def test_long_lines_lose_details_only(path: Path) -> None:
    log = AuditLog(path)
    write(log, "t" * 100, after="x" * MAX_LINE_BYTES, reason="y" * 10_000)
    [entry] = lines(path)
    assert path.stat().st_size < MAX_LINE_BYTES
    assert entry["actor"] == "ops"
    assert entry["after"].startswith("'xxx")
    assert entry["before"] is None


def test_pages_hold_every_line_once(path: Path) -> None:
    log = AuditLog(path)
    assert log.tail() == ([], None)
    for index in range(23):
        write(log, str(index))
    for limit in (1, 2, 5, 22, 23, 24, 1000):
        found, before, num_pages = [], None, 0
        while num_pages == 0 or before is not None:
            page = log.tail(limit, before)
            assert len(page.entries) <= limit
            found += [entry["target"] for entry in page.entries]
            before, num_pages = page.before, num_pages + 1
        assert found == [str(index) for index in reversed(range(23))]
        assert num_pages == -(-23 // limit)


def test_pages_stay_while_lines_come(path: Path) -> None:
    log = AuditLog(path)
    for index in range(4):
        write(log, str(index))
    first = log.tail(2)
    write(log, "new")
    second = log.tail(2, first.before)
    assert [entry["target"] for entry in first.entries + second.entries] == ["3", "2", "1", "0"]


def test_pages_of_more_than_one_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "MAX_TAIL_BYTES", 1000)
    log = AuditLog(path)
    for index in range(20):
        write(log, str(index), reason="x" * index * 20)
    # More than one read holds, and no line at all.
    with path.open("a") as file:
        file.write("#" * 3000 + "\n")
    write(log, "last")
    found, before, num_pages = [], None, 0
    while num_pages == 0 or before is not None:
        page = log.tail(50, before)
        assert before is None or page.before is None or page.before < before
        found += [entry["target"] for entry in page.entries]
        before, num_pages = page.before, num_pages + 1
    assert found == ["last", *(str(index) for index in reversed(range(20)))]


def test_any_place_is_answered(path: Path) -> None:
    log = AuditLog(path)
    for index in range(3):
        write(log, str(index))
    size = path.stat().st_size
    for before in range(size + 2):
        assert len(log.tail(50, before).entries) == path.read_bytes()[:before].count(b"\n")
    assert len(log.tail(50, 10**30).entries) == 3
    for bad in ((0, None), (5, -1)):
        with pytest.raises(ValueError, match="at least"):
            log.tail(*bad)


def test_damaged_lines_are_left_out(path: Path) -> None:
    log = AuditLog(path)
    write(log, "one")
    with path.open("ab") as file:
        file.write(b"\xff\x00\n[1]\n5\n\n" + b"[" * 5000 + b"\n{}\n")
    write(log, "two")
    assert [entry.get("target") for entry in log.tail().entries] == ["two", None, "one"]
