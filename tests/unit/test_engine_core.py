"""What engine core lets through: requests whose bundles are resident, and loads that every rank acknowledges."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from server.engine.core import _MAX_REFUSED_SESSIONS, IN_USE, SteeringCore
from server.engine.program import Program, Step
from server.engine.steering import Steering, Term
from steering_kernels import MAX_OPS, NUM_GATES, Kind


def request(*terms: Term, request_id: str = "r", resumable: bool = False) -> Any:
    extra_args = Steering("id", terms).to_extra_args() if terms else None
    return SimpleNamespace(
        request_id=request_id, resumable=resumable, sampling_params=SimpleNamespace(extra_args=extra_args)
    )


def spec(*layers: int, num_gates: int = 0) -> Any:
    return Program(torch.ones(1, 4), tuple(Step(layer, Kind.ADD, write=0) for layer in layers), num_gates).to_wire()[0]


class Ranks:
    """Two ranks that answer as they are told, and what was asked of them."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        self.answers = list(answers) or [{"rank": 0, "checksum": "c"}, {"rank": 1, "checksum": "c"}]
        self.calls: list[str] = []

    def load(self) -> list[Any]:
        self.calls.append("load")
        return self.answers

    def unload(self) -> list[Any]:
        self.calls.append("unload")
        return ["unloaded", "unloaded"]


@pytest.fixture
def scheduler() -> Any:
    return SimpleNamespace(requests={})


@pytest.fixture
def core(scheduler: Any) -> SteeringCore:
    core = SteeringCore(scheduler, ["reasoning"])
    for key in ("a", "b"):
        core.load(key, spec(1, 1, 2), Ranks().load, pytest.fail)
    return core


def test_requests_that_can_run(core: SteeringCore) -> None:
    assert core.refusal(request()) is None
    assert core.refusal(request(resumable=True)) is None
    assert core.refusal(SimpleNamespace(request_id="p", resumable=False, sampling_params=None)) is None
    assert core.refusal(request(Term("a", 1.0, "all", ("reasoning",)), Term("b", 1.0, "prompt"))) is None


