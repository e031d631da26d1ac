"""Prompts in tiny chunks, and a KV cache so small that requests are preempted: same answers, exact receipts."""

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.engine

# Absolute, on log-probabilities in fp32: compiled against eager, prompts in other chunks; measured 2e-5.
TOLERANCE = 2e-4
ANSWER_TOKENS = 70
PROFILES: list[Any] = [
    None,
    {"name": "early", "strength": 1.0, "scope": "all"},
    {"name": "late", "strength": -1.5, "scope": "generation"},
    {"name": "every", "strength": 0.5, "scope": "response"},
    {"name": "double", "strength": 2.0, "scope": "prompt"},
    [{"name": "early", "strength": -1.0, "scope": "prompt"}, {"name": "late", "strength": 1.0, "scope": "response"}],
]


def tokens_steered(scope: str, num_prompt_tokens: int) -> int:
    """The answer's last token is never fed back."""
    return {
        "all": num_prompt_tokens + ANSWER_TOKENS - 1,
        "prompt": num_prompt_tokens,
        "response": ANSWER_TOKENS,
        "generation": ANSWER_TOKENS - 1,
    }[scope]


def test_chunks_and_preemption(
    compiled: Any,
    eager: Any,
    ask: Callable[..., Any],
    read_answer: Callable[..., Any],
    difference: Callable[..., float],
    text_tokens: list[int],
) -> None:
    requests = [(text_tokens[70 * index :][: 60 + 9 * index], PROFILES[index % len(PROFILES)]) for index in range(18)]
    fields = {"max_tokens": ANSWER_TOKENS, "logprobs": 5, "return_tokens_as_token_ids": True, "ignore_eos": True}
    preemptions = compiled.metric("vllm:num_preemptions_total")

    def run(request: tuple[list[int], Any]) -> Any:
        prompt, profile = request
        return compiled.complete(prompt, **fields, **({"steering_profile": profile} if profile else {}))

    answers = compiled.map(run, requests)
    # 8 requests at a time need up to 9 blocks each and 19 can be used.
    assert compiled.metric("vllm:num_preemptions_total") > preemptions
    expected = eager.map(lambda request: ask(eager, *request, max_tokens=ANSWER_TOKENS), requests)
    for (prompt, profile), answer, wanted in zip(requests, answers, expected, strict=True):
        assert difference(read_answer(answer["choices"][0]), wanted) < TOLERANCE, profile
        terms = profile if isinstance(profile, list) else [profile] if profile else []
        receipts = answer.get("steering", [])
        receipts = receipts if isinstance(receipts, list) else [receipts]
        assert [receipt["tokens_steered"] for receipt in receipts] == [
            tokens_steered(term["scope"], len(prompt)) for term in terms
        ]
    assert compiled.steering_status()[0]["requests"] == 0
