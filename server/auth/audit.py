"""Audit log: one JSON line for each change of what is served, appended and never rewritten."""

import fcntl
import json
import logging
import os
import stat
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from artifacts.errors import quoted

_logger = logging.getLogger("vllm.expertsteer.audit")

# Of the HTTP request that is being answered, where its client or a proxy gave it one.
REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
MAX_LINE_BYTES = 64 << 10
# What one page reads: far more than a line, so that every page gets on.
MAX_TAIL_BYTES = 1 << 20


class AuditPage(NamedTuple):
    """Some lines of the log.

    Attributes:
        entries: newest first.
        before: what `tail` continues with; None at the beginning of the file.
    """

    entries: list[dict[str, Any]]
    before: int | None


class AuditLog:
    """Log of a file that several processes append to and that may be rotated at any time."""

    def __init__(self, path: Path) -> None:
        """Open the log, and create it when there is none.

        Raises:
            OSError: it cannot be written.
            ValueError: there is something else than a regular file.
        """
        self._path = path
        descriptor = self._open()
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError(f"Audit log {path} is not a regular file; remove it or choose another place.")
        finally:
            os.close(descriptor)

    def write(
        self,
        actor: str,
        action: str,
        target: str,
        *,
        digest: str | None = None,
        before: Any = None,
        after: Any = None,
        outcome: str,
        reason: str | None = None,
        request_id: str | None = None,
    ) -> None:
        """Append a line and wait until it is on the disk. A log that cannot be written is logged, not raised.

        Args:
            actor: name of the key.
            action: what was done, as `put_profile`.
            target: what it was done to.
            digest: of the bundle.
            before: what was there; anything that JSON can hold.
            after: what is there now.
            outcome: `ok`, or what came of it.
            reason: why it was refused or failed.
            request_id: of the HTTP request.
        """
        entry = {
            "at": datetime.now(UTC).isoformat(timespec="microseconds"),
            **{"actor": actor, "action": action, "target": target, "digest": digest, "before": before, "after": after},
            **{"outcome": outcome, "reason": reason, "request_id": request_id},
        }
        try:
            self._append(_line(entry))
        except (OSError, TypeError, ValueError, RecursionError) as error:
            _logger.error(
                "Audit log %s misses %s of %s by %s (%s): %s", self._path, action, quoted(target), actor, outcome, error
            )

    def tail(self, limit: int = 50, before: int | None = None) -> AuditPage:
        """Latest lines of the current file; damaged ones are left out.

        Args:
            limit: how many at most; of very long lines there may be fewer, or none, on a page that is not the last.
            before: `AuditPage.before` of the page that this one follows; None for the end of the file.

        Raises:
            OSError: the log cannot be read.
            ValueError: a negative place, or not even one line.
        """
        if limit < 1 or (before is not None and before < 0):
            raise ValueError(f"limit is {limit} and before is {before}; give at least 1 and at least 0.")
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            # Rotated, and nothing has been written since.
            return AuditPage([], None)
        with file:
            size = os.fstat(file.fileno()).st_size
            end = size if before is None else min(before, size)
            start = max(0, end - MAX_TAIL_BYTES)
            lines = os.pread(file.fileno(), end - start, start).splitlines(keepends=True)
        if start > 0 and len(lines) > 1:
            # The first one may have begun before.
            start += len(lines.pop(0))
        entries: list[dict[str, Any]] = []
        place = end
        while lines and len(entries) < limit:
            line = lines.pop()
            place -= len(line)
            entry = _parse(line)
            if entry is not None:
                entries.append(entry)
        return AuditPage(entries, place or None)

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        return os.open(self._path, flags, 0o600)

    def _append(self, line: bytes) -> None:
        # Opened every time, so that a file that was moved away is not written any more.
        descriptor = self._open()
        try:
            # Against other writers while this one looks at the end of the file; closing gives it up.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            size = os.fstat(descriptor).st_size
            # A full disk may have left half a line, which must not spoil this one.
            is_torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            data = b"\n" + line if is_torn else line
            written = os.write(descriptor, data)
            if written != len(data):
                raise OSError(f"{written} of {len(data)} bytes were written")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _line(entry: dict[str, Any]) -> bytes:
    """JSON line; what is too long to be read in one go loses its details, not its facts."""
    line = json.dumps(entry, default=str).encode() + b"\n"
    if len(line) <= MAX_LINE_BYTES:
        return line
    short = {
        name: value if value is None or (isinstance(value, str) and len(value) <= 256) else quoted(value, 256)
        for name, value in entry.items()
    }
    return json.dumps(short).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        # Still being written, or torn.
        return None
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None
