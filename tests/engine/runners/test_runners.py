"""Model runners V1 and V2 steer alike: same tokens, same log-probabilities, same counts, however a batch is cut up."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine.program import Program, Step
from steering_kernels import Kind

pytestmark = pytest.mark.engine

TIMEOUT_S = 400
HIDDEN_SIZE = 128
# About a third of the lab model's residual norm.
WRITE_NORM = 150.0
# Two runners may sum in another order.
LOGPROB_TOLERANCE = 1e-3
BLOCK_SIZE = 32
NUM_GENERATED = 24
LONG = [5 + (7 * index) % 400 for index in range(60)]
# Tokens that open and close a span: one pair stands in the prompt, and the prompt ends inside another.
OPEN, CLOSE = 11, 13
TALK = [*LONG[:20], OPEN, *LONG[20:40], CLOSE, *LONG[40:50], OPEN, 21]

Answers = list[dict[str, Any]]


def request(prompt: Sequence[int], *terms: tuple[str, float, str, Sequence[str]]) -> dict[str, Any]:
    return {"prompt": list(prompt), "terms": [list(term) for term in terms], "max_tokens": NUM_GENERATED}


REQUESTS = {
    "unsteered": request(LONG),
    "all": request(LONG, ("add", 1.0, "all", ())),
    "other strength": request(LONG, ("add", -1.0, "all", ())),
    "prompt": request(LONG[:33], ("add", 1.0, "prompt", ())),
    "generation": request(LONG[:7], ("add", 1.0, "generation", ())),
    "two terms": request(LONG, ("add", 1.0, "prompt", ()), ("clamp", 1.0, "response", ())),
    "condition": request(LONG[:40], ("condition", 1.0, "all", ())),
    "trigger": request(LONG[:40], ("trigger", 1.0, "all", ())),
    "span": request(TALK, ("add", 1.0, "all", ("reasoning",))),
}


def programs() -> dict[str, Program]:
    generator = torch.Generator().manual_seed(7)
    rows = torch.nn.functional.normalize(torch.randn(2, HIDDEN_SIZE, generator=generator), dim=1)
    read, write = rows[:1], rows[1:] * WRITE_NORM
    gated = (
        Step(1, Kind.CONDITION, read=0, gate_out=0, a=0.0, b=0.0),
        Step(4, Kind.ADD, write=1, gate=0),
    )
    return {
        "add": Program(write, (Step(2, Kind.ADD, write=0),)),
        "clamp": Program(read, (Step(3, Kind.CLAMP, read=0, write=0, a=20.0, b=30.0),)),
        "condition": Program(torch.cat([read, write]), gated, num_gates=1),
        "trigger": Program(write, (Step(5, Kind.ADD, write=0, gate=0),), 1, {0: tuple(LONG[:20])}),
    }


def job(runner: str, rounds: Sequence[Sequence[str]], **settings: Any) -> dict[str, Any]:
    options = {
        "max_model_len": 160,
        "max_num_seqs": len(REQUESTS),
        "block_size": BLOCK_SIZE,
        # Less than the prompts together: they are processed in chunks.
        "max_num_batched_tokens": 48,
        **settings.pop("options", {}),
    }
    return {
        "runner": runner,
        "options": options,
        "eager": True,
        "fusion": "never",
        "async_scheduling": False,
        "spans": {"reasoning": [OPEN, CLOSE]},
        "programs": {name: (spec, data.hex()) for name, (spec, data) in _wires().items()},
        "rounds": [[REQUESTS[name] for name in names] for names in rounds],
        **settings,
    }


def _wires() -> dict[str, tuple[dict[str, Any], bytes]]:
    return {name: program.to_wire() for name, program in programs().items()}


@pytest.fixture(scope="module")
def run(
    vllm_environment: dict[str, str], target: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Run a job in an engine of its own."""

    def run(job: dict[str, Any]) -> dict[str, Any]:
        results = tmp_path_factory.mktemp("engine") / "results.json"
        process = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("engine.py")), str(results)],
            input=json.dumps(job | {"model": str(target)}),
            env=vllm_environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert process.returncode == 0, process.stderr[-4000:]
        answers: dict[str, Any] = json.loads(results.read_text())
        return answers

    return run


