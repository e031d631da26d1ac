"""A command on a terminal of its own, as a person has it."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from types import TracebackType

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
TIMEOUT_S = 90


class Terminal:
    """A process whose standard streams are a terminal, and what it has written there."""

    def __init__(self, *command: str, num_columns: int = 100, num_lines: int = 30, **environment: str) -> None:
        """Start `expertsteer` with these arguments.

        Args:
            command: arguments.
            num_columns, num_lines: size of the terminal.
            environment: variables besides those of the tests.
        """
        self._main, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", num_lines, num_columns, 0, 0))
        variables = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        self._process = subprocess.Popen(
            # Without a session of its own, Ctrl-C in this terminal would be nobody's.
            [sys.executable, "-c", _RUN, *command],
            stdin=child,
            stdout=child,
            stderr=child,
            env=variables | {"TERM": "xterm-256color"} | environment,
            start_new_session=True,
        )
        os.close(child)
        self.written = b""
        self._seen = 0

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._main)

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._main, text.encode())

    def wait_for(self, words: str) -> str:
        """What was written since the last call, without escape sequences, up to and including some words."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while True:
            text = _ESCAPES.sub("", self.written.decode(errors="replace"))
            place = text.find(words, self._seen)
            if place >= 0:
                found, self._seen = text[self._seen : place + len(words)], place + len(words)
                return found
            assert time.monotonic() < deadline_s, f"no {words!r} in {text[self._seen :]!r}"
            assert self._read(), f"ended without {words!r} after {text[self._seen :]!r}"

    def end(self) -> int:
        """Wait for the end; its exit status."""
        while self._read():
            pass
        return self._process.wait(TIMEOUT_S)

    def _read(self) -> bool:
        """Read what there is, or wait a moment; whether the other side is still open."""
        ready, _, _ = select.select([self._main], [], [], 0.2)
        if not ready:
            return True
        try:
            data = os.read(self._main, 65536)
        # This is how Linux says that the last process has left the terminal.
        except OSError:
            return False
        self.written += data
        return bool(data)


# A terminal belongs to a session; only the session's leader can take it.
_RUN = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from server.cli import main
sys.exit(main(sys.argv[1:]))
"""
