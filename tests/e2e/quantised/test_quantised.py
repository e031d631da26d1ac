"""Steered answers of quantised models, against Transformers with hooks on the weights that their numbers stand for."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from artifacts.bundle import Bundle, load_bundle

pytestmark = pytest.mark.engine

VOCAB_SIZE, NUM_LAYERS = 640, 6
NUM_PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 6, 45, 4
# Far from where a random direction finds the residual stream, some tens.
LIFT = {"kind": "clamp", "parameters": {"minimum": 250.0, "maximum": 300.0}}
STEERINGS: list[list[dict[str, Any]]] = [
    [],
    [{"name": "add", "strength": 2.0, "scope": "all"}],
    [{"name": "add", "strength": 2.0, "scope": "response"}],
    [{"name": "clamp", "strength": 1.0, "scope": "all"}],
    [{"name": "clamp", "strength": 1.0, "scope": "all"}, {"name": "add", "strength": -2.0, "scope": "response"}],
    [{"name": "careful", "strength": 0.8, "scope": "all"}],
]


class Case(NamedTuple):
    """A method of `quantise`, how it is served, and what is expected.

    Attributes:
        flags: of the server.
        fused: whether steering is folded into the norms, by those flags.
        tolerance: absolute, of any log-probability of one request.
    """

    method: str
    flags: tuple[str, ...]
    fused: bool
    tolerance: float


# vLLM's int4 kernels take 16 bits only, and the reference computes in 32. A rounding error that moves an 8-bit
# activation across a tie is one unit of its code, a sixteenth of an FP8 value.
HALF = ("--dtype", "float16", "--enforce-eager")
CASES = (
    Case("gptq", HALF, False, 0.04),
    Case("awq", (*HALF, "--steering-fusion", "always"), True, 0.04),
    Case("fp8-int8", (), True, 0.25),
)


class Result(NamedTuple):
    """One answer, [answer_tokens, vocab_size] each: distance of its log-probabilities from the reference, and what
    steering does there."""

    terms: list[dict[str, Any]]
    error: Tensor
    effect: Tensor


@pytest.fixture(scope="module")
def files(make_bundle: Callable[..., Path]) -> dict[str, Path]:
    return {
        "add": make_bundle("add", [1, 4], 51),
        "clamp": make_bundle("clamp", [1, 4], 52, [LIFT, LIFT]),
    }


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.method)
def case(request: pytest.FixtureRequest) -> Case:
    chosen: Case = request.param
    return chosen


@pytest.fixture(scope="module")
def model(case: Case, quantise: Callable[[str], Any]) -> Any:
    return quantise(case.method)


@pytest.fixture(scope="module")
def server(case: Case, model: Any, start_server: Callable[..., Any], files: dict[str, Path]) -> Iterator[Any]:
    """The shipped bundle knows the weights that it was made for, and these are others."""
    flags = ("--steering-bundle", *map(str, files.values()), "--steering-fingerprint", "ignore", *case.flags)
    with start_server(case.method, *flags, "--max-num-seqs", "40", model=model.folder) as running:
        yield running


@pytest.fixture(scope="module")
def dequantised(
    model: Any, make_reference: Callable[..., Any], bundles: dict[str, Bundle], files: dict[str, Path]
) -> Any:
    reference = make_reference(bundles | {name: load_bundle(path) for name, path in files.items()})
    for name, (weight, activation) in model.layers.items():
        layer = reference._model.get_submodule(name)
        layer.weight.data.copy_(weight)
        if activation is not None:
            layer.register_forward_pre_hook(lambda _layer, inputs, rounded=activation: (rounded(inputs[0]),))
    return reference


@pytest.fixture(scope="module")
def results(server: Any, dequantised: Any, ask: Callable[..., Any], text_tokens: list[int]) -> list[Result]:
    """Every prompt with every steering, all in one batch."""
    prompts = [text_tokens[start : start + PROMPT_TOKENS] for start in range(0, 100 * NUM_PROMPTS, 100)]
    requests = [(prompt, terms) for prompt in prompts for terms in STEERINGS]

    def run(request: tuple[list[int], list[dict[str, Any]]]) -> Any:
        prompt, terms = request
        return ask(server, prompt, terms or None, max_tokens=ANSWER_TOKENS, logprobs=VOCAB_SIZE)

    made = []
    for (prompt, terms), answer in zip(requests, server.map(run, requests), strict=True):
        served = torch.tensor([[row[token] for token in range(VOCAB_SIZE)] for row in answer.logprobs])
        tokens = [*prompt, *answer.tokens[:-1]]
        expected, unsteered = (
            dequantised.logprobs(tokens, PROMPT_TOKENS, which)[PROMPT_TOKENS - 1 :] for which in (terms, [])
        )
        made.append(Result(terms, (served - expected).abs(), (expected - unsteered).abs()))
    return made


def test_equals_the_reference_on_the_same_weights(case: Case, results: list[Result]) -> None:
    for result in results:
        assert result.error.max() < case.tolerance, result.terms
        if result.terms:
            assert result.effect.max() > 5 * case.tolerance, f"{result.terms} has no effect worth a test"


def test_steering_adds_no_error(case: Case, results: list[Result]) -> None:
    """The distance that quantised kernels have from the reference anyway is the measure of what steering may add."""
    steered, unsteered, effect = (
        torch.stack(tensors).mean()
        for tensors in (
            [result.error for result in results if result.terms],
            [result.error for result in results if not result.terms],
            [result.effect for result in results if result.terms],
        )
    )
    assert steered <= 2 * unsteered + case.tolerance / 20
    assert effect > 10 * steered


def test_form(case: Case, server: Any) -> None:
    """Left to itself, a compiled model on a CPU is steered in its norms, and an eager one in place."""
    (worker,) = server.steering_status()
    layers = list(range(NUM_LAYERS))
    assert (worker["fused_layers"], worker["in_place_layers"]) == ((layers, []) if case.fused else ([], layers))
