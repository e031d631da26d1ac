"""The truth that servers are compared with: Transformers, with forward hooks that add the same vectors."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from artifacts.bundle import Bundle


class Answer(NamedTuple):
    """What a completion said: token ids, and for each of them the log-probabilities that came with it, by token id."""

    tokens: list[int]
    logprobs: list[dict[int, float]]


class Reference:
    """The lab's target in Transformers, fp32."""

    def __init__(self, target: Path, bundles: dict[str, Bundle]) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
        self._bundles = bundles

    @torch.no_grad()
    def logprobs(self, tokens: Sequence[int], num_prompt_tokens: int, terms: Sequence[dict[str, Any]]) -> Tensor:
        """Log-probabilities after each token.

        Args:
            tokens: prompt and answer, [num_tokens].
            num_prompt_tokens: how many of them are the prompt.
            terms: name, strength and scope of each profile.

        Returns:
            [num_tokens, vocab_size], fp32; row t is the distribution of token t + 1.
        """
        deltas = self._deltas(len(tokens), num_prompt_tokens, terms)
        with ExitStack() as stack:
            for layer, delta in deltas.items():
                stack.enter_context(_adding(self._model.model.layers[layer], delta))
            logits: Tensor = self._model(torch.tensor([tokens])).logits[0]
        return logits.log_softmax(-1)

    def _deltas(self, num_tokens: int, num_prompt_tokens: int, terms: Sequence[dict[str, Any]]) -> dict[int, Tensor]:
        """Layer -> what is added to its output, [num_tokens, hidden_size]."""
        deltas: dict[int, Tensor] = {}
        positions = torch.arange(num_tokens)
        for term in terms:
            steered = {
                "all": positions >= 0,
                "prompt": positions < num_prompt_tokens,
                "response": positions >= num_prompt_tokens - 1,
                "generation": positions >= num_prompt_tokens,
            }[term["scope"]]
            bundle = self._bundles[term["name"]]
            for intervention in bundle.manifest.interventions:
                row = bundle.rows[intervention.write] * term["strength"]
                delta = steered[:, None] * row
                deltas[intervention.layer] = deltas.get(intervention.layer, 0) + delta
        return deltas


@contextmanager
def _adding(layer: torch.nn.Module, delta: Tensor) -> Iterator[None]:
    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        return (output[0] + delta, *output[1:]) if isinstance(output, tuple) else output + delta

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture(scope="session")
def reference(target: Path, bundles: dict[str, Bundle]) -> Reference:
    return Reference(target, bundles)


@pytest.fixture(scope="session")
def read_answer() -> Callable[..., Answer]:
    """Read an `Answer` off a choice of a completion asked for with `return_tokens_as_token_ids`."""

    def read(choice: dict[str, Any]) -> Answer:
        rows = choice["logprobs"]["top_logprobs"]
        return Answer(
            choice["token_ids"],
            [{int(name.removeprefix("token_id:")): value for name, value in row.items()} for row in rows],
        )

    return read


@pytest.fixture(scope="session")
def ask(read_answer: Callable[..., Answer]) -> Callable[..., Answer]:
    """Greedy completion with the log-probabilities of its tokens: `ask(server, prompt, profile, **fields)`."""

    def run(server: Any, prompt: Sequence[int], profile: Any = None, **fields: Any) -> Answer:
        body = {"max_tokens": 8, "logprobs": 5, "return_tokens_as_token_ids": True, "ignore_eos": True, **fields}
        if profile is not None:
            body["steering_profile"] = profile
        return read_answer(server.complete(list(prompt), **body)["choices"][0])

    return run


@pytest.fixture(scope="session")
def difference() -> Callable[[Answer, Answer], float]:
    """Largest absolute difference of log-probabilities between two answers; infinite when their tokens differ.

    At rank 5 two servers may list different tokens; the four before are in both lists or far apart indeed.
    """

    def largest(left: Answer, right: Answer) -> float:
        if left.tokens != right.tokens:
            return float("inf")
        gaps = [0.0]
        for ours, theirs in zip(left.logprobs, right.logprobs, strict=True):
            shared = ours.keys() & theirs.keys()
            if len(shared) < min(len(ours), len(theirs)) - 1:
                return float("inf")
            gaps += [abs(ours[token] - theirs[token]) for token in shared]
        return max(gaps)

    return largest
