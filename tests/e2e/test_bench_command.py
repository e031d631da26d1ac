"""`expertsteer bench` against a real server."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

SMALL = ("--num-prompts", "6", "--input-len", "32", "--output-len", "8")
TIMEOUT_S = 240


def start(server: Any, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the command, as a user would but for the tests' server."""
    command = [sys.executable, "-m", "server.cli", "bench", "--server", server.url, "-o", str(folder), *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def test_steered_against_unsteered(eager: Any, bundles: Any, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    profiles = ("--profile", "careful", "--profile", f"late@{bundles['late'].digest}")
    bench = start(eager, folder, *profiles, "--rates", "8", "inf", "--rounds", "2", *SMALL)
    out, errors = bench.communicate(timeout=TIMEOUT_S)
    assert bench.returncode == 0, errors
    assert "careful / unsteered" in out and "8 requests/s" in out and "all at once" in out
    report = json.loads((folder / "bench.json").read_text())
    assert report["receipts"]["careful"]["bundle"] == bundles["careful"].digest
    assert len(report["arms"]) == 6
    for arm in report["arms"]:
        assert (arm["num_completed"], arm["num_failed"], arm["num_rounds"]) == (12, 0, 2)
        assert 0 < arm["ttft_ms"]["p50"] <= arm["ttft_ms"]["p99"] and arm["tpot_ms"]["p50"] > 0
        # By the workers' own count: the prompts' tokens and those generated. vLLM's client takes lengths roughly.
        assert (arm["tokens_steered"] is None) == (arm["arm"] == "unsteered")
        assert arm["tokens_steered"] is None or arm["tokens_steered"] >= 12 * 30
    ratios = {(each["rate"], each["arm"], each["figure"]) for each in report["ratios"] if each["low"] <= each["high"]}
    assert len(ratios) == 2 * 2 * 7
    assert report["server"]["vllm"] == "0.32.0"
    assert {path.name for path in folder.iterdir()} == {
        *("bench.json", "bench.md", "bench.png", "bench.svg", "client.log", "turns.jsonl")
    }


def test_interrupted(eager: Any, tmp_path: Path) -> None:
    """What was measured before Ctrl-C stays, and vLLM's client ends with the command."""
    folder = tmp_path / "results"
    bench = start(eager, folder, "--profile", "early", "--rates", "inf", "--rounds", "900", *SMALL)
    turns, deadline_s = folder / "turns.jsonl", time.monotonic() + TIMEOUT_S
    while not turns.exists() or len(turns.read_text().splitlines()) < 3:
        assert bench.poll() is None, bench.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    # As a terminal does it: to the command and everything in its process group.
    os.killpg(bench.pid, signal.SIGINT)
    out, errors = bench.communicate(timeout=TIMEOUT_S)
    assert bench.returncode == 130, errors
    assert "Interrupted: only complete rounds are counted." in out and "early / unsteered" in out
    report = json.loads((folder / "bench.json").read_text())
    assert report["arms"][0]["num_rounds"] >= 1 and report["arms"][0]["num_failed"] == 0
    assert (folder / "bench.svg").exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(bench.pid, 0)
