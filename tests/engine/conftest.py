"""What the tests of real engines share."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

TIMEOUT_S = 600


@pytest.fixture(scope="session")
def run_driver() -> Callable[[list[str], dict[str, str], Path], None]:
    """Run a driver of an engine to its end; its engine processes go with it, whatever happens."""

    def run(command: list[str], environment: dict[str, str], log: Path) -> None:
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
            try:
                status = process.wait(TIMEOUT_S)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        assert status == 0, log.read_text(errors="replace")[-4000:]

    return run
