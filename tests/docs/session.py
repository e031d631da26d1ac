"""One shell session for one document: its blocks in order, in a copy of the repository, with a port of its own."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from documents import ROOT, SERVER, Block

END = "::: end"
_PORT = re.compile(r"(?<![\d.])8000(?!\d)")
_READY_TIMEOUT_S, _STOP_TIMEOUT_S = 400, 30
_IGNORED = shutil.ignore_patterns(
    *(".git", ".venv", ".*_cache", ".hypothesis", ".expertsteer", "__pycache__", "build", "*.egg-info", "node_modules")
)
_PROLOGUE = """\
set -euo pipefail
_server= _folder=%(folder)s
_end() {
    if [ -n "$_server" ]; then
        kill -TERM -- "-$_server" 2>/dev/null || true
        wait "$_server" || true
    fi
}
trap 'status=$?; _end; exit $status' EXIT
trap 'exit 143' TERM
_wait_until_ready() {
    for _ in $(seq %(timeout)d); do
        if curl -sf -o /dev/null http://127.0.0.1:%(port)d/health/ready; then return 0; fi
        if ! kill -0 "$_server" 2>/dev/null; then break; fi
        sleep 1
    done
    echo "the server is not ready; the end of its log:"
    tail -n 40 "$_folder/server.log"
    return 1
}
"""
# A group of its own, so that all of it can be stopped.
_SERVER = """\
set -m
{
%s} >"$_folder/server.log" 2>&1 &
_server=$!
set +m
echo "$_server" >"$_folder/server.pid"
_wait_until_ready
"""
# Documents leave out what is the default; here the default port may be taken.
_SHIM = """\
#!/bin/sh
case "$1 ${2-}" in
    "serve "* | "demo "*) exec "%(program)s" "$@" --port %(port)d ;;
    "profile check") exec "%(program)s" "$@" ;;
    "push "* | "profile "* | "bench "* | "chat "*) exec "%(program)s" "$@" --server http://127.0.0.1:%(port)d ;;
    *) exec "%(program)s" "$@" ;;
esac
"""


def make_copy(folder: Path) -> Path:
    """Copy the repository, with a `.venv` that is this environment, as `make setup` leaves it."""
    copy = folder / "repository"
    shutil.copytree(ROOT, copy, ignore=_IGNORED)
    environment = copy / ".venv"
    environment.mkdir()
    for part in Path(sys.prefix).iterdir():
        (environment / part.name).symlink_to(part)
    installed = environment / ".installed"
    installed.unlink(missing_ok=True)
    installed.touch()
    return copy


def script(blocks: Sequence[Block], port: int, folder: Path) -> str:
    """The blocks as one script. It prints the place of each before it runs it."""
    lines = [_PROLOGUE % {"timeout": _READY_TIMEOUT_S, "port": port, "folder": folder}]
    for block in blocks:
        text = _PORT.sub(str(port), block.text)
        lines.append(f"echo '::: {block.place}'")
        if block.language == "python":
            text = f"python - <<'END_OF_PYTHON'\n{text}END_OF_PYTHON"
        lines.append(_SERVER % text if SERVER in block.marks else text)
    return "\n".join([*lines, f"echo '{END}'", ""])


def run(blocks: Sequence[Block], folder: Path, port: int, environment: Mapping[str, str], timeout_s: float) -> str:
    """Run blocks, stop what they leave running, and return what they printed; its last line is `END` on success.

    Args:
        blocks: those that run.
        folder: empty, for everything that they write.
        port: what the documents call 8000.
        environment: of the session.
        timeout_s: how long it may take.
    """
    copy, shims = make_copy(folder), folder / "shims"
    shims.mkdir()
    program = Path(sys.prefix) / "bin" / "expertsteer"
    shim = shims / "expertsteer"
    shim.write_text(_SHIM % {"program": program, "port": port})
    shim.chmod(0o755)
    variables = {name: value for name, value in environment.items() if not name.startswith("EXPERTSTEER_")}
    variables |= {
        "PATH": os.pathsep.join([str(shims), str(Path(sys.prefix) / "bin"), environment["PATH"]]),
        "PORT": str(port),
        "COLUMNS": "160",
    }
    output = folder / "output"
    with output.open("wb") as file:
        process = subprocess.Popen(
            ["bash", "-c", script(blocks, port, folder)],
            cwd=copy,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout_s)
        finally:
            _end(process, folder / "server.pid")
    return output.read_text(errors="replace")


def _end(process: subprocess.Popen[bytes], server: Path) -> None:
    """Let a session stop itself and its server, then end what is left of both."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(_STOP_TIMEOUT_S)
    groups = [process.pid, *([int(server.read_text())] if server.exists() else [])]
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    process.wait(_STOP_TIMEOUT_S)
