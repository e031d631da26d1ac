"""Every kind of intervention, from a bundle's manifest to served log-probabilities, against Transformers with hooks."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts.bundle import Bundle, load_bundle
from artifacts.gates import Trigger

pytestmark = pytest.mark.engine

# Absolute, on log-probabilities in fp32: two implementations of attention and norms.
TOLERANCE = 2e-4
VOCAB_SIZE, PROMPT_TOKENS, ANSWER_TOKENS = 640, 45, 6
# What each kind's example needs to matter on the lab's target, whose residual rows have norms of some hundreds.
STRENGTHS = {"add_relative": 40.0, "feature": 300.0}


def gated(fields: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**fields, **changes}


@pytest.fixture(scope="module")
def files(make_bundle: Callable[..., Path], kind_examples: dict[str, dict[str, Any]]) -> dict[str, Path]:
    """A bundle of each kind, at an early and a late layer; conditions, triggers and long lists on top."""
    kinds = {kind: example for kind, example in kind_examples.items() if kind != "condition"}
    made = {
        kind.replace("_", "-"): make_bundle(
            kind.replace("_", "-"), [1, 4], 11 + index, [example, example], maximum_strength=1000.0
        )
        for index, (kind, example) in enumerate(kinds.items())
    }
    absolute = {"kind": "rotate", "parameters": {"angle": -2.0, "mode": "absolute"}}
    made["absolute"] = make_bundle("absolute", [0, 5], 31, [absolute, absolute])
    add = kind_examples["add"]
    condition = {"kind": "condition", "sets": "open", "parameters": {"threshold": 0.0, "slope": 0.05}}
    made["condition"] = make_bundle(
        "condition", [1, 3, 5], 32, [condition, gated(add, gate="open"), gated(add, gate="open")]
    )
    triggers = {"some": Trigger(token_ids=tuple(token for token in range(VOCAB_SIZE) if token % 4))}
    made["trigger"] = make_bundle("trigger", [2], 33, [gated(add, gate="some")], triggers=triggers)
    made["eight"] = make_bundle("eight", [3] * 8, 34, list(kinds.values()), maximum_strength=4.0)
    return made


@pytest.fixture(scope="module")
def loaded(files: dict[str, Path]) -> dict[str, Bundle]:
    return {name: load_bundle(path) for name, path in files.items()}


@pytest.fixture(scope="module", params=["never", "always"])
def server(request: Any, start_server: Callable[..., Any], files: dict[str, Path]) -> Iterator[Any]:
    """Eager and steered in place, and compiled and fused with the norms."""
    flags = ["--steering-bundle", *map(str, files.values()), "--steering-fusion", request.param]
    flags += ["--enforce-eager"] if request.param == "never" else []
    with start_server(f"kinds-{request.param}", *flags, "--max-num-seqs", "40") as running:
        (worker,) = running.steering_status()
        assert len(worker["fused_layers"]) == (6 if request.param == "always" else 0)
        yield running


def terms_of(name: str, scope: str) -> list[dict[str, Any]]:
    return [{"name": name, "strength": STRENGTHS.get(name.replace("-", "_"), 1.0), "scope": scope}]


def test_each_and_together(
    server: Any,
    ask: Callable[..., Any],
    make_reference: Callable[..., Any],
    loaded: dict[str, Bundle],
    text_tokens: list[int],
) -> None:
    """All in one batch, by scope; several profiles in one request compose by listing."""
    reference = make_reference(loaded)
    requests = [terms_of(name, scope) for name in loaded for scope in ("all", "response")]
    requests += [
        [*terms_of("clamp", "all"), *terms_of("add", "response"), *terms_of("rotate", "prompt")],
        [*terms_of("add", "response"), *terms_of("clamp", "all")],
        [*terms_of("condition", "all"), *terms_of("trigger", "all"), *terms_of("condition", "generation")],
    ]
    prompt = text_tokens[:PROMPT_TOKENS]

    def run(terms: list[dict[str, Any]]) -> Any:
        profile = terms if len(terms) > 1 else terms[0]
        return ask(server, prompt, profile, max_tokens=ANSWER_TOKENS, logprobs=VOCAB_SIZE)

    for terms, answer in zip(requests, server.map(run, requests), strict=True):
        served = torch.tensor([[row[token] for token in range(VOCAB_SIZE)] for row in answer.logprobs])
        tokens = [*prompt, *answer.tokens[:-1]]
        expected, unsteered = (
            reference.logprobs(tokens, len(prompt), which)[len(prompt) - 1 :] for which in (terms, [])
        )
        assert (served - expected).abs().max() < TOLERANCE, terms
        assert (expected - unsteered).abs().max() > 20 * TOLERANCE, f"{terms} has no effect worth a test"


@pytest.mark.parametrize("name", ["project", "rotate", "eight", "condition"])
def test_strength_0_is_bit_identical_to_no_steering(
    server: Any, ask: Callable[..., Any], text_tokens: list[int], name: str
) -> None:
    prompt = text_tokens[:PROMPT_TOKENS]
    off = ask(server, prompt, cache_salt=f"off-{name}", logprobs=VOCAB_SIZE)
    zero = ask(server, prompt, {"name": name, "strength": 0}, cache_salt=f"zero-{name}", logprobs=VOCAB_SIZE)
    assert off == zero


def test_too_many_for_one_slot(server: Any) -> None:
    body = {"model": "lab", "prompt": "x", "max_tokens": 1}
    both = server.post(
        "/v1/completions", body | {"steering_profile": ["eight", "add", {"name": "eight", "strength": -1}]}
    )
    assert (both.status_code, both.json()["error"]["code"]) == (400, "steering_too_many_profiles")
    gates = server.post("/v1/completions", body | {"steering_profile": ["condition"] * 9})
    assert (gates.status_code, gates.json()["error"]["code"]) in (
        (400, "steering_too_many_profiles"),
        (400, "steering_strength_invalid"),
    )
