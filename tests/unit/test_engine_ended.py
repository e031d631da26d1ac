"""Final counts that the workers keep, and the histogram of what steering costs their hosts."""

import pytest

from server.engine.ended import EndedRequests
from server.engine.step_times import BOUNDS_S, StepTimes


def test_requests_of_one_steering_add_up_and_are_handed_over_once() -> None:
    ended = EndedRequests()
    ended.add("x", [3, 1], is_aborted=False)
    ended.add("y", (5, 5, 0, 0), is_aborted=False)
    ended.add("x", [4, 0], is_aborted=True)
    assert ended.take(["x", "z"]) == {"x": [2, (7, 1), 1]}
    assert ended.take(["x", "y"]) == {"y": [1, (5, 5, 0, 0), 0]}
    ended.add("x", [1, 1], is_aborted=False)
    assert ended.take(["x"]) == {"x": [1, (1, 1), 0]}


def test_the_oldest_are_dropped() -> None:
    ended = EndedRequests(capacity=3)
    for number in range(10):
        ended.add(str(number), [number], is_aborted=False)
    assert set(ended.take(map(str, range(10)))) == {"7", "8", "9"}


def test_requests_with_other_terms_do_not_add_up() -> None:
    ended = EndedRequests()
    ended.add("x", [1, 2], is_aborted=False)
    ended.add("x", [1, 2, 3, 4], is_aborted=False)
    assert ended.take(["x"]) == {"x": [1, (1, 2, 3, 4), 0]}


@pytest.mark.parametrize(
    ("duration_ns", "bucket"),
    [(0, 0), (10_000, 0), (10_001, 1), (1_000_000, 6), (100_000_000, 12), (100_000_001, 13), (10**12, 13)],
)
def test_buckets(duration_ns: int, bucket: int) -> None:
    times = StepTimes()
    times.add(duration_ns)
    found = times.to_wire()
    assert found["counts"] == [int(index == bucket) for index in range(len(BOUNDS_S) + 1)]
    assert found["sum_s"] == duration_ns / 1e9
    assert found["bounds_s"] == sorted(BOUNDS_S) and (BOUNDS_S[0], BOUNDS_S[-1]) == (1e-5, 1e-1)
