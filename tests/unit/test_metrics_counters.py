"""Counters of one API process: requests and tokens by profile, refusals, operations."""

import asyncio
import gc
import json
import sys
import threading
import weakref
from http import HTTPStatus
from typing import Any, cast

import pytest

from artifacts.manifest import Scope
from server.engine.steering import Steering
from server.errors import ErrorCode, SteeringRequestError
from server.metrics.counts import sum_choices
from server.metrics.metrics import SteeringMetrics
from server.profiles import Profile, Resolved, ResolvedTerm
from server.registry.records import ProfileSettings

Counts = dict[str, list[int]]


def resolve(*terms: str | tuple[str, float]) -> Resolved:
    """Steering by the profiles of these names, with strength 1 or the given one."""

    def term(name: str, strength: float = 1.0) -> ResolvedTerm:
        settings = ProfileSettings(f"sha256:{name}", 1.0, 2.0, Scope.ALL, None, (), None, "")
        return ResolvedTerm(Profile(name, cast(Any, None), settings), strength, Scope.ALL)

    resolved = tuple(term(each) if isinstance(each, str) else term(*each) for each in terms)
    return Resolved(resolved, Steering("id", ()))


def profiles(metrics: SteeringMetrics) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(metrics.snapshot()))["profiles"]
    return found


def tokens(metrics: SteeringMetrics, name: str) -> tuple[int, int]:
    found = profiles(metrics)[name]["tokens"]
    return found["prompt"], found["generation"]


def test_series_exist_from_registration_and_go_with_the_name() -> None:
    metrics = SteeringMetrics()
    assert set(profiles(metrics)) == {"other"}
    metrics.register(["a", "b"])
    assert profiles(metrics)["a"] == {
        "requests": {"ok": 0, "refused": 0, "aborted": 0, "failed": 0},
        "tokens": {"prompt": 0, "generation": 0},
        "active": 0,
    }
    metrics.register(["b"])
    assert set(profiles(metrics)) == {"b", "other"}


def test_a_request_counts_while_it_runs_and_after() -> None:
    metrics = SteeringMetrics()
    metrics.register(["a"])
    counts: Counts = {}
    request = resolve("a")
    metrics.admitted(request, counts)
    assert profiles(metrics)["a"]["active"] == 1
    assert tokens(metrics, "a") == (0, 0)
    counts["x-0"] = [5, 1]
    counts["x-1"] = [5, 2]
    assert tokens(metrics, "a") == (10, 3)
    counts["x-1"] = [5, 9]
    metrics.ended(request, "ok", counts)
    assert tokens(metrics, "a") == (10, 10)
    found = profiles(metrics)["a"]
    assert found["active"] == 0
    assert found["requests"] == {"ok": 1, "refused": 0, "aborted": 0, "failed": 0}


def test_a_second_end_counts_nothing() -> None:
    metrics = SteeringMetrics()
    metrics.register(["a"])
    request = resolve("a")
    metrics.admitted(request, {})
    metrics.ended(request, "ok", {"x": [1, 1]})
    metrics.ended(request, "aborted", {"x": [1, 1]})
    assert tokens(metrics, "a") == (1, 1)
    assert profiles(metrics)["a"]["requests"] == {"ok": 1, "refused": 0, "aborted": 0, "failed": 0}
    assert profiles(metrics)["a"]["active"] == 0


def test_an_unknown_outcome_is_refused() -> None:
    with pytest.raises(ValueError, match="vanished"):
        SteeringMetrics().ended(resolve("a"), "vanished", {})


def test_each_profile_of_a_request_counts_its_own_tokens() -> None:
    metrics = SteeringMetrics()
    metrics.register(["a", "b", "off"])
    request = resolve("a", ("off", 0.0), "b", "a")
    metrics.admitted(request, {})
    # Three terms have a strength.
    metrics.ended(request, "ok", {"x": [1, 10, 2, 20, 4, 40], "y": [100, 0, 100, 0, 100, 0]})
    assert tokens(metrics, "a") == (205, 50)
    assert tokens(metrics, "b") == (102, 20)
    assert tokens(metrics, "off") == (0, 0)
    assert [profiles(metrics)[name]["requests"]["ok"] for name in ("a", "b", "off", "other")] == [1, 1, 1, 0]


