"""Steering together with what else vLLM can do: LoRA, n-gram speculation, two pipeline stages."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from artifacts.bundle import Bundle

pytestmark = pytest.mark.engine

# Absolute, on log-probabilities in fp32: other batch shapes and other kernels add in another order.
TOLERANCE = 3e-4
VOCAB_SIZE, NUM_LAYERS = 640, 6
LORA_RANK = 8
SCOPES = ("all", "prompt", "response", "generation")
TERMS: list[list[dict[str, Any]]] = [
    [],
    *([{"name": "every", "strength": 0.5, "scope": scope}] for scope in SCOPES),
    [{"name": "early", "strength": -1.5, "scope": "all"}, {"name": "late", "strength": 1.0, "scope": "response"}],
    [{"name": "double", "strength": 2.0, "scope": "generation"}],
]


def served(answer: Any) -> torch.Tensor:
    return torch.tensor([[row[token] for token in range(VOCAB_SIZE)] for row in answer.logprobs])


def check(reference: Any, prompt: list[int], terms: list[Any], answer: Any) -> None:
    tokens = [*prompt, *answer.tokens[:-1]]
    expected = reference.logprobs(tokens, len(prompt), terms)[len(prompt) - 1 :]
    assert (served(answer) - expected).abs().max() < TOLERANCE, terms
    if terms:
        unsteered = reference.logprobs(tokens, len(prompt), [])[len(prompt) - 1 :]
        assert (expected - unsteered).abs().max() > 20 * TOLERANCE


def profile_of(terms: list[Any]) -> Any:
    return None if not terms else terms if len(terms) > 1 else terms[0]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, reference: Any) -> Path:
    """A LoRA adapter of random weights large enough to change what the model says."""
    folder = tmp_path_factory.mktemp("adapter")
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in range(NUM_LAYERS):
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            outputs, inputs = reference._model.get_submodule(f"model.layers.{layer}.{name}").weight.shape
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(LORA_RANK, inputs, generator=generator) * 0.2
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, LORA_RANK, generator=generator) * 0.2
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": LORA_RANK, "lora_alpha": LORA_RANK, "bias": "none"}
    config["target_modules"] = ["q_proj", "down_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def merged(make_reference: Callable[..., Any], bundles: dict[str, Bundle], adapter: Path) -> Any:
    """The reference with the adapter merged into its weights; alpha / rank is 1."""
    from safetensors.torch import load_file

    reference = make_reference(bundles)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        module = reference._model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        module.weight.data += tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
    return reference


def test_lora(
    start_server: Callable[..., Any],
    read_answer: Callable[..., Any],
    reference: Any,
    merged: Any,
    adapter: Path,
    text_tokens: list[int],
) -> None:
    """Steered and unsteered in one batch, with and without the adapter.

    (Not both in one batch: there vLLM's CPU kernels give the last adapter to requests without one.)
    """
    prompt = text_tokens[:45]
    fields = {"max_tokens": 5, "logprobs": VOCAB_SIZE, "return_tokens_as_token_ids": True, "ignore_eos": True}

    def run(request: tuple[str, list[Any]]) -> Any:
        model, terms = request
        steering = {"steering_profile": profile_of(terms)} if terms else {}
        return read_answer(server.complete(prompt, model=model, **fields, **steering)["choices"][0])

    flags = ("--enable-lora", "--lora-modules", f"tuned={adapter}", "--max-lora-rank", "8", "--enforce-eager")
    with start_server("lora", *flags, "--max-num-seqs", "40") as server:
        base, tuned = (server.map(run, [(model, terms) for terms in TERMS]) for model in ("lab", "tuned"))
    for truth, answers in ((reference, base), (merged, tuned)):
        for terms, answer in zip(TERMS, answers, strict=True):
            check(truth, prompt, terms, answer)
    assert served(base[0]).sub(served(tuned[0])).abs().max() > 20 * TOLERANCE, "the adapter does nothing"


def test_ngram_speculation(
    start_server: Callable[..., Any], read_answer: Callable[..., Any], reference: Any, text_tokens: list[int]
) -> None:
    """A text that repeats itself, so that drafts are accepted and rejected; the receipt counts no rejected draft."""
    prompt = text_tokens[:18] * 3
    speculation = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    fields = {"max_tokens": 24, "logprobs": VOCAB_SIZE, "return_tokens_as_token_ids": True, "ignore_eos": True}

    def run(terms: list[Any]) -> dict[str, Any]:
        steering = {"steering_profile": profile_of(terms)} if terms else {}
        body: dict[str, Any] = server.complete(prompt, **fields, **steering)
        return body

    flags = ("--speculative-config", json.dumps(speculation), "--enforce-eager", "--max-num-seqs", "40")
    with start_server("ngram", *flags) as server:
        bodies = server.map(run, TERMS)
        drafted, accepted = (
            server.metric(f"vllm:spec_decode_num_{name}_tokens_total") for name in ("draft", "accepted")
        )
    assert 0 < accepted < drafted
    for terms, body in zip(TERMS, bodies, strict=True):
        answer = read_answer(body["choices"][0])
        check(reference, prompt, terms, answer)
        total = len(prompt) + len(answer.tokens) - 1
        starts = {"all": 0, "prompt": 0, "response": len(prompt) - 1, "generation": len(prompt)}
        expected = [(len(prompt) if t["scope"] == "prompt" else total) - starts[t["scope"]] for t in terms]
        receipts = body.get("steering", [])
        counts = [receipt["tokens_steered"] for receipt in (receipts if isinstance(receipts, list) else [receipts])]
        assert counts == expected


def test_two_pipeline_stages(
    start_server: Callable[..., Any], ask: Callable[..., Any], reference: Any, text_tokens: list[int]
) -> None:
    """Compiled: without compilation vLLM's own CPU workers fail at the second stage, so that is refused at start."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("two stages need two cores")
    prompt = text_tokens[:45]
    flags = ("--pipeline-parallel-size", "2", "--max-num-seqs", "40")
    with start_server("stages", *flags, VLLM_CPU_OMP_THREADS_BIND=f"{cores[0]}|{cores[1]}") as server:
        answers = server.map(
            lambda terms: ask(server, prompt, profile_of(terms), max_tokens=5, logprobs=VOCAB_SIZE), TERMS
        )
        answer = server.complete(prompt, max_tokens=5, ignore_eos=True, steering_profile="every")
        first, second = server.steering_status()
    for terms, each in zip(TERMS, answers, strict=True):
        check(reference, prompt, terms, each)
    assert answer["steering"]["tokens_steered"] == len(prompt) + 4
    # The output of a stage's last layer travels to the next stage, so no norm follows it in its own.
    assert (first["fused_layers"], first["in_place_layers"]) == ([0, 1], [2])
    assert (second["fused_layers"], second["in_place_layers"]) == ([3, 4, 5], [])
    assert first["bundles"] == second["bundles"]
