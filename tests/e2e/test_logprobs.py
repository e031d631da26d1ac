"""Served log-probabilities against Transformers with forward hooks that add the same vectors, fp32."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.engine

# Absolute, on log-probabilities in fp32: two implementations of attention and norms; measured 2e-5.
TOLERANCE = 2e-4
SCOPES = ["all", "prompt", "response", "generation"]
VOCAB_SIZE, PROMPT_TOKENS, ANSWER_TOKENS = 640, 45, 6


def term(name: str, strength: float, scope: str) -> dict[str, Any]:
    return {"name": name, "strength": strength, "scope": scope}


SINGLE = [[term(name, strength, scope)] for scope in SCOPES for name, strength in (("early", 1.0), ("late", -2.0))]
SINGLE += [[term("every", 0.4, scope)] for scope in SCOPES]
SINGLE += [[term("double", strength, "response")] for strength in (3.5, -0.5)]
SINGLE += [[term("careful", strength, "all")] for strength in (0.5, -0.5)]
LISTS = [
    [term("early", 1.0, "all"), term("late", 0.5, "all")],
    [term("early", -1.0, "prompt"), term("early", 2.0, "generation")],
    [term("every", 0.5, "response"), term("double", -1.0, "prompt")],
    [term("double", 1.0, "generation"), term("late", 1.0, "all"), term("every", 0.25, "response")],
]


def check(server: Any, ask: Callable[..., Any], reference: Any, prompt: list[int], terms: list[Any]) -> None:
    """Compare the whole distribution after the prompt and after every answer token."""
    profile = terms if len(terms) != 1 else terms[0]
    answer = ask(server, prompt, profile or None, max_tokens=ANSWER_TOKENS, logprobs=VOCAB_SIZE)
    assert len(answer.tokens) == ANSWER_TOKENS
    expected = reference.logprobs([*prompt, *answer.tokens[:-1]], len(prompt), terms)[len(prompt) - 1 :]
    served = torch.tensor([[row[token] for token in range(VOCAB_SIZE)] for row in answer.logprobs])
    # vLLM reports -9999 at the least; the lab's log-probabilities stay above.
    assert served.shape == expected.shape
    assert (served - expected).abs().max() < TOLERANCE
    unsteered = reference.logprobs([*prompt, *answer.tokens[:-1]], len(prompt), [])[len(prompt) - 1 :]
    for position, differs in enumerate((expected - unsteered).abs().amax(1) > 10 * TOLERANCE):
        # Generation scope leaves the first answer token alone; everything else must be far from unsteered.
        assert differs == (bool(terms) and (position > 0 or any(item["scope"] != "generation" for item in terms)))


@pytest.mark.parametrize("terms", [[], *SINGLE, *LISTS], ids=str)
def test_eager(eager: Any, ask: Callable[..., Any], reference: Any, text_tokens: list[int], terms: list[Any]) -> None:
    check(eager, ask, reference, text_tokens[:PROMPT_TOKENS], terms)


@pytest.mark.parametrize("terms", [[], *SINGLE, *LISTS], ids=str)
def test_compiled(
    compiled: Any, ask: Callable[..., Any], reference: Any, text_tokens: list[int], terms: list[Any]
) -> None:
    check(compiled, ask, reference, text_tokens[:PROMPT_TOKENS], terms)


@pytest.mark.parametrize("scope", ["all", "prompt"])
def test_prompt_logprobs(eager: Any, reference: Any, text_tokens: list[int], scope: str) -> None:
    prompt = text_tokens[:40]
    terms = [term("early", 1.0, scope)]
    answer = eager.complete(prompt, max_tokens=1, prompt_logprobs=0, steering_profile=terms[0])
    entries = answer["choices"][0]["prompt_logprobs"]
    served = [entry[str(token)]["logprob"] for entry, token in zip(entries[1:], prompt[1:], strict=True)]
    expected = reference.logprobs(prompt, len(prompt), terms)[torch.arange(len(prompt) - 1), prompt[1:]]
    assert (torch.tensor(served) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("scope", SCOPES)
def test_strength_0_is_bit_identical_to_no_steering(
    eager: Any, ask: Callable[..., Any], text_tokens: list[int], scope: str
) -> None:
    prompt = text_tokens[:PROMPT_TOKENS]
    # Salts keep the second request from finding the first one's blocks, which would change the shape of its prefill.
    off = ask(eager, prompt, cache_salt=f"off-{scope}", logprobs=VOCAB_SIZE)
    zero = ask(eager, prompt, term("every", 0.0, scope), cache_salt=f"zero-{scope}", logprobs=VOCAB_SIZE)
    assert off == zero


def test_default_strength_and_scope_come_from_the_bundle(
    eager: Any, ask: Callable[..., Any], text_tokens: list[int]
) -> None:
    prompt = text_tokens[:PROMPT_TOKENS]
    named = ask(eager, prompt, "double", cache_salt="named")
    spelt_out = ask(eager, prompt, term("double", 1.0, "response"), cache_salt="spelt-out")
    assert named == spelt_out
