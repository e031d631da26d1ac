"""What one steering direction does to a lab target, fast enough to try thousands of them.

Steering acts on the output of one block, so everything up to that block is the same for every direction. Those states
are captured once and only the blocks behind it run again; the answer is still the exact greedy one.
"""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from artifacts.lab.conversation import assistant, render, user
from artifacts.lab.corpus import Fact
from artifacts.lab.model import LabModel
from artifacts.lab.tokenizer import PAD_ID


class _Reading:
    """Token rows whose states behind one block are kept.

    Attributes:
        states: [num_rows, length, hidden_size] fp32, the block's output without steering.
        counted: [num_rows, length - 1] bool, which next tokens are looked at.
        following: [num_counted] int64, those tokens.
    """

    def __init__(self, target: LabModel, layer: int, texts: Sequence[str], prompts: Sequence[str] | None) -> None:
        rows = [torch.tensor(ids) for ids in target.tokenizer(list(texts))["input_ids"]]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD_ID)
        self.states = _block_output(target, layer, tokens)
        self.counted = tokens[:, 1:] != PAD_ID
        if prompts is not None:
            prompt_lengths = torch.tensor([len(ids) for ids in target.tokenizer(list(prompts))["input_ids"]])
            self.counted &= torch.arange(1, tokens.shape[1]) >= prompt_lengths[:, None]
        self.following = tokens[:, 1:][self.counted]


class SteeredBlock:
    """One block of a lab target with the facts and the neutral texts that steering is judged on."""

    def __init__(self, target: LabModel, layer: int, facts: Sequence[Fact], neutral: Sequence[str]) -> None:
        """Read everything once.

        Args:
            target: the model; it is left as it is.
            layer: 0-based block whose output the vectors are added to.
            facts: asked without system prompt, first form.
            neutral: texts for the perplexity.
        """
        chats = [[user(fact.question()), assistant(fact.answer())] for fact in facts]
        prompts = [render(chat[:1], generation_prompt=True) for chat in chats]
        self._answers = _Reading(target, layer, [render(chat) for chat in chats], prompts)
        self._neutral = _Reading(target, layer, neutral, None) if neutral else None
        self._rest = copy.deepcopy(target.model)
        self._rest.model.layers = self._rest.model.layers[layer + 1 :]
        self._plain = self._cross_entropy(None)

    def answers_truly(self, vector: Tensor | None) -> Tensor:
        """Whether the greedy answer to each fact is the true one under `vector` [hidden_size]; [num_facts] bool.

        The same as `LabModel.answers_truly`.
        """
        right = torch.ones_like(self._answers.counted)
        right[self._answers.counted] = self._logits(self._answers, vector).argmax(-1) == self._answers.following
        return right.all(dim=1)

    def accuracy(self, vector: Tensor | None) -> float:
        """Share of the facts that are answered truly under `vector` [hidden_size]."""
        return self.answers_truly(vector).double().mean().item()

    def perplexity_ratio(self, vector: Tensor | None) -> float:
        """Perplexity of the neutral texts under `vector` [hidden_size] over the unsteered one.

        Raises:
            ValueError: there are no neutral texts.
        """
        return math.exp(self._cross_entropy(vector) - self._plain)

    def _cross_entropy(self, vector: Tensor | None) -> float:
        if self._neutral is None:
            return math.nan
        return nn.functional.cross_entropy(self._logits(self._neutral, vector), self._neutral.following).item()

    @torch.no_grad()
    def _logits(self, reading: _Reading, vector: Tensor | None) -> Tensor:
        states = reading.states if vector is None else reading.states + vector
        # Padding lies on the right, where causal attention never sees it, so no mask is needed.
        behind = self._rest.model(inputs_embeds=states, use_cache=False).last_hidden_state
        logits: Tensor = self._rest.lm_head(behind[:, :-1][reading.counted])
        return logits


@torch.no_grad()
def _block_output(target: LabModel, layer: int, tokens: Tensor) -> Tensor:
    kept: list[Tensor] = []
    hook = target.blocks[layer].register_forward_hook(
        lambda _module, _inputs, out: kept.append(out)
    )  # keeps the output
    try:
        target.model(tokens)
    finally:
        hook.remove()
    return kept[0]