@pytest.fixture(scope="module")
def v1(run: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    return run(job("v1", [list(REQUESTS)]))


@pytest.fixture(scope="module")
def v2(run: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    # All in one batch; each alone, its prompt found in the cache.
    return run(job("v2", [list(REQUESTS), *([name] for name in REQUESTS)]))


def assert_same(found: Answers, expected: Answers) -> None:
    assert len(found) == len(expected)
    for name, left, right in zip(REQUESTS, found, expected, strict=False):
        assert left["tokens"] == right["tokens"], name
        assert left["logprobs"] == pytest.approx(right["logprobs"], abs=LOGPROB_TOLERANCE), name
        assert left["steered"] == right["steered"], name


def expected_count(prompt: Sequence[int], tokens: Sequence[int], scope: str, exclude: Sequence[str]) -> int:
    # The last token is never fed back.
    text = [*prompt, *tokens[:-1]]
    scopes = {
        "all": range(len(text)),
        "prompt": range(len(prompt)),
        "generation": range(len(prompt), len(text)),
        "response": range(len(prompt) - 1, len(text)),
    }
    count = inside = 0
    for position, token in enumerate(text):
        if token in (OPEN, CLOSE):
            inside = token == OPEN
        count += position in scopes[scope] and not (exclude and inside)
    return count


def test_each_runner_is_the_one_asked_for(v1: dict[str, Any], v2: dict[str, Any]) -> None:
    assert v1["runner"] == "vllm.v1.worker.cpu_model_runner"
    assert v2["runner"] == "vllm.v1.worker.cpu.model_runner"


def test_v2_equals_v1(v1: dict[str, Any], v2: dict[str, Any]) -> None:
    assert_same(v2["rounds"][0], v1["rounds"][0])


def test_steering_has_an_effect(v2: dict[str, Any]) -> None:
    answers = dict(zip(REQUESTS, v2["rounds"][0], strict=True))
    for name in ("all", "other strength", "two terms"):
        assert answers[name]["logprobs"] != pytest.approx(answers["unsteered"]["logprobs"], abs=0.01), name


def test_counts(v2: dict[str, Any]) -> None:
    for (name, asked), answer in zip(REQUESTS.items(), v2["rounds"][0], strict=True):
        expected = [
            expected_count(asked["prompt"], answer["tokens"], scope, exclude) for _, _, scope, exclude in asked["terms"]
        ]
        assert answer["steered"] == (expected or None), name


def test_alone_and_from_the_cache_equals_together(v2: dict[str, Any]) -> None:
    alone = [answers[0] for answers in v2["rounds"][1:]]
    assert_same(alone, v2["rounds"][0])
    for (name, asked), answer in zip(REQUESTS.items(), alone, strict=True):
        assert answer["cached"] == (len(asked["prompt"]) - 1) // BLOCK_SIZE * BLOCK_SIZE, name


def test_asynchronous_scheduling_and_preemption(
    run: Callable[[dict[str, Any]], dict[str, Any]], v1: dict[str, Any]
) -> None:
    # One block is vLLM's own; the other nine hold three requests of the longest kind.
    scarce = run(job("v2", [list(REQUESTS)], async_scheduling=True, options={"num_gpu_blocks_override": 10}))
    assert scarce["is_pipelined"] and not v1["is_pipelined"]
    assert scarce["counters"]["vllm:num_preemptions"] >= 2
    assert_same(scarce["rounds"][0], v1["rounds"][0])


def test_ngram_speculation(run: Callable[[dict[str, Any]], dict[str, Any]], v1: dict[str, Any]) -> None:
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    # Spans and speculation exclude each other.
    names = [name for name in REQUESTS if name != "span"]
    speculating = run(job("v2", [names], spans={}, options={"speculative_config": drafts}))
    counters = speculating["counters"]
    accepted = counters["vllm:spec_decode_num_accepted_tokens"]
    assert 0 < accepted < counters["vllm:spec_decode_num_draft_tokens"]
    assert_same(speculating["rounds"][0], v1["rounds"][0][: len(names)])


@pytest.mark.slow
def test_compiled_and_fused(run: Callable[[dict[str, Any]], dict[str, Any]], v1: dict[str, Any]) -> None:
    compiled = run(job("v2", [list(REQUESTS)], eager=False, fusion="always"))
    assert compiled["status"]["fused_layers"] == list(range(compiled["status"]["layers"]))
    assert_same(compiled["rounds"][0], v1["rounds"][0])
