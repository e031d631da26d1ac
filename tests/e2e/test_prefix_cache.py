"""The prefix cache never serves blocks made under another steering, and shares all others."""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest

pytestmark = pytest.mark.engine

# Absolute, on log-probabilities in fp32: a cached prompt is computed in other chunks than a cold one.
TOLERANCE = 2e-4
BLOCK = 32
LONG = 6 * BLOCK + 8


def term(name: str, strength: float = 1.0, scope: str = "all") -> dict[str, Any]:
    return {"name": name, "strength": strength, "scope": scope}


class Counted:
    """Asks a server and reads off vLLM's counts of cached tokens."""

    def __init__(self, server: Any, read_answer: Callable[..., Any]) -> None:
        self.server = server
        self._read = read_answer

    def ask(self, prompt: list[int], profile: Any, **fields: Any) -> tuple[Any, int]:
        """The answer, and how many of its prompt tokens came from the cache according to both of vLLM's counters."""
        steering = {} if profile is None else {"steering_profile": profile}
        body = {"max_tokens": 8, "logprobs": 5, "return_tokens_as_token_ids": True, "ignore_eos": True}
        before = self.server.metric("vllm:prefix_cache_hits_total")
        answer = self.server.complete(prompt, **body | steering | fields)
        hits = int(self.server.metric("vllm:prefix_cache_hits_total") - before)
        # The detail is left out where it is zero.
        details = answer["usage"].get("prompt_tokens_details") or {}
        assert hits == (details.get("cached_tokens") or 0)
        return self._read(answer["choices"][0]), hits


@pytest.fixture
def counted(eager: Any, read_answer: Callable[..., Any]) -> Counted:
    return Counted(eager, read_answer)


def test_sequence_on_one_prompt(counted: Counted, text_tokens: list[int], difference: Callable[..., float]) -> None:
    prompt = text_tokens[1000 : 1000 + LONG]
    full = LONG - LONG % BLOCK
    sequence = [
        (None, 0),
        (term("early"), 0),
        (term("late"), 0),
        (term("early", 2.0), 0),
        (None, full),
        (term("early", scope="generation"), full),
        # The last prompt token lies behind the last full block.
        (term("early", scope="response"), full),
        (term("early", scope="prompt"), full),
        (term("early"), full),
        (term("early", 2.0), full),
        (term("early", -2.0), 0),
        ([term("early"), term("late")], 0),
        ([term("early", scope="generation"), term("late")], full),
        (term("early", 0.0), full),
    ]
    answers = {}
    for index, (profile, expected_hits) in enumerate(sequence):
        warm, hits = counted.ask(prompt, profile)
        assert hits == expected_hits, profile
        cold, hits = counted.ask(prompt, profile, cache_salt=f"sequence-{index}")
        assert hits == 0
        assert difference(warm, cold) < TOLERANCE, profile
        answers[str(profile)] = warm
    # Strength 0 is off; all others differ from each other by far, or the test would prove nothing.
    assert difference(answers.pop(str(term("early", 0.0))), answers[str(None)]) < TOLERANCE
    assert all(difference(*pair) > 10 * TOLERANCE for pair in combinations(answers.values(), 2))


@pytest.mark.parametrize(
    ("first", "second", "shared_blocks"),
    [
        # Block 1 holds the end of the first prompt and the start of its answer; in the second request all is prompt.
        ("generation", "generation", 1),
        ("generation", None, 1),
        ("response", "response", 1),
        ("response", "generation", 1),
        ("prompt", "prompt", 1),
        ("prompt", "all", 1),
        ("all", "prompt", 2),
        ("all", "all", 2),
        ("all", None, 0),
        (None, "all", 0),
        (None, "generation", 2),
        ("prompt", "generation", 0),
    ],
)
def test_prompts_that_end_at_different_places_inside_a_block(
    counted: Counted,
    text_tokens: list[int],
    difference: Callable[..., float],
    first: str | None,
    second: str | None,
    shared_blocks: int,
) -> None:
    salt = f"ends-{first}-{second}"
    prompt = text_tokens[2000 : 2000 + BLOCK + 8]
    profiles = [None if scope is None else term("late", 1.5, scope) for scope in (first, second)]
    answer, _ = counted.ask(prompt, profiles[0], max_tokens=BLOCK + 8, cache_salt=salt)
    longer = [*prompt, *answer.tokens]
    warm, hits = counted.ask(longer, profiles[1], cache_salt=salt)
    assert hits == shared_blocks * BLOCK
    cold, _ = counted.ask(longer, profiles[1], cache_salt=f"cold-{salt}")
    assert difference(warm, cold) < TOLERANCE


def test_steered_and_unsteered_requests_at_once_on_one_prompt(
    counted: Counted, text_tokens: list[int], difference: Callable[..., float]
) -> None:
    prompt = text_tokens[3000 : 3000 + LONG]
    profiles = [None, term("early"), term("late", scope="generation"), term("every", 0.5, "prompt")] * 4
    fields = {"max_tokens": 8, "logprobs": 5, "return_tokens_as_token_ids": True, "ignore_eos": True}

    def ask(item: tuple[int, Any]) -> Any:
        salt, profile = item
        steering = {} if profile is None else {"steering_profile": profile}
        answer = counted.server.complete(prompt, cache_salt=f"at-once-{salt}", **fields, **steering)
        return counted._read(answer["choices"][0])

    together = counted.server.map(ask, [(0, profile) for profile in profiles])
    alone = [ask((1 + index, profile)) for index, profile in enumerate(profiles[:4])] * 4
    assert max(difference(*pair) for pair in zip(together, alone, strict=True)) < TOLERANCE
