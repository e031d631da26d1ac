"""A server whose workers do not steer never becomes ready."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

TIMEOUT_S = 300
DRIVER = """
import sys
from server import app, cli

app.worker_cls = lambda device_type: "broken_worker.BrokenWorker"
sys.exit(cli.main(sys.argv[1:]))
"""


def test_silent_layers_end_the_start(vllm_environment: dict[str, str], target: Path, tmp_path: Path) -> None:
    flags = ["--dtype", "float32", "--max-model-len", "128", "--enforce-eager", "--host", "127.0.0.1", "--port", "0"]
    log = tmp_path / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, "serve", str(target), *flags],
            env=vllm_environment | {"PYTHONPATH": str(Path(__file__).parent)},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            status = process.wait(TIMEOUT_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    text = log.read_text(errors="replace")
    assert status == 1, text[-4000:]
    assert "expertsteer serve: Self-test: steering has no effect at layers [1, 4]; refusing to serve." in text
    assert "Starting ExpertSteer server" not in text
    assert "Traceback" not in text
