"""The process with vLLM's benchmark client."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from server.client import SteeringClientError

_STOP_TIMEOUT_S = 5
_LOG_TAIL_LINES = 5


class BenchError(SteeringClientError):
    """A benchmark that gives no result."""

    def __init__(self, message: str) -> None:
        super().__init__(None, "bench_failed", message)


class BenchClient:
    """Runs `vllm bench serve` in a process of its own, so that vLLM's output and signals stay apart."""

    def __init__(self, log: Path, key: str | None) -> None:
        """Start the process.

        Args:
            log: file for what vLLM prints.
            key: API key; None for a server without keys.
        """
        # vLLM's client takes the key from here; arguments could be read by everybody on the machine.
        environment = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
        environment |= {} if key is None else {"OPENAI_API_KEY": key}
        self._log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "server.engine.bench_client"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=environment,
                # Ctrl-C is for the command, which then stops this process.
                start_new_session=True,
            )

    def __enter__(self) -> "BenchClient":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        # In the middle of a benchmark the process does not look at its input.
        if error is not None:
            self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def wait_ready(self) -> None:
        """Wait until vLLM is imported.

        Raises:
            BenchError: it cannot be.
        """
        self._read()

    def run(self, arguments: Sequence[str]) -> dict[str, Any]:
        """vLLM's result of one benchmark.

        Args:
            arguments: of `vllm bench serve`.

        Raises:
            BenchError: there is none.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(list(arguments)).encode() + b"\n")
            self._process.stdin.flush()
        result = self._read()
        if "error" in result:
            raise BenchError(f"vLLM's client failed: {result['error']}; its log is {self._log}.")
        return result

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            tail = " / ".join(self._log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:])
            raise BenchError(f"vLLM's client ended with status {status}: {tail or 'it printed nothing'}.")
        answer: dict[str, Any] = json.loads(line)
        return answer