@pytest.mark.parametrize(
    ("terms", "reason"),
    [
        ([Term("a", 1.0, "all"), Term("gone", 1.0, "all")], "gone is not resident"),
        ([Term("a", 1.0, "all", ("tool_calls",))], "this engine cannot leave out tool_calls"),
        ([Term("a", 1.0, "all")] * (MAX_OPS // 2 + 1), f"more than {MAX_OPS} interventions at one layer"),
    ],
)
def test_requests_that_cannot(core: SteeringCore, terms: list[Term], reason: str) -> None:
    found = core.refusal(request(*terms))
    assert found is not None and reason in found


def test_gates_of_several_bundles(core: SteeringCore) -> None:
    core.load("g", spec(1, num_gates=NUM_GATES), Ranks().load, pytest.fail)
    assert core.refusal(request(Term("g", 1.0, "all"))) is None
    assert core.refusal(request(Term("g", 1.0, "all"), Term("a", 1.0, "all"))) is None
    assert "gates" in str(core.refusal(request(Term("g", 1.0, "all"), Term("g", 1.0, "prompt"))))


@pytest.mark.parametrize(
    "data", [{}, {"id": "x"}, {"id": "x", "terms": [["a"]]}, {"id": "x", "terms": [["a", "?", 1, 1]]}]
)
def test_steering_that_nobody_can_read(core: SteeringCore, data: Any) -> None:
    params = SimpleNamespace(extra_args={"steering": data})
    found = core.refusal(SimpleNamespace(request_id="r", resumable=False, sampling_params=params))
    assert found is not None and "cannot be read" in found


def test_streamed_input_cannot_be_steered(core: SteeringCore) -> None:
    steered = Term("a", 1.0, "all")
    assert "streamed" in str(core.refusal(request(steered, resumable=True)))
    assert "streamed" in str(core.refusal(request(steered, resumable=True)))
    assert core.refusal(request(steered)) == "its session was refused", "the message that ends the session"
    assert core.refusal(request(steered)) is None, "another request of that name"
    for number in range(2 * _MAX_REFUSED_SESSIONS):
        core.refusal(request(steered, request_id=str(number), resumable=True))
    assert len(core._refused_sessions) == _MAX_REFUSED_SESSIONS


@pytest.mark.parametrize(
    "answers",
    [
        [{"rank": 0, "checksum": "c"}, {"rank": 1, "error": "full", "code": "no_room"}],
        [{"rank": 0, "checksum": "c"}, {"rank": 1, "checksum": "d"}],
    ],
)
def test_a_load_that_a_rank_does_not_confirm_is_undone(core: SteeringCore, answers: list[dict[str, Any]]) -> None:
    ranks = Ranks(*answers)
    assert core.load("c", spec(1), ranks.load, ranks.unload) == answers
    assert ranks.calls == ["load", "unload"]
    assert "c is not resident" in str(core.refusal(request(Term("c", 1.0, "all"))))


def test_a_rank_that_fails_is_an_answer(core: SteeringCore) -> None:
    ranks = Ranks()

    def load() -> list[Any]:
        raise RuntimeError("Worker failed with error")

    (answer,) = core.load("c", spec(1), load, ranks.unload)
    assert (answer["code"], answer["error"]) == ("failed", "Worker failed with error")
    assert ranks.calls == ["unload"]


def test_a_load_of_what_is_resident_is_never_undone(core: SteeringCore) -> None:
    other = Ranks({"rank": 0, "checksum": "old"}, {"rank": 1, "checksum": "older"})
    assert core.load("a", spec(1), other.load, pytest.fail) == other.answers
    assert core.refusal(request(Term("a", 1.0, "all"))) is None


def test_stamps(core: SteeringCore) -> None:
    first, second = (core.load("c", spec(1), Ranks().load, pytest.fail) for _ in range(2))
    stamps = {answer["stamp"] for answer in first}
    assert len(stamps) == 1 and not any("stamp" in answer for answer in second)
    assert core.has_stamp("c", [*stamps, "other"])
    assert not core.has_stamp("c", ["other"])
    assert not core.has_stamp("gone", list(stamps))
    core.unload("c", Ranks().unload)
    core.load("c", spec(1), Ranks().load, pytest.fail)
    assert not core.has_stamp("c", list(stamps)), "somebody else has loaded it since"


def test_what_is_used_is_not_unloaded(core: SteeringCore, scheduler: Any) -> None:
    scheduler.requests |= {"r": request(Term("a", 1.0, "all"), Term("a", 2.0, "prompt")), "plain": request()}
    ranks = Ranks()
    assert core.unload("a", ranks.unload) == [IN_USE]
    assert ranks.calls == []
    assert core.users() == {"a": 1}
    assert core.refusal(request(Term("a", 1.0, "all"))) is None
    assert core.unload("b", ranks.unload) == ["unloaded", "unloaded"]
    assert core.refusal(request(Term("b", 1.0, "all"))) == "b is not resident"
    scheduler.requests.clear()
    assert core.unload("a", ranks.unload) == ["unloaded", "unloaded"]


def test_a_bundle_is_forgotten_before_the_ranks_are_asked(core: SteeringCore) -> None:
    def fail() -> list[Any]:
        raise RuntimeError("Worker failed with error")

    with pytest.raises(RuntimeError):
        core.unload("a", fail)
    assert core.refusal(request(Term("a", 1.0, "all"))) == "a is not resident"


def test_status(core: SteeringCore, scheduler: Any) -> None:
    scheduler.requests |= {"1": request(Term("a", 1.0, "all")), "2": request(Term("a", 1.0, "all")), "3": request()}
    core.cache.add(True, 10, 4)
    core.cache.add(False, 5, 5)
    core.cache.add(True, 1, 0)
    brief = core.status(with_bundles=False)
    assert brief["requests"] == 2
    assert brief["cache"] == {"steered": [11, 4], "unsteered": [5, 5]}
    assert core.status(with_bundles=True) == brief | {"resident": ["a", "b"], "users": {"a": 2}}
