"""One architecture: real vLLM, steered, against Transformers with hooks."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from edits import Edit, bundles_for, wire_of
from engine_process import EngineProcess
from families import HIDDEN_SIZE, NUM_LAYERS, VOCAB_SIZE, Family, build
from reference import Reference
from torch import Tensor

_STRENGTHS = (1.0, -0.5)
_MAX_TOKENS = 4
_MAX_MODEL_LEN = 64
# Less than the prompts of the batch have together: they take several steps, and some are cut in two.
_MAX_NUM_BATCHED_TOKENS = 100


@dataclass(frozen=True)
class Request:
    """One request of the batch; without bundle it is unsteered."""

    prompt: list[int]
    bundle: str | None
    strength: float


@dataclass(frozen=True)
class Row:
    """How far one request's answer is from the reference.

    Attributes:
        bundle: its steering, None for an unsteered request.
        strength: of the steering.
        error: largest difference of a log-probability from the steered reference, over prompt and generated tokens.
        effect: the same between the steered and the unsteered reference: the error of an engine that does not steer.
    """

    bundle: str | None
    strength: float
    error: float
    effect: float


@dataclass(frozen=True)
class Comparison:
    """One row per request, and the engine's steering status."""

    rows: tuple[Row, ...]
    status: dict[str, Any]


def compare(engines: EngineProcess, family: Family, fusion: str, eager: bool) -> Comparison:
    """Serve the family with vLLM and compare every request of one mixed batch with the reference.

    Args:
        engines: where to serve it.
        family: what to serve.
        fusion: see `server.engine.config.EngineSettings`.
        eager: without torch.compile.

    Raises:
        EngineError: the engine failed.
    """
    model = build(family)
    reference = Reference(model, NUM_LAYERS)
    generator = torch.Generator().manual_seed(1)
    bundles = bundles_for(reference.norms(_prompt(24, generator)), HIDDEN_SIZE)
    steerings = [(name, strength) for name in bundles for strength in _STRENGTHS]
    requests = [
        Request(_prompt(3 + (7 * index) % 21, generator), name, strength)
        for index, (name, strength) in enumerate([(None, 0.0), *steerings, (None, 0.0)])
    ]
    with TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder, "model"))
        job = {
            "model": str(Path(folder, "model")),
            "architectures": model.config.architectures,
            "fusion": fusion,
            "eager": eager,
            "max_tokens": _MAX_TOKENS,
            "max_model_len": _MAX_MODEL_LEN,
            "max_num_batched_tokens": _MAX_NUM_BATCHED_TOKENS,
            "bundles": wire_of(bundles),
            "requests": [vars(request) for request in requests],
        }
        result = engines.run(job, Path(folder))
    rows = [
        _row(reference, request, answer, bundles[request.bundle] if request.bundle else ())
        for request, answer in zip(requests, result["answers"], strict=True)
    ]
    return Comparison(tuple(rows), result["status"])


def _prompt(length: int, generator: torch.Generator) -> list[int]:
    return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()


def _row(reference: Reference, request: Request, answer: dict[str, Any], edits: Iterable[Edit]) -> Row:
    # The last token is never fed back.
    tokens = [*request.prompt, *answer["tokens"]][:-1]
    steered = reference.logprobs(tokens, edits, request.strength)
    unsteered = reference.logprobs(tokens, (), 0.0)
    error = max(_difference(row, found) for row, found in zip(steered, answer["logprobs"], strict=True))
    return Row(request.bundle, request.strength, error, (steered - unsteered).abs().max().item())


def _difference(expected: Tensor, found: dict[str, float]) -> float:
    return max(abs(expected[int(token)].item() - logprob) for token, logprob in found.items())
