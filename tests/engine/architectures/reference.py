"""The truth: Transformers, with a forward hook on each edited decoder block."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from edits import Edit
from torch import Tensor, nn


class Reference:
    """A Transformers model, fp32, whose residual stream can be edited.

    "Output of block l" is what block l + 1 reads, in every architecture: also where the norms come after the sublayers
    or attention and MLP run side by side.
    """

    def __init__(self, model: Any, num_layers: int) -> None:
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
        self._model = model
        self._blocks = lists[0]

    def norms(self, tokens: list[int]) -> list[float]:
        """Median over tokens of the 2-norm of the residual stream after each layer."""
        norms: dict[int, float] = {}

        def reader(layer: int) -> Callable[[Tensor], Tensor]:
            def read(stream: Tensor) -> Tensor:
                norms[layer] = stream.norm(dim=-1).median().item()
                return stream

            return read

        self._run(tokens, {layer: [reader(layer)] for layer in range(len(self._blocks))})
        return [norms[layer] for layer in range(len(self._blocks))]

    def logprobs(self, tokens: list[int], edits: Iterable[Edit], strength: float) -> Tensor:
        """Log-probabilities after each token, every token steered.

        Returns:
            [num_tokens, vocab_size], fp32; row t is the distribution of token t + 1.
        """
        changes: dict[int, list[Callable[[Tensor], Tensor]]] = {}
        for edit in edits:
            changes.setdefault(edit.layer, []).append(lambda stream, edit=edit: edit.applied(stream, strength))
        return self._run(tokens, changes).log_softmax(-1)

    @torch.no_grad()
    def _run(self, tokens: list[int], changes: dict[int, list[Callable[[Tensor], Tensor]]]) -> Tensor:
        with ExitStack() as stack:
            for layer, functions in changes.items():
                handle = self._blocks[layer].register_forward_hook(_editor(functions))
                stack.callback(handle.remove)
            logits: Tensor = self._model(torch.tensor([tokens]), use_cache=False).logits[0]
        return logits.float()


def _editor(functions: list[Callable[[Tensor], Tensor]]) -> Callable[..., Any]:
    def edit(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        stream = output[0] if isinstance(output, tuple) else output
        for function in functions:
            stream = function(stream)
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    return edit
