"""The API process's view of two replicas with two ranks each, which hold pools and cores of their own."""

import asyncio
from functools import partial
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from server.engine.batch import Sizes, SteeredBatch
from server.engine.client import EngineErrorCode, SteeringEngine, SteeringEngineError
from server.engine.core import SteeringCore, collective_rpc, steering_core_status, steering_undo
from server.engine.counters import CacheTokens
from server.engine.ended import Ended
from server.engine.program import Program, Step, checksum
from server.engine.self_test import Probe, _effects
from server.engine.steering import Steering, Term
from server.engine.worker import SteeringWorker
from steering_kernels import Kind

SIZES = Sizes(num_rows=4, num_layers=3, hidden_size=4, vocab_size=20, max_num_reqs=2, max_num_tokens=8)


class Worker(SteeringWorker):
    """The steering worker with a batch and no model; `spoil` changes the bytes that reach it."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.spoil = False
        self._started_s = 0.0
        self.model_runner = SimpleNamespace(
            steering=SteeredBatch(SIZES, torch.float32, torch.device("cpu")),
            steered_model=SimpleNamespace(fused=(), in_place=(0, 1, 2)),
        )
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(world_size=2, tensor_parallel_size=2))

    def steering_load(self, bundle: str, spec: Any, data: bytes) -> dict[str, Any]:
        return super().steering_load(bundle, spec, bytes(len(data)) if self.spoil else data)

    @property
    def pool(self) -> Any:
        return self._batch.pool


class Replica:
    """Engine core with our functions in the place of vLLM's."""

    collective_rpc = collective_rpc
    steering_undo = steering_undo
    steering_core_status = steering_core_status

    def __init__(self) -> None:
        self.workers = [Worker(0), Worker(1)]
        self.scheduler = SimpleNamespace(requests={})
        self.scheduler.steering = SteeringCore(self.scheduler, ())

    def unguarded_collective_rpc(self, method: str, timeout: Any, args: Any, kwargs: Any) -> list[Any]:
        return [getattr(worker, method)(*args) for worker in self.workers]


class Cores:
    def __init__(self) -> None:
        self.replicas = [Replica(), Replica()]

    async def call_utility_all_async(self, method: str, *args: Any) -> list[Any]:
        args = msgspec.msgpack.decode(msgspec.msgpack.encode(args))
        return [getattr(replica, method)(*args) for replica in self.replicas]


@pytest.fixture
def cores() -> Cores:
    return Cores()


@pytest.fixture
def engine(cores: Cores) -> SteeringEngine:
    processor = SimpleNamespace(process_outputs=lambda engine_core_outputs: None, request_states={})
    return SteeringEngine(SimpleNamespace(engine_core=cores, output_processor=processor, errored=False))


def program(num_rows: int = 1, layer: int = 0) -> Program:
    return Program(torch.ones(num_rows, 4), (Step(layer, Kind.ADD, write=0),))


def held(cores: Cores) -> list[list[str]]:
    """What every rank holds."""
    return [worker.pool.bundles for replica in cores.replicas for worker in replica.workers]


async def test_load_and_unload(engine: SteeringEngine, cores: Cores) -> None:
    answers = await engine.load("a", program(2))
    expected = checksum(*program(2).to_wire())
    assert expected == checksum(*program(2).to_wire())
    assert answers == [
        {"replica": replica, "rank": rank, "checksum": expected} for replica in range(2) for rank in range(2)
    ]
    assert await engine.load("a", program(2)) == answers
    assert (held(cores), await engine.holds()) == ([["a"]] * 4, {"a"})
    assert await engine.unload("a")
    assert await engine.unload("a")
    assert (held(cores), await engine.holds()) == ([[]] * 4, set())


async def refused(engine: SteeringEngine, key: str, what: Program) -> SteeringEngineError:
    with pytest.raises(SteeringEngineError) as caught:
        await engine.load(key, what)
    return caught.value


async def test_no_room_on_one_rank(engine: SteeringEngine, cores: Cores) -> None:
    cores.replicas[1].workers[1].pool.load("other", program(3))
    error = await refused(engine, "a", program(2))
    assert error.code is EngineErrorCode.NO_ROOM == "no_room"
    assert "replica 1, rank 1: a needs 2 rows, 1 of 4 are free" in str(error)
    assert held(cores) == [[], [], [], ["other"]]
    assert cores.replicas[0].workers[0].pool.num_used == 0


async def test_a_program_that_cannot_run(engine: SteeringEngine, cores: Cores) -> None:
    error = await refused(engine, "a", program(layer=3))
    assert (error.code, held(cores)) == (EngineErrorCode.REJECTED, [[]] * 4)
    assert "replica 0, rank 0: it uses layer 3, there are 3" in str(error)


@pytest.mark.parametrize("spoilt", [[(0, 1)], [(1, 0)], [(1, 0), (1, 1)], [(0, 0), (0, 1), (1, 0), (1, 1)]])
async def test_other_bytes(engine: SteeringEngine, cores: Cores, spoilt: list[tuple[int, int]]) -> None:
    for replica, rank in spoilt:
        cores.replicas[replica].workers[rank].spoil = True
    error = await refused(engine, "a", program())
    assert error.code is EngineErrorCode.DISAGREE
    assert "Replica {}, rank {} holds other bytes".format(*spoilt[0]) in str(error)
    assert (held(cores), await engine.holds()) == ([[]] * 4, set())


