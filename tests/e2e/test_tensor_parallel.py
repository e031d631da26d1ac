"""Two ranks answer like one."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.engine

# Absolute, on log-probabilities in fp32: two ranks add partial sums in another order than one.
TOLERANCE = 2e-4
PROFILES: list[Any] = [
    None,
    "careful",
    {"name": "early", "strength": 1.5},
    {"name": "every", "strength": -0.5, "scope": "response"},
    {"name": "double", "strength": 2.0, "scope": "generation"},
    [{"name": "late", "scope": "prompt"}, {"name": "early", "strength": -1.0}],
]


@pytest.fixture(scope="module")
def two_ranks(start_server: Callable[..., Any]) -> Iterator[Any]:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("two ranks need two cores")
    flags = ("--enforce-eager", "--tensor-parallel-size", "2", "--max-num-seqs", "40")
    with start_server("two-ranks", *flags, VLLM_CPU_OMP_THREADS_BIND=f"{cores[0]}|{cores[1]}") as server:
        yield server


def test_answers(
    two_ranks: Any, eager: Any, ask: Callable[..., Any], difference: Callable[..., float], text_tokens: list[int]
) -> None:
    requests = [(text_tokens[90 * index :][: 30 + 4 * index], PROFILES[index % 6]) for index in range(18)]
    ours = two_ranks.map(lambda request: ask(two_ranks, *request, max_tokens=24), requests)
    expected = eager.map(lambda request: ask(eager, *request, max_tokens=24), requests)
    assert max(difference(*pair) for pair in zip(ours, expected, strict=True)) < TOLERANCE


def test_receipt_counts_a_token_once(two_ranks: Any) -> None:
    answer = two_ranks.complete("What is 7 plus 5?", max_tokens=5, ignore_eos=True, steering_profile="careful")
    assert answer["steering"]["tokens_steered"] == answer["usage"]["prompt_tokens"] + 4


def test_both_ranks_hold_the_same(two_ranks: Any) -> None:
    first, second = two_ranks.steering_status()
    assert (first.pop("rank"), second.pop("rank")) == (0, 1)
    own = ("pid", "uptime_s", "host_time")
    assert {key: first[key] for key in first if key not in own} == {
        key: second[key] for key in second if key not in own
    }
    assert (first["requests"], first["slots_used"]) == (0, 0)
