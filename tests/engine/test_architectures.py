"""Steered log-probabilities of real vLLM equal Transformers with forward hooks, whatever the architecture.

`python tests/engine/architectures` prints the same comparison as a table.
"""

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

FOLDER = Path(__file__).parent / "architectures"
_MODULE = runpy.run_path(str(FOLDER / "families.py"))
FAMILIES, NUM_LAYERS = _MODULE["FAMILIES"], _MODULE["NUM_LAYERS"]
SERVED = [name for name, family in FAMILIES.items() if family.refusal is None]
FUSED = [name for name in SERVED if FAMILIES[name].fused]
REFUSED = [name for name in FAMILIES if name not in SERVED]
COMPILED = ("Llama", "Gemma 2")
TOLERANCE = 2e-4
# What steering must change at least: an engine that does not steer, or steers elsewhere, is off by this much.
SMALLEST_EFFECT = 0.1
STOP_TIMEOUT_S = 20
STEERED_LAYERS = (0, NUM_LAYERS // 2, NUM_LAYERS - 1)

Compare = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def compare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compare]:
    """Ask for the comparison of a family; the process that makes them imports Transformers and vLLM once."""
    log = tmp_path_factory.mktemp("architectures") / "log.txt"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, str(FOLDER), "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            bufsize=1,
            start_new_session=True,
        )

    def ask(family: str, fusion: str, eager: bool = True) -> dict[str, Any]:
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps({"family": family, "fusion": fusion, "eager": eager}) + "\n")
        line = process.stdout.readline()
        assert line, log.read_text(errors="replace")[-4000:]
        answer: dict[str, Any] = json.loads(line)
        return answer

    try:
        yield ask
    finally:
        # The end of its input ends it and the engines; one that hangs is killed with them.
        assert process.stdin and process.stdout
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def check(answer: dict[str, Any], fused_layers: list[int]) -> None:
    assert "error" not in answer, answer["error"][-4000:]
    assert answer["status"]["fused_layers"] == fused_layers
    steered = [row for row in answer["rows"] if row["bundle"] is not None]
    bundles = {f"{kind}:{layer}" for kind in ("add", "clamp", "rotate") for layer in STEERED_LAYERS} | {"all"}
    assert {row["bundle"] for row in steered} == bundles
    assert len({row["strength"] for row in steered}) > 1
    assert len(answer["rows"]) > len(steered)
    assert [row for row in answer["rows"] if row["error"] > TOLERANCE] == []
    assert [row for row in steered if row["effect"] < SMALLEST_EFFECT] == []


@pytest.mark.parametrize("family", SERVED)
def test_equals_transformers(compare: Compare, family: str) -> None:
    check(compare(family, "always"), list(range(NUM_LAYERS)) if FAMILIES[family].fused else [])


@pytest.mark.parametrize("family", FUSED)
def test_equals_transformers_unfused(compare: Compare, family: str) -> None:
    check(compare(family, "never"), [])


@pytest.mark.parametrize("family", COMPILED)
def test_equals_transformers_compiled(compare: Compare, family: str) -> None:
    check(compare(family, "auto", eager=False), list(range(NUM_LAYERS)))


@pytest.mark.parametrize("family", REFUSED)
def test_refused_at_start(compare: Compare, family: str) -> None:
    # Compiled, because an eager engine on a CPU does not run the model before the first request.
    answer = compare(family, "auto", eager=False)
    assert FAMILIES[family].refusal in answer["error"]
    assert "IncompatibleVllmError" in answer["error"]
    assert answer["at_start"]
