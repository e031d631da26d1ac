"""Reasoning, tool calls and constrained answers stay unsteered where a profile says so."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.engine

TOLERANCE = 2e-4
VOCAB_SIZE = 640
# The lab's special tokens stand in for the delimiters of models that think and call tools.
SPANS = {"reasoning": ("<|assistant|>", "<|end|>"), "tool_calls": ("<|user|>", "<|system|>")}
EXCLUDE = {"early": ["reasoning"], "late": ["reasoning", "tool_calls"], "every": ["structured_output"], "double": []}
CONSTRAINT = {"structured_outputs": {"regex": "[0-9]{6}"}}


@pytest.fixture(scope="module")
def server(start_server: Callable[..., Any]) -> Iterator[Any]:
    """Prompts in chunks of 24 tokens, so that spans begin and end in different steps."""
    spans = [f"{name}={start},{end}" for name, (start, end) in SPANS.items()]
    exclude = [f"{name}={','.join(names) or 'none'}" for name, names in EXCLUDE.items()]
    flags = ["--steering-span", *spans, "--steering-exclude", *exclude, "--max-num-batched-tokens", "24"]
    flags += ["--enable-auto-tool-choice", "--tool-call-parser", "pythonic"]
    with start_server("spans", *flags, "--enforce-eager", "--max-num-seqs", "8") as running:
        yield running


@pytest.fixture(scope="module")
def ids(target: Any) -> dict[str, int]:
    from transformers import AutoTokenizer

    vocabulary: dict[str, int] = AutoTokenizer.from_pretrained(target).get_vocab()
    return vocabulary


def left_out(name: str, tokens: list[int], ids: dict[str, int]) -> list[int]:
    """Positions that a profile leaves alone: from the token that opens a span to the one before it is closed."""
    found = set()
    for span in EXCLUDE[name]:
        if span in SPANS:
            start, end = (ids[text] for text in SPANS[span])
            inside = False
            for position, token in enumerate(tokens):
                inside = token == start or (inside and token != end)
                if inside:
                    found.add(position)
    return sorted(found)


def conversation(ids: dict[str, int], words: list[int]) -> list[int]:
    """A prompt with closed spans of both kinds, one inside the other, and an open one at its end."""
    user, system, assistant, end = (ids[f"<|{role}|>"] for role in ("user", "system", "assistant", "end"))
    return [
        *words[:9], user, *words[9:25], system, *words[25:30], assistant, *words[30:34], user, *words[34:50],
        end, *words[50:55], system, *words[55:60], assistant, *words[60:63],
    ]  # fmt: skip


@pytest.mark.parametrize(
    "terms",
    [
        [("early", 1.0, "all")],
        [("late", -1.5, "all")],
        [("early", 2.0, "response")],
        [("late", 1.0, "generation")],
        [("early", 1.0, "all"), ("late", 1.0, "prompt"), ("double", -1.0, "response")],
    ],
    ids=str,
)
def test_spans_in_prompt_and_answer(
    server: Any,
    read_answer: Callable[..., Any],
    reference: Any,
    ids: dict[str, int],
    text_tokens: list[int],
    terms: list[Any],
) -> None:
    prompt = conversation(ids, text_tokens)
    profile = [{"name": name, "strength": strength, "scope": scope} for name, strength, scope in terms]
    # Pushed towards both delimiters and away from what was said, the answer closes and opens spans on its own. (Not by
    # sampling: a seed together with a prompt in chunks ends vLLM on a CPU.)
    bias = {str(ids["<|end|>"]): 14.0, str(ids["<|assistant|>"]): 10.0, str(ids["<|user|>"]): -100.0}
    body = {"max_tokens": 40, "logprobs": VOCAB_SIZE, "return_tokens_as_token_ids": True, "ignore_eos": True}
    sampling = {"frequency_penalty": 2.0, "logit_bias": bias}
    response = server.complete(prompt, **body, **sampling, steering_profile=profile)
    answer = read_answer(response["choices"][0])
    tokens = [*prompt, *answer.tokens[:-1]]
    excluded = [left_out(term["name"], tokens, ids) for term in profile]
    generated = [position for position in excluded[0] if position >= len(prompt)]
    assert 3 < len(generated) < len(answer.tokens) - 4, "the answer must lie inside a span and outside"
    expected = reference.logprobs(tokens, len(prompt), profile, excluded)[len(prompt) - 1 :]
    served = torch.tensor([[row[token] for token in range(VOCAB_SIZE)] for row in answer.logprobs])
    assert (served - expected).abs().max() < TOLERANCE
    without = reference.logprobs(tokens, len(prompt), profile)[len(prompt) - 1 :]
    if terms != [("late", 1.0, "generation")]:
        assert (without - expected).abs().max() > 20 * TOLERANCE, "leaving spans out must matter"
    ranges = {"all": (0, len(tokens)), "prompt": (0, len(prompt)), "generation": (len(prompt), len(tokens))}
    ranges["response"] = (len(prompt) - 1, len(tokens))
    for receipt, term, positions in zip(response["steering"], profile, excluded, strict=True):
        steered = set(range(*ranges[term["scope"]])) - set(positions)
        assert receipt["tokens_steered"] == len(steered)


def test_the_cache_does_not_change_the_answer(
    server: Any, ask: Callable[..., Any], difference: Callable[..., float], ids: dict[str, int], text_tokens: list[int]
) -> None:
    """The second time most of the prompt is found in the cache, and the span that it ends in with it."""
    prompt = conversation(ids, text_tokens)
    first, second = (
        server.complete(prompt, max_tokens=12, ignore_eos=True, steering_profile="early") for _ in range(2)
    )
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 32
    assert first["choices"][0]["token_ids"] == second["choices"][0]["token_ids"]
    assert first["steering"] == second["steering"]
    cold = ask(server, prompt, "early", cache_salt="cold")
    assert difference(cold, ask(server, prompt, "early")) < TOLERANCE


@pytest.mark.parametrize("scope", ["all", "response"])
@pytest.mark.parametrize("constrained", [True, False])
def test_a_constrained_answer(
    server: Any, read_answer: Callable[..., Any], reference: Any, text_tokens: list[int], scope: str, constrained: bool
) -> None:
    prompt = text_tokens[:40]
    profile = {"name": "every", "strength": 0.5, "scope": scope}
    body = {"max_tokens": 6, "logprobs": VOCAB_SIZE, "return_tokens_as_token_ids": True, "ignore_eos": True}
    response = server.complete(prompt, **body, steering_profile=profile, **(CONSTRAINT if constrained else {}))
    answer = read_answer(response["choices"][0])
    if constrained:
        assert response["choices"][0]["text"].isdigit()
    tokens = [*prompt, *answer.tokens[:-1]]
    excluded = list(range(len(prompt) - 1, len(tokens))) if constrained else []
    expected = reference.logprobs(tokens, len(prompt), [profile], [excluded])[len(prompt) - 1 :]
    served = torch.tensor([[row[token] for token in range(VOCAB_SIZE)] for row in answer.logprobs])
    if constrained:
        # What the grammar forbids is gone before the probabilities are taken.
        expected = expected.where(served > -9000, -torch.inf).log_softmax(-1).clamp_min(-9999)
    assert (served - expected).abs().max() < TOLERANCE
    start = 0 if scope == "all" else len(prompt) - 1
    assert response["steering"]["tokens_steered"] == len(tokens) - start - len(excluded)


def test_json_mode_and_forced_tools_over_chat(server: Any) -> None:
    """Whatever makes vLLM constrain the answer counts; the prompt stays steered."""
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    free = server.chat("What is 7 plus 5?", max_tokens=8, ignore_eos=True, steering_profile="every")
    for fields in (
        {"response_format": {"type": "json_object"}},
        {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "add"}}, "max_tokens": 40},
    ):
        answer = server.chat("What is 7 plus 5?", **{"max_tokens": 8, "steering_profile": "every"} | fields)
        assert answer["steering"]["tokens_steered"] == answer["usage"]["prompt_tokens"] - 1
    assert free["steering"]["tokens_steered"] == free["usage"]["prompt_tokens"] + 7


def test_profiles_say_what_they_leave_out(server: Any) -> None:
    profiles = server.client.get("/v1/steering/profiles").json()["profiles"]
    assert {each["name"]: set(each["exclude"]) for each in profiles if each["name"] in EXCLUDE} == {
        name: set(spans) for name, spans in EXCLUDE.items()
    }