def test_names_beyond_the_cap_and_unknown_ones_count_under_other() -> None:
    metrics = SteeringMetrics(max_labels=2)
    metrics.register(["a", "b", "c"])
    assert set(profiles(metrics)) == {"a", "b", "other"}
    for name in ("c", "d", "other"):
        request = resolve(name)
        metrics.admitted(request, {})
        metrics.ended(request, "ok", {"x": [1, 2]})
    assert tokens(metrics, "other") == (3, 6)
    # A label that becomes free goes to a name that waits; who has one keeps it.
    metrics.register(["0", "b", "c"])
    assert set(profiles(metrics)) == {"b", "0", "other"}
    assert tokens(metrics, "other") == (3, 6)


def test_a_profile_named_other_shares_the_label() -> None:
    metrics = SteeringMetrics()
    metrics.register(["other", "a"])
    request = resolve("other")
    metrics.admitted(request, {})
    metrics.ended(request, "ok", {"x": [1, 2]})
    assert tokens(metrics, "other") == (1, 2)


def test_a_name_that_comes_again_starts_at_zero() -> None:
    metrics = SteeringMetrics()
    metrics.register(["a"])
    request = resolve("a")
    metrics.admitted(request, {})
    metrics.ended(request, "ok", {"x": [7, 7]})
    metrics.register([])
    metrics.register(["a"])
    assert tokens(metrics, "a") == (0, 0)
    assert profiles(metrics)["a"]["requests"]["ok"] == 0


def test_requests_outlive_their_name_under_other() -> None:
    metrics = SteeringMetrics()
    metrics.register(["a", "b"])
    counts: Counts = {"x": [5, 3, 5, 3]}
    request = resolve("a", "b")
    metrics.admitted(request, counts)
    metrics.register(["b"])
    # What it had went with the name; what comes counts.
    assert tokens(metrics, "other") == (0, 0)
    assert profiles(metrics)["other"]["active"] == 1
    metrics.register(["b", "a"])
    counts["x"] = [5, 10, 5, 10]
    assert tokens(metrics, "other") == (0, 7)
    metrics.ended(request, "failed", counts)
    assert tokens(metrics, "other") == (0, 7)
    assert tokens(metrics, "b") == (5, 10)
    assert tokens(metrics, "a") == (0, 0)
    assert [profiles(metrics)[name]["requests"]["failed"] for name in ("a", "b", "other")] == [0, 1, 1]
    assert [profiles(metrics)[name]["active"] for name in ("a", "b", "other")] == [0, 0, 0]


def test_tokens_never_shrink_when_the_last_step_takes_drafts_off() -> None:
    metrics = SteeringMetrics()
    metrics.register(["a"])
    first, second = resolve("a"), resolve("a")
    counts: Counts = {"x": [4, 9]}
    metrics.admitted(first, counts)
    assert tokens(metrics, "a") == (4, 9)
    counts["x"] = [4, 7]
    metrics.ended(first, "ok", counts)
    assert tokens(metrics, "a") == (4, 9)
    metrics.admitted(second, {"y": [0, 5]})
    assert tokens(metrics, "a") == (4, 12)


def test_refusals_count_by_code_and_by_registered_profile() -> None:
    metrics = SteeringMetrics()
    metrics.register(["a"])
    metrics.refused("steering_strength_invalid", ["a", "a"])
    metrics.refused("steering_profile_not_found", ["a@sha256:0", "nobody", "never"])
    metrics.refused("steering_profile_invalid", [])
    snapshot = metrics.snapshot()
    assert snapshot["profiles"]["a"]["requests"]["refused"] == 2
    assert snapshot["profiles"]["other"]["requests"]["refused"] == 2
    assert {code for code, number in snapshot["refusals"].items() if number} == {
        "steering_strength_invalid",
        "steering_profile_not_found",
        "steering_profile_invalid",
    }
    assert set(snapshot["refusals"]) == {code.value for code in ErrorCode}


