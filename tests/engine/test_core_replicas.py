"""Two data-parallel replicas: everything reaches both, and what one of them refuses neither keeps."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

# A process of its own, because importing vLLM changes the one that does it.
DRIVER = """
import asyncio, json, sys
from collections.abc import AsyncIterator
from typing import Any

import torch

from server.engine.program import Program, Step
from server.engine.steering import Steering, Term
from steering_kernels import Kind

PROMPT = {"prompt_token_ids": [5 + (7 * index) % 400 for index in range(40)]}
NUM_REQUESTS = 6


def program(num_rows: int = 3) -> Program:
    return Program(torch.full((num_rows, 128), 40.0), tuple(Step(2, Kind.ADD, write=row) for row in range(num_rows)))


async def main() -> None:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.engine.protocol import StreamingInput
    from vllm.v1.engine.async_llm import AsyncLLM

    from server.engine.client import SteeringEngine, SteeringEngineError
    from server.engine.config import EngineSettings, llm_arguments

    args = AsyncEngineArgs(
        model=sys.argv[1], dtype="float32", max_model_len=256, enforce_eager=True, skip_tokenizer_init=True,
        data_parallel_size=2, **llm_arguments(EngineSettings(8), "cpu"),
    )
    client = AsyncLLM.from_engine_args(args)
    engine = SteeringEngine(client)
    found: dict[str, Any] = {}

    def params(key: str, name: str, num_tokens: int) -> SamplingParams:
        steering = Steering(f"id-{name}", (Term(key, 1.0, "all"),)).to_extra_args()
        return SamplingParams(
            temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, extra_args=steering
        )

    async def ask(name: str, key: str, num_tokens: int = 120, prompt: Any = PROMPT) -> list[Any]:
        with engine.receipts.expect(f"id-{name}") as counts:
            async for output in client.generate(prompt, params(key, name, num_tokens), name):
                final = output
            return [final.outputs[0].finish_reason, list(final.outputs[0].token_ids), *counts.values()]

    async def streamed() -> AsyncIterator[Any]:
        yield StreamingInput(prompt=PROMPT)
        await asyncio.sleep(0.2)
        yield StreamingInput(prompt=PROMPT)

    async def fails(key: str, what: Program) -> list[Any]:
        try:
            await engine.load(key, what)
        except SteeringEngineError as error:
            return [error.code, str(error), await held()]
        return []

    async def held() -> list[Any]:
        return [[each["replica"], each["bundles"]] for each in await engine.status()]

    try:
        await asyncio.gather(engine.self_test(), engine.self_test())
        found["after self-test"] = await held()
        found["loaded"] = await engine.load("a", program())
        found["held"] = [await held(), sorted(await engine.holds())]
        tasks = [asyncio.create_task(ask(f"r{number}", "a")) for number in range(NUM_REQUESTS)]
        while sum((await engine.users()).values()) < NUM_REQUESTS:
            await asyncio.sleep(0.005)
        found["running"] = [each.requests for each in (await engine.counters()).replicas]
        found["used"] = [await engine.unload("a"), await held()]
        found["unknown"] = await ask("unknown", "gone")
        found["streamed"] = (await ask("streamed", "a", prompt=streamed()))[0]
        found["answers"] = await asyncio.gather(*tasks)
        found["ended"] = list((await engine.ended(f"id-r{number}" for number in range(NUM_REQUESTS))).values())
        found["ended again"] = len(await engine.ended(f"id-r{number}" for number in range(NUM_REQUESTS)))
        # Room on one replica only.
        spec, data = program(4).to_wire()
        second = client.engine_core.core_engines[1]
        call = ("collective_rpc", "steering_load", None, ("b", spec, data), {})
        await client.engine_core._call_utility_async(*call, engine=second)
        found["no room"] = await fails("c", program(2))
        found["other bytes"] = await fails("b", program(2))
        found["unloaded"] = [await engine.unload("a"), await engine.unload("b"), await held()]
        found["at the end"] = await ask("last", "a", 3)
    finally:
        client.shutdown()
    with open(sys.argv[2], "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.fixture(scope="module")
def found(
    vllm_environment: dict[str, str],
    target: Path,
    tmp_path_factory: Any,
    run_driver: Callable[[list[str], dict[str, str], Path], None],
) -> dict[str, Any]:
    # vLLM starts its processes anew from the file.
    driver = tmp_path_factory.mktemp("driver") / "driver.py"
    driver.write_text(DRIVER)
    results = driver.with_name("results.json")
    # One core each.
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(driver), str(target), str(results)]
    run_driver(command, vllm_environment | environment, driver.with_name("engine.log"))
    answers: dict[str, Any] = json.loads(results.read_text())
    return answers


def test_two_self_tests_at_once_leave_nothing(found: dict[str, Any]) -> None:
    assert found["after self-test"] == [[0, []], [1, []]]


def test_a_load_reaches_both(found: dict[str, Any]) -> None:
    assert [(each["replica"], each["rank"]) for each in found["loaded"]] == [(0, 0), (1, 0)]
    assert len({each["checksum"] for each in found["loaded"]}) == 1
    assert found["held"] == [[[0, ["a"]], [1, ["a"]]], ["a"]]


def test_both_steer_alike(found: dict[str, Any]) -> None:
    assert sum(found["running"]) == len(found["answers"]) and all(found["running"])
    assert {answer[0] for answer in found["answers"]} == {"length"}
    assert len({tuple(answer[1]) for answer in found["answers"]}) == 1


def test_counts_of_both_come_home(found: dict[str, Any]) -> None:
    assert [answer[2] for answer in found["answers"]] == [[40, 119]] * len(found["answers"])
    assert found["ended"] == [[1, [40, 119], 0]] * len(found["answers"])
    assert found["ended again"] == 0


def test_a_bundle_in_use_stays_on_both(found: dict[str, Any]) -> None:
    assert found["used"] == [False, [[0, ["a"]], [1, ["a"]]]]


def test_what_cannot_be_steered_ends_alone(found: dict[str, Any]) -> None:
    assert found["unknown"] == ["error", []]
    assert found["streamed"] == "error"
    assert found["at the end"] == ["error", []]


def test_a_failed_load_leaves_the_old_state(found: dict[str, Any]) -> None:
    code, message, held = found["no room"]
    assert (code, held) == ("no_room", [[0, ["a"]], [1, ["a", "b"]]])
    assert "replica 1, rank 0: c needs 2 rows, 1 of 8 are free" in message
    code, message, held = found["other bytes"]
    assert (code, held) == ("disagree", [[0, ["a"]], [1, ["a", "b"]]])
    assert "Replica 1, rank 0 holds other bytes for b" in message
    assert found["unloaded"] == [True, True, [[0, []], [1, []]]]
