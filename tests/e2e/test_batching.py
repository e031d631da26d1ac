"""A mixed batch gives every request what it gets alone, and unsteered requests what plain vLLM gives them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

pytestmark = pytest.mark.engine

# Absolute, on log-probabilities in fp32: other batch shapes add in another order; measured 1e-5.
TOLERANCE = 2e-4
PROFILES = [
    {"name": name, "strength": strength}
    for name, strengths in {
        "early": (1.0, -1.5),
        "late": (1.0, 2.0),
        "every": (0.5, -0.25),
        "careful": (0.5, -0.5),
    }.items()
    for strength in strengths
]
CHAT = {"model": "lab", "messages": [{"role": "user", "content": "What is 7 plus 5?"}], "temperature": 0}


class Request(NamedTuple):
    prompt: list[int]
    profile: dict[str, Any] | None


@pytest.fixture(scope="module")
def requests(text_tokens: list[int]) -> list[Request]:
    """32 requests with prompts of different lengths: each of the 8 profiles three times, 8 unsteered, interleaved."""
    profiles = [*PROFILES, *PROFILES, *PROFILES, *[None] * 8]
    return [
        Request(text_tokens[50 * index : 50 * index + 20 + 3 * index], profiles[(index * 13) % 32])
        for index in range(32)
    ]


def ask_all(server: Any, ask: Callable[..., Any], requests: list[Request], workers: int, salt: str) -> list[Any]:
    def run(request: Request) -> Any:
        return ask(server, request.prompt, request.profile, max_tokens=24, cache_salt=salt)

    return server.map(run, requests, workers)


@pytest.fixture(scope="module")
def alone(eager: Any, ask: Callable[..., Any], requests: list[Request]) -> list[Any]:
    return ask_all(eager, ask, requests, workers=1, salt="alone")


def test_32_at_once_equal_each_alone(
    eager: Any, ask: Callable[..., Any], difference: Callable[..., float], requests: list[Request], alone: list[Any]
) -> None:
    # The salt makes the batch compute its prompts again, together.
    together = ask_all(eager, ask, requests, workers=32, salt="together")
    assert max(difference(*pair) for pair in zip(together, alone, strict=True)) < TOLERANCE
    assert len({(*request.prompt, str(request.profile)) for request in requests}) == 32


def test_unsteered_equal_plain_vllm(
    eager: Any,
    plain: Any,
    ask: Callable[..., Any],
    difference: Callable[..., float],
    requests: list[Request],
    alone: list[Any],
) -> None:
    unsteered = [request for request in requests if request.profile is None]
    expected = ask_all(plain, ask, unsteered, workers=1, salt="alone")
    ours = [answer for request, answer in zip(requests, alone, strict=True) if request.profile is None]
    assert ours == expected
    # The same amid steered neighbours.
    mixed = ask_all(eager, ask, requests, workers=32, salt="mixed")
    ours = [answer for request, answer in zip(requests, mixed, strict=True) if request.profile is None]
    assert max(difference(*pair) for pair in zip(ours, expected, strict=True)) < TOLERANCE


@pytest.mark.parametrize("profile", [None, "early", {"name": "late", "strength": -1, "scope": "generation"}], ids=str)
def test_n_choices_equal_single_ones(eager: Any, text_tokens: list[int], profile: Any) -> None:
    prompt = text_tokens[:30]
    fields = {"temperature": 2.0, "max_tokens": 12, "ignore_eos": True} | (
        {"steering_profile": profile} if profile else {}
    )
    choices = eager.complete(prompt, n=4, seed=7, **fields)["choices"]
    # vLLM gives choice i the seed s + i.
    singles = [eager.complete(prompt, seed=7 + index, **fields)["choices"][0] for index in range(4)]
    assert [choice["token_ids"] for choice in choices] == [choice["token_ids"] for choice in singles]
    assert len({tuple(choice["token_ids"]) for choice in choices}) > 1


@pytest.mark.parametrize("profile", [None, *PROFILES[2:7:2]], ids=str)
def test_several_prompts_equal_single_ones(eager: Any, text_tokens: list[int], profile: Any) -> None:
    prompts = [text_tokens[start : start + 20 + start // 10] for start in range(0, 500, 100)]
    fields = {"max_tokens": 12, "ignore_eos": True} | ({"steering_profile": profile} if profile else {})
    choices = eager.complete(prompts, **fields)["choices"]
    singles = [eager.complete(prompt, **fields)["choices"][0] for prompt in prompts]
    assert [choice["text"] for choice in choices] == [choice["text"] for choice in singles]


@pytest.mark.parametrize("profile", [None, "careful", {"name": "every", "strength": 0.3}], ids=str)
def test_a_chat_stream_equals_the_answer(eager: Any, profile: Any) -> None:
    body = {**CHAT, "max_tokens": 20, **({"steering_profile": profile} if profile else {})}
    whole = eager.post("/v1/chat/completions", body).json()
    chunks = eager.stream("/v1/chat/completions", body)
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert chunks[-1].get("steering") == whole.get("steering")


@pytest.mark.parametrize("profile", [None, "early", [{"name": "early"}, {"name": "late", "strength": -1}]], ids=str)
def test_a_completion_stream_equals_the_answer(eager: Any, text_tokens: list[int], profile: Any) -> None:
    steering = {"steering_profile": profile} if profile else {}
    body = {"model": "lab", "prompt": text_tokens[:40], "temperature": 0, "max_tokens": 30, **steering}
    whole = eager.post("/v1/completions", body).json()
    chunks = eager.stream("/v1/completions", body)
    text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    assert text == whole["choices"][0]["text"]
    assert chunks[-1].get("steering") == whole.get("steering")


@pytest.mark.parametrize("profile", [None, "early"], ids=str)
def test_stop_strings(eager: Any, text_tokens: list[int], profile: Any) -> None:
    prompt = text_tokens[:40]
    steering = {"steering_profile": profile} if profile else {}
    whole = eager.complete(prompt, max_tokens=60, ignore_eos=True, **steering)["choices"][0]
    stop = whole["text"][len(whole["text"]) // 2 :][:3]
    stopped = eager.complete(prompt, max_tokens=60, ignore_eos=True, stop=[stop], **steering)["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == whole["text"][: whole["text"].index(stop)]


def test_one_token(eager: Any, ask: Callable[..., Any], text_tokens: list[int]) -> None:
    for profile in (None, "early", {"name": "early", "scope": "generation"}):
        long = ask(eager, text_tokens[:25], profile, max_tokens=5, cache_salt="long")
        short = ask(eager, text_tokens[:25], profile, max_tokens=1, cache_salt="short")
        assert short.tokens == long.tokens[:1]
        assert short.logprobs == long.logprobs[:1]