def test_codes_make_no_series_without_end() -> None:
    metrics = SteeringMetrics()
    for index in range(1000):
        metrics.refused(f"code_{index}", [])
    refusals = metrics.snapshot()["refusals"]
    assert len(refusals) <= 65
    assert sum(refusals.values()) == 1000


class Failure(RuntimeError):
    code = "no_room"


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (SteeringRequestError(ErrorCode.CONFLICT, "no", HTTPStatus.CONFLICT), "refused", ErrorCode.CONFLICT.value),
        (SteeringRequestError(ErrorCode.CONFLICT, "no", HTTPStatus.BAD_GATEWAY), "failed", ErrorCode.CONFLICT.value),
        (Failure(), "failed", "no_room"),
        (OSError(28, "full"), "failed", "internal"),
        (SystemExit(3), "aborted", None),
        (asyncio.CancelledError(), "aborted", None),
    ],
)
def test_operations_count_by_how_they_end(error: BaseException, outcome: str, reason: str | None) -> None:
    metrics = SteeringMetrics(operations=["put_profile"])
    with metrics.operation("put_profile"):
        pass
    with pytest.raises(type(error)), metrics.operation("put_profile"):
        raise error
    found = metrics.snapshot()["operations"]["put_profile"]
    assert found["outcomes"] == {"ok": 1, "refused": 0, "failed": 0, "aborted": 0} | {outcome: 1}
    assert found["reasons"] == ({reason: 1} if reason else {})
    assert sum(found["buckets"]) == 2


async def test_operations_are_timed_across_awaits() -> None:
    metrics = SteeringMetrics()
    with metrics.operation("upload"):
        await asyncio.sleep(0.06)
    found = metrics.snapshot()["operations"]["upload"]
    assert 0.06 <= found["sum_s"] < 5
    # Nothing at or below 50 ms.
    assert sum(found["buckets"][:4]) == 0


def test_nothing_stays_of_a_request() -> None:
    metrics = SteeringMetrics()
    metrics.register(["a"])
    request = resolve("a")
    gone = weakref.ref(request)
    metrics.admitted(request, {})
    metrics.ended(request, "ok", {})
    del request
    gc.collect()
    assert gone() is None


def test_a_finalizer_may_end_a_request_in_the_middle_of_any_call(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = SteeringMetrics()
    metrics.register(["a"])
    abandoned, running = resolve("a"), resolve("a")
    metrics.admitted(abandoned, {})
    metrics.admitted(running, {"y": [0, 1]})

    def collecting(*args: Any) -> Any:
        metrics.ended(abandoned, "aborted", {"x": [1, 1]})
        return sum_choices(*args)

    monkeypatch.setattr("server.metrics.profile_counters.sum_choices", collecting)
    metrics.snapshot()
    monkeypatch.undo()
    assert profiles(metrics)["a"]["requests"]["aborted"] == 1
    assert tokens(metrics, "a") == (1, 2)


def test_threads_lose_nothing_and_sums_only_grow() -> None:
    metrics = SteeringMetrics()
    metrics.register(["a"])
    num_threads, num_requests = 4, 300
    seen: list[tuple[int, int]] = []
    is_over = threading.Event()
    errors: list[BaseException] = []

    def serve() -> None:
        try:
            for _ in range(num_requests):
                counts: Counts = {}
                request = resolve("a")
                metrics.admitted(request, counts)
                for step in range(3):
                    counts[f"x-{step}"] = [1, step]
                metrics.ended(request, "ok", counts)
        except BaseException as error:
            errors.append(error)
            raise

    def scrape() -> None:
        while not is_over.is_set():
            seen.append(tokens(metrics, "a"))

    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        scraper = threading.Thread(target=scrape)
        scraper.start()
        threads = [threading.Thread(target=serve) for _ in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        is_over.set()
        scraper.join()
    finally:
        sys.setswitchinterval(interval_s)
    assert not errors
    assert seen == sorted(seen)
    total = num_threads * num_requests * 3
    assert tokens(metrics, "a") == (total, total)
    assert profiles(metrics)["a"]["active"] == 0
