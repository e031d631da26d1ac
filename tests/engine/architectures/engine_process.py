"""The process that forks one vLLM engine per job."""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

from engine import START_FAILED

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


class EngineError(RuntimeError):
    """An engine failed; the message is what it wrote.

    Attributes:
        at_start: it failed before it took requests.
    """

    def __init__(self, message: str, at_start: bool) -> None:
        super().__init__(message)
        self.at_start = at_start


class EngineProcess:
    """Context manager around the process of `engine.py`."""

    def __enter__(self) -> Self:
        self._folder = TemporaryDirectory()
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "engine.py")],
            env=os.environ | _ENVIRONMENT | {"VLLM_CACHE_ROOT": str(Path(self._folder.name, "cache"))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The end of its input ends the process.
        self._process.communicate()
        self._folder.cleanup()

    def run(self, job: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Answers to a job, see `engine.answers`.

        Raises:
            EngineError: the engine failed.
        """
        assert self._process.stdin and self._process.stdout
        (folder / "job.json").write_text(json.dumps(job))
        self._process.stdin.write(f"{folder}\n")
        status = self._process.stdout.readline().strip()
        if status != "0":
            log = folder / "log.txt"
            words = log.read_text(errors="replace") if log.exists() else "it ended before the job"
            raise EngineError(f"status {status}: {words}", status == str(START_FAILED))
        answers: dict[str, Any] = json.loads((folder / "answers.json").read_text())
        return answers
