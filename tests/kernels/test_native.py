"""Building and choosing the compiled kernel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from steering_kernels import backend

# Steers one row of two twice and says what ran.
SCRIPT = """
import logging, torch
from steering_kernels import backend, steer_
logging.basicConfig(format="%(message)s")
hidden = torch.ones(2, 4)
for _ in range(2):
    steer_(hidden, torch.ones(1, 4), torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1),
           torch.tensor([0, -1], dtype=torch.int32), torch.ones(2))
print(backend("cpu", torch.float32), hidden[:, 0].tolist())
"""


def run(cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"XDG_CACHE_HOME": str(cache)} | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )


def test_this_machine_runs_the_compiled_kernel() -> None:
    assert [backend("cpu", dtype) for dtype in (torch.float32, torch.bfloat16)] == ["cpu", "cpu"]
    assert backend("cpu", torch.float16) == "reference"
    assert backend("cuda", torch.float32) == "reference"


def test_is_built_once(tmp_path: Path) -> None:
    assert run(tmp_path).stdout == "cpu [3.0, 1.0]\n"
    (library,) = (tmp_path / "expertsteer").iterdir()
    built = library.stat().st_mtime_ns
    assert run(tmp_path).stdout == "cpu [3.0, 1.0]\n"
    assert library.stat().st_mtime_ns == built


@pytest.mark.parametrize("compiler", ["/nonexistent/c++", "false"])
def test_falls_back_with_one_warning(tmp_path: Path, compiler: str) -> None:
    result = run(tmp_path, CXX=compiler)
    assert result.stdout == "reference [3.0, 1.0]\n"
    assert result.stderr.count("Steering falls back to the slower reference kernel") == 1
    assert list((tmp_path / "expertsteer").iterdir()) == []
