"""Engine core in a real engine: a bundle in use stays, a request without its bundle ends alone, nothing piles up."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

NUM_CYCLES, NUM_ROWS = 300, 8
# A process of its own, because importing vLLM changes the one that does it.
DRIVER = """
import json, sys
from typing import Any

import torch

from server.engine.program import Program, Step
from server.engine.steering import Steering, Term
from steering_kernels import Kind

NUM_CYCLES, NUM_ROWS = int(sys.argv[3]), int(sys.argv[4])
PROMPT = {"prompt_token_ids": [5 + (7 * index) % 400 for index in range(40)]}


def main() -> None:
    from vllm import EngineArgs, SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

    from server.engine.config import EngineSettings, enable, worker_cls

    config = EngineArgs(
        model=sys.argv[1], dtype="float32", max_model_len=256, block_size=32, enforce_eager=True,
        skip_tokenizer_init=True, worker_cls=worker_cls("cpu"),
        additional_config=EngineSettings(NUM_ROWS).additional_config(),
    ).create_engine_config()
    # vLLM turns it off on a CPU, where it gains nothing; the order of events is a GPU's all the same.
    config.scheduler_config.async_scheduling = sys.argv[2] == "async"
    enable(config)
    engine = LLMEngine.from_vllm_config(config)

    def load(key: str, num_rows: int = 3) -> Any:
        rows = torch.full((num_rows, 128), 40.0)
        steps = tuple(Step(layer % 6, Kind.ADD, write=layer, gate=0) for layer in range(num_rows))
        spec, data = Program(rows, steps, 1, {0: tuple(range(5, 405))}).to_wire()
        return engine.collective_rpc("steering_load", args=(key, spec, data))

    def unload(key: str) -> Any:
        return engine.collective_rpc("steering_unload", args=(key,))

    def core(method: str, *args: Any) -> Any:
        client = engine.engine_core
        call = getattr(client, "call_utility", lambda name, *rest: getattr(client.engine_core, name)(*rest))
        return call(method, *args)

    def add(name: str, key: str | None, **options: Any) -> None:
        steering = Steering(f"id-{name}", (Term(key, 1.0, "all"),)).to_extra_args() if key else None
        params = {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True} | options
        engine.add_request(name, PROMPT, SamplingParams(detokenize=False, extra_args=steering, **params))

    def finish() -> dict[str, Any]:
        outputs: dict[str, Any] = {}
        while engine.has_unfinished_requests():
            outputs |= {each.request_id: each.outputs[0] for each in engine.step() if each.finished}
        return {name: [output.finish_reason, list(output.token_ids)] for name, output in outputs.items()}

    found: dict[str, Any] = {"loaded": load("a"), "other": load("big", NUM_ROWS)}
    add("steered", "a")
    add("plain", None)
    found["used"] = [unload("a"), core("steering_core_status")]
    engine.step()
    engine.step()
    found["running"] = unload("a")
    add("unknown", "gone")
    add("unknown too", "gone")
    found["answers"] = finish()
    # A token that ends the answer: under asynchronous scheduling, a step more is on its way.
    add("stopped", "a", ignore_eos=False, stop_token_ids=found["answers"]["steered"][1][8:9])
    add("again", "a")
    add("plain again", None)
    found["answers"] |= finish()
    add("aborted", "a", max_tokens=200)
    while not any(each.request_id == "aborted" and each.outputs[0].token_ids for each in engine.step()):
        pass
    engine.abort_request(["aborted"])
    finish()
    add("last", None)
    finish()
    found["cache"] = core("steering_core_status", False)["cache"]
    names = ["id-steered", "id-stopped", "id-again", "id-aborted", "id-unknown"]
    found["ended"] = engine.collective_rpc("steering_ended", args=(names,))[0]
    found["free"] = unload("a")
    for number in range(NUM_CYCLES):
        key = f"cycle-{number}"
        assert "error" not in load(key, NUM_ROWS)[0]
        if number % 30 == 0:
            add(key, key, max_tokens=2)
            assert finish()[key][0] == "length"
        assert unload(key) == ["unloaded"]
    # Workers hear of the end of a request with the next step.
    add("after", None)
    found["answers"] |= finish()
    found["status"] = engine.collective_rpc("steering_status")[0]
    found["core"] = core("steering_core_status")
    with open(sys.argv[5], "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module", params=["process", "async", "in process"])
def found(
    request: pytest.FixtureRequest,
    vllm_environment: dict[str, str],
    target: Path,
    tmp_path_factory: Any,
    run_driver: Callable[[list[str], dict[str, str], Path], None],
) -> dict[str, Any]:
    # vLLM starts its processes anew from the file.
    driver = tmp_path_factory.mktemp("driver") / "driver.py"
    driver.write_text(DRIVER)
    results = driver.with_name("results.json")
    is_in_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(request.param != "in process"))}
    command = [sys.executable, str(driver), str(target), request.param, str(NUM_CYCLES), str(NUM_ROWS), str(results)]
    environment = vllm_environment | is_in_process | {"PYTHONPATH": str(Path(__file__).parents[2])}
    run_driver(command, environment, driver.with_name("engine.log"))
    answers: dict[str, Any] = json.loads(results.read_text())
    return answers


def test_a_bundle_in_use_stays(found: dict[str, Any]) -> None:
    unloaded, status = found["used"]
    assert (unloaded, found["running"], found["free"]) == (["in_use"], ["in_use"], ["unloaded"])
    assert (status["resident"], status["users"], status["requests"]) == (["a"], {"a": 1}, 1)


def test_a_load_without_room_leaves_nothing(found: dict[str, Any]) -> None:
    assert "checksum" in found["loaded"][0]
    (answer,) = found["other"]
    assert (answer["code"], answer["rank"]) == ("no_room", 0)


def test_a_request_without_its_bundle_ends_alone(found: dict[str, Any]) -> None:
    assert found["answers"]["unknown"] == found["answers"]["unknown too"] == ["error", []]
    assert found["answers"]["plain"][0] == "length"
    assert found["answers"]["steered"][1] != found["answers"]["plain"][1]
    assert found["answers"]["again"] == found["answers"]["steered"]
    assert found["answers"]["after"] == found["answers"]["plain again"] == found["answers"]["plain"]


def test_workers_count_to_where_the_answer_ends(found: dict[str, Any]) -> None:
    stopped = len(found["answers"]["stopped"][1])
    assert found["answers"]["stopped"][0] == "stop" and stopped <= 9
    # The last token of an answer is never fed back.
    assert found["ended"]["id-steered"] == found["ended"]["id-again"] == [1, [40, 19], 0]
    assert found["ended"]["id-stopped"] == [1, [40, stopped - 1], 0]
    assert found["ended"]["id-aborted"][::2] == [1, 1]
    assert "id-unknown" not in found["ended"]


def test_cache_lookups_are_split(found: dict[str, Any]) -> None:
    """Two of the prompts met their own block of 32 tokens in the cache on either side."""
    assert found["cache"] == {"steered": [160, 96], "unsteered": [120, 64]}


def test_cycles_leave_nothing_behind(found: dict[str, Any]) -> None:
    status = found["status"]
    assert (status["bundles"], status["rows_used"], status["requests"], status["slots_used"]) == ([], 0, 0, 0)
    assert (found["core"]["resident"], found["core"]["users"]) == ([], {})
    assert sum(status["host_time"]["counts"]) > 0
