"""A server that a benchmark starts, talks to and stops."""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType

import httpx

_START_TIMEOUT_S, _STOP_TIMEOUT_S = 600, 60
_LOG_TAIL_LINES = 20
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of a command that may use a server which runs already."""
    parser.add_argument("--server", metavar="URL", help="a server of the lab model as `lab`; default: start one")
    parser.add_argument(
        "--key",
        metavar="KEY",
        default=os.environ.get("EXPERTSTEER_ADMIN_KEY"),
        help="write key of --server (default: EXPERTSTEER_ADMIN_KEY)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")


class ServerError(RuntimeError):
    """The server did not start. `str(error)` ends with the end of its log."""


class Served:
    """`expertsteer serve` from `with` on, in a process group of its own that always ends with the block.

    Attributes:
        url: of the server.
        client: HTTP client for it, with the key.
        start_s: from the start of the process until it was ready.
        process: the server.
    """

    def __init__(self, model: Path, flags: list[str], key: str, log: Path) -> None:
        """Say what to start.

        Args:
            model: folder of the model, served as `bench`.
            flags: of `expertsteer serve`.
            key: write key of the server.
            log: file for its output; appended to.
        """
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.start_s = 0.0
        command = ["-m", "server.cli", "serve", str(model), "--served-model-name", "bench", "--dtype", "float32"]
        self._command = [sys.executable, *command, "--host", "127.0.0.1", "--port", str(port), *flags]
        self._environment = os.environ | _ENVIRONMENT | {"EXPERTSTEER_ADMIN_KEY": key}
        self._log = log
        limits = httpx.Limits(max_connections=128, max_keepalive_connections=128)
        # A request must not meet a proxy of the machine it runs on.
        self.client = httpx.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {key}"},
            timeout=120,
            limits=limits,
            trust_env=False,
        )

    def __enter__(self) -> "Served":
        started_s = time.monotonic()
        with self._log.open("ab") as output:
            self.process = subprocess.Popen(
                self._command, stdout=output, stderr=output, env=self._environment, start_new_session=True
            )
        try:
            while not self._is_ready():
                if self.process.poll() is not None:
                    raise ServerError(f"the server ended with {self.process.returncode}:\n{self._tail()}")
                if time.monotonic() - started_s > _START_TIMEOUT_S:
                    raise ServerError(f"the server was not ready within {_START_TIMEOUT_S} s:\n{self._tail()}")
                time.sleep(0.05)
        except BaseException:
            self._stop()
            raise
        self.start_s = time.monotonic() - started_s
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()

    def _is_ready(self) -> bool:
        with suppress(httpx.TransportError):
            return self.client.get("/health/ready").status_code == httpx.codes.OK
        return False

    def _tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:])

    def _stop(self) -> None:
        """Ask the server to stop, then end whatever is left of its process group."""
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(_STOP_TIMEOUT_S)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(_STOP_TIMEOUT_S)