async def test_a_failure_leaves_what_was_there_before(engine: SteeringEngine, cores: Cores) -> None:
    """One replica holds the bundle already, the other one has no room for it."""
    spec, data = program(2).to_wire()
    cores.replicas[0].collective_rpc("steering_load", None, ("a", spec, data), {})
    cores.replicas[1].workers[0].pool.load("other", program(3))
    error = await refused(engine, "a", program(2))
    assert error.code is EngineErrorCode.NO_ROOM
    assert held(cores) == [["a"], ["a"], ["other"], []]
    assert await engine.holds() == set()


async def test_another_program_of_the_same_key(engine: SteeringEngine, cores: Cores) -> None:
    await engine.load("a", program(2))
    error = await refused(engine, "a", program(1))
    assert (error.code, held(cores)) == (EngineErrorCode.DISAGREE, [["a"]] * 4)


async def test_a_dead_engine(engine: SteeringEngine, cores: Cores) -> None:
    async def die(method: str, *args: Any) -> list[Any]:
        raise RuntimeError("EngineCore encountered an issue")

    cores.call_utility_all_async = die  # type: ignore[method-assign]
    error = await refused(engine, "a", program())
    assert (error.code, str(error)) == (EngineErrorCode.FAILED, "Cannot load a: EngineCore encountered an issue")


async def test_an_engine_that_dies_without_an_answer(engine: SteeringEngine, cores: Cores) -> None:
    """As when its process is killed: vLLM answers the requests that it knows of, and forgets calls like ours."""

    async def never(method: str, *args: Any) -> list[Any]:
        engine._client.errored = True
        await asyncio.Event().wait()
        raise AssertionError

    cores.call_utility_all_async = never  # type: ignore[method-assign]
    async with asyncio.timeout(10):
        error = await refused(engine, "a", program())
        assert "The engine has died" in str(error)
        with pytest.raises(SteeringEngineError, match="has died"):
            await engine.status()


def steered(key: str) -> Any:
    steering = Steering("id", (Term(key, 1.0, "all"),))
    return SimpleNamespace(sampling_params=SimpleNamespace(extra_args=steering.to_extra_args()))


async def test_a_request_keeps_its_bundle(engine: SteeringEngine, cores: Cores) -> None:
    await engine.load("a", program())
    cores.replicas[1].scheduler.requests["r"] = steered("a")
    assert await engine.users() == {"a": 1}
    assert not await engine.unload("a")
    assert held(cores) == [["a"]] * 4, "nothing is unloaded anywhere while one replica needs it"
    cores.replicas[1].scheduler.requests.clear()
    assert await engine.unload("a")


async def test_status_and_counters(engine: SteeringEngine, cores: Cores) -> None:
    await engine.load("a", program(3))
    cores.replicas[1].scheduler.requests["r"] = steered("a")
    cores.replicas[1].scheduler.steering.cache.add(True, 8, 5)
    cores.replicas[0].workers[1]._batch.times.add(20_000)
    status = await engine.status()
    assert [(each["replica"], each["rank"]) for each in status] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {(each["rows_used"], each["rows_total"], *each["bundles"]) for each in status} == {(3, 4, "a")}
    assert all(each["uptime_s"] > 0 and each["pid"] > 0 for each in status)
    counters = await engine.counters()
    assert [(each.replica, each.rank) for each in counters.ranks] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {(each.num_bundles, each.rows_used, each.slots_used) for each in counters.ranks} == {(1, 3, 0)}
    assert [sum(each.host_time.counts) for each in counters.ranks] == [0, 1, 0, 0]
    assert counters.ranks[1].host_time.counts[1] == 1 and counters.ranks[1].host_time.sum_s == 2e-5
    assert [each.requests for each in counters.replicas] == [0, 1]
    assert counters.replicas[1].steered == CacheTokens(8, 5) and counters.replicas[1].unsteered == CacheTokens(0, 0)


async def test_ended_requests_of_all_replicas(engine: SteeringEngine, cores: Cores) -> None:
    for replica, counts in enumerate([(1, 2), (3, 4)]):
        for worker in cores.replicas[replica].workers:
            # Both ranks of a replica count the same request.
            worker._batch.ended.add("x", counts, is_aborted=replica == 1)
    assert await engine.ended(["x", "y"]) == {"x": Ended(2, (4, 6), 1)}
    assert await engine.ended(["x"]) == {}
    assert cores.replicas[0].workers[1]._batch.ended.take(["x"]) == {}, "the other ranks forget it too"


PLAIN = Probe((-1.0, -2.0), 0)
NOISY = Probe((-1.01, -2.0), 0)
effects = partial(_effects, PLAIN, place=" of replica 1")


@pytest.mark.parametrize(
    ("after", "logprobs", "problems"),
    [
        (PLAIN, [(-1.0, -2.001), (-5.0, -2.0)], []),
        (PLAIN, [(-1.0, -2.0), (-5.0, -2.0), (-1.0, -2.0)], ["steering has no effect at layers [0, 2] of replica 1"]),
        (PLAIN, [(-5.0, float("nan"))], ["steering has no effect at layers [0] of replica 1"]),
        (PLAIN, [(-5.0, float("-inf"))], ["steering has no effect at layers [0] of replica 1"]),
        (NOISY, [(-1.0, -2.5), (-5.0, -2.0)], []),
        (NOISY, [(-1.0, -2.02), (-5.0, -2.0)], ["steering has no effect at layers [0] of replica 1"]),
        (
            Probe((-4.0, -2.0), 0),
            [(-5.0, -2.0)],
            ["an unsteered request after steered ones of replica 1 has other log-probabilities"],
        ),
    ],
)
def test_what_the_self_test_concludes(after: Probe, logprobs: list[tuple[float, ...]], problems: list[str]) -> None:
    assert effects(after, [Probe(each, 9) for each in logprobs]) == problems
