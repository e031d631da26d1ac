"""Compiled graphs are cached under vLLM's configuration hash: steering, and every version of it, has its own."""

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

TIMEOUT_S = 180
# A process of its own, because importing vLLM changes the one that does it.
DRIVER = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
from server.engine import config


def digest(additional_config):
    return EngineArgs(model=sys.argv[1], dtype="float32", additional_config=additional_config) \\
        .create_engine_config().compute_hash()


def settings(rows=64, **changes):
    return digest(config.EngineSettings(rows, **changes).additional_config())


hashes = {"plain": digest({}), "steering": settings()}
hashes["steering again"] = settings()
hashes["more rows"] = settings(65)
hashes["fused"] = settings(fusion="always")
config.OPS_VERSION += 1
hashes["other operators"] = settings()
config.OPS_VERSION -= 1
config.version = lambda name: "0.0.0"
hashes["other version"] = settings()
print("\\n" + json.dumps(hashes))
"""


def test_hashes_differ(vllm_environment: dict[str, str], target: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, str(target)],
        env=vllm_environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    hashes = json.loads(result.stdout.splitlines()[-1])
    assert hashes.pop("steering again") == hashes["steering"]
    assert len(hashes) == 6
    for left, right in combinations(hashes, 2):
        assert hashes[left] != hashes[right], (left, right)
