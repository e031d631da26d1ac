"""The truth that servers are compared with: Transformers, with forward hooks that do what the manifests say."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from artifacts.bundle import Bundle
from artifacts.manifest import Intervention


class Answer(NamedTuple):
    """What a completion said: token ids, and for each of them the log-probabilities that came with it, by token id."""

    tokens: list[int]
    logprobs: list[dict[int, float]]


class Step(NamedTuple):
    """One intervention of one term of a request: strength by token, 0 where it does not apply."""

    intervention: Intervention
    bundle: Bundle
    strengths: Tensor
    gates: dict[str, Tensor]


class Reference:
    """The lab's target in Transformers, fp32."""

    def __init__(self, target: Path, bundles: dict[str, Bundle]) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
        self._bundles = bundles

    @torch.no_grad()
    def logprobs(
        self,
        tokens: Sequence[int],
        num_prompt_tokens: int,
        terms: Sequence[dict[str, Any]],
        left_out: Sequence[Sequence[int]] | None = None,
    ) -> Tensor:
        """Log-probabilities after each token.

        Args:
            tokens: prompt and answer, [num_tokens].
            num_prompt_tokens: how many of them are the prompt.
            terms: name, strength and scope of each profile.
            left_out: for each term, positions that it leaves alone.

        Returns:
            [num_tokens, vocab_size], fp32; row t is the distribution of token t + 1.
        """
        steps = self._steps(tokens, num_prompt_tokens, terms, left_out or [()] * len(terms))
        with ExitStack() as stack:
            for layer in sorted({step.intervention.layer for step in steps}):
                of_layer = [step for step in steps if step.intervention.layer == layer]
                stack.enter_context(_steering(self._model.model.layers[layer], of_layer))
            logits: Tensor = self._model(torch.tensor([tokens])).logits[0]
        return logits.log_softmax(-1)

    def _steps(
        self,
        tokens: Sequence[int],
        num_prompt_tokens: int,
        terms: Sequence[dict[str, Any]],
        left_out: Sequence[Sequence[int]],
    ) -> list[Step]:
        steps = []
        positions = torch.arange(len(tokens))
        for term, excluded in zip(terms, left_out, strict=True):
            steered = {
                "all": positions >= 0,
                "prompt": positions < num_prompt_tokens,
                "response": positions >= num_prompt_tokens - 1,
                "generation": positions >= num_prompt_tokens,
            }[term["scope"]].float()
            steered[list(excluded)] = 0.0
            bundle = self._bundles[term["name"]]
            gates = {
                name: torch.isin(torch.tensor(tokens), torch.tensor(trigger.token_ids)).float()
                for name, trigger in bundle.manifest.triggers.items()
            }
            steps += [Step(each, bundle, steered * term["strength"], gates) for each in bundle.manifest.interventions]
        return steps


def apply(step: Step, x: Tensor) -> Tensor:
    """The residual stream [num_tokens, hidden_size] after an intervention, by the formulas of `Manifest`."""
    what = step.intervention
    if what.kind == "condition":
        assert what.sets is not None
        step.gates[what.sets] = _opening(step, x)[:, 0]
        return x
    strength = (step.strengths * (step.gates[what.gate] if what.gate else 1.0))[:, None]
    new = x + _FORMULAS[what.kind](step, x, strength)
    if what.keep_norm:
        new = new * x.norm(dim=1, keepdim=True) / new.norm(dim=1, keepdim=True)
    return torch.where(strength != 0, new, x)


def _read(step: Step) -> Tensor:
    assert step.intervention.read is not None
    return step.bundle.rows[step.intervention.read]


def _write(step: Step) -> Tensor:
    assert step.intervention.write is not None
    return step.bundle.rows[step.intervention.write]


def _opening(step: Step, x: Tensor) -> Tensor:
    given = step.intervention.parameters
    assert given.threshold is not None
    over = x @ _read(step)[:, None] / (x.norm(dim=1, keepdim=True) if given.cosine else 1.0) - given.threshold
    if given.slope is not None:
        return torch.sigmoid(given.slope * over)
    return ((over < 0) if given.below else (over > 0)).float()


def _clamp(step: Step, x: Tensor, strength: Tensor) -> Tensor:
    given, p = step.intervention.parameters, x @ _read(step)[:, None]
    return strength * (p.clamp(given.minimum, given.maximum) - p) * _read(step)


def _feature(step: Step, x: Tensor, strength: Tensor) -> Tensor:
    given = step.intervention.parameters
    v = (x @ _read(step)[:, None] + (given.bias or 0.0)).relu()
    assert given.activation == "relu" and given.value is not None
    edited = {"scale": given.value * v, "set": torch.full_like(v, given.value), "add": v + given.value}
    return strength * (edited[str(given.edit)] - v) * _write(step)


def _rotate(step: Step, x: Tensor, strength: Tensor) -> Tensor:
    given, (u, v) = step.intervention.parameters, _read(step)
    assert given.angle is not None
    p, q = x @ u[:, None], x @ v[:, None]
    by = torch.full_like(p, given.angle)
    if given.mode == "absolute":
        by = torch.remainder(given.angle - torch.atan2(q, p) + math.pi, 2 * math.pi) - math.pi
    turn = strength * by
    return (p * turn.cos() - q * turn.sin() - p) * u + (p * turn.sin() + q * turn.cos() - q) * v


_FORMULAS: dict[str, Callable[[Step, Tensor, Tensor], Tensor]] = {
    "add": lambda step, x, strength: strength * _write(step),
    "add_relative": lambda step, x, strength: strength * x.norm(dim=1, keepdim=True) * _write(step),
    "project": lambda step, x, strength: -strength * (x @ _read(step)[:, None]) * _read(step),
    "clamp": _clamp,
    "gated_add": lambda step, x, strength: strength * _opening(step, x) * _write(step),
    "feature": _feature,
    "rotate": _rotate,
    "affine": lambda step, x, strength: strength * (_read(step) * x + _write(step)),
}


@contextmanager
def _steering(layer: torch.nn.Module, steps: Sequence[Step]) -> Iterator[None]:
    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        x = (output[0] if isinstance(output, tuple) else output)[0]
        for step in steps:
            x = apply(step, x)
        return (x[None], *output[1:]) if isinstance(output, tuple) else x[None]

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture(scope="session")
def reference(target: Path, bundles: dict[str, Bundle]) -> Reference:
    return Reference(target, bundles)


@pytest.fixture(scope="session")
def make_reference(target: Path) -> Callable[[dict[str, Bundle]], Reference]:
    """A reference for other bundles."""
    return lambda bundles: Reference(target, bundles)


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
