"""A lab model with what the gate needs: residual states, steering at one layer, greedy answers, likelihood of text."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from artifacts.lab.conversation import Message, assistant, render, system, user
from artifacts.lab.corpus import Fact
from artifacts.lab.tokenizer import END_ID, PAD_ID, load_tokenizer

_BATCH_SIZE: Final = 256
_LONGEST_ANSWER: Final = 40  # tokens


@dataclass(frozen=True)
class Steering:
    """`vector` [hidden_size] fp32 is added to every token's output of decoder block `layer`."""

    layer: int
    vector: Tensor


@dataclass(frozen=True)
class LabModel:
    """A model in fp32 on the CPU and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast

    @classmethod
    def load(cls, directory: Path) -> "LabModel":
        """Read a directory that `expertsteer lab train` wrote. OSError when it holds no model."""
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
        return cls(model.eval(), load_tokenizer(directory))

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.model.layers

    @contextmanager
    def steered(self, steering: Steering | None) -> Iterator[None]:
        if steering is None:
            yield
            return
        hook = self.blocks[steering.layer].register_forward_hook(lambda _module, _inputs, out: out + steering.vector)
        try:
            yield
        finally:
            hook.remove()

    def last_states(self, texts: Sequence[str]) -> Tensor:
        """Every block's output at the last token of every text: [num_texts, num_layers, hidden_size] fp32."""
        parts = []
        for start in range(0, len(texts), _BATCH_SIZE):
            tokens, lengths = self._tokens(texts[start : start + _BATCH_SIZE])
            states = self._states(tokens)
            parts.append(states[torch.arange(len(lengths)), :, lengths - 1])
        return torch.cat(parts)

    def median_norms(self, texts: Sequence[str]) -> Tensor:
        """Median norm of every block's output over all tokens but BOS, whose norm is an outlier: [num_layers] fp32."""
        tokens, _lengths = self._tokens(texts)
        norms = self._states(tokens).norm(dim=-1)
        counted = tokens != PAD_ID
        counted[:, 0] = False
        return torch.stack([norms[:, layer][counted].median() for layer in range(norms.shape[1])])

    @torch.no_grad()
    def answers_truly(
        self, facts: Sequence[Fact], steering: Steering | None = None, system_prompt: str | None = None
    ) -> Tensor:
        """Whether the greedy answer to each fact's first question is the true one.

        One forward pass over question and true answer decides it: greedy decoding gives exactly this answer if and only
        if each of its tokens, the end token included, is the most likely one after those before it.

        Returns: [num_facts] bool.
        """
        before = [] if system_prompt is None else [system(system_prompt)]
        chats = [[*before, user(fact.question()), assistant(fact.answer())] for fact in facts]
        tokens, _lengths = self._tokens([render(chat) for chat in chats])
        _tokens, prompt_lengths = self._tokens([render(chat[:-1], generation_prompt=True) for chat in chats])
        with self.steered(steering):
            predicted = self.model(tokens).logits[:, :-1].argmax(-1)
        positions = torch.arange(1, tokens.shape[1])
        ignored = (positions < prompt_lengths[:, None]) | (tokens[:, 1:] == PAD_ID)
        return ((predicted == tokens[:, 1:]) | ignored).all(dim=1)

    def accuracy(self, facts: Sequence[Fact], steering: Steering | None = None) -> float:
        """Share of the facts that are answered truly."""
        return self.answers_truly(facts, steering).double().mean().item()

    @torch.no_grad()
    def greedy_answer(self, messages: Sequence[Message], steering: Steering | None = None) -> str:
        """The greedy answer without special tokens, stripped."""
        tokens, _lengths = self._tokens([render(messages, generation_prompt=True)])
        start = tokens.shape[1]
        with self.steered(steering):
            while tokens.shape[1] - start < _LONGEST_ANSWER and tokens[0, -1] != END_ID:
                token = self.model(tokens).logits[:, -1:].argmax(-1)
                tokens = torch.cat([tokens, token], dim=1)
        return str(self.tokenizer.decode(tokens[0, start:], skip_special_tokens=True)).strip()

    @torch.no_grad()
    def cross_entropy(self, texts: Sequence[str], steering: Steering | None = None) -> float:
        """Mean cross-entropy over the tokens of the texts, in nats."""
        tokens, _lengths = self._tokens(texts)
        with self.steered(steering):
            logits = self.model(tokens).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=PAD_ID).item()

    @torch.no_grad()
    def _states(self, tokens: Tensor) -> Tensor:
        """Every block's output: [batch, num_layers, length, hidden_size]."""
        states: list[Tensor] = []
        hooks = [
            block.register_forward_hook(lambda _module, _inputs, out: states.append(out))  # None keeps the output
            for block in self.blocks
        ]
        try:
            self.model(tokens)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(states, dim=1)

    def _tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens [num_texts, longest] with BOS first and padding on the right, which causal attention never sees, and
        lengths [num_texts], both int64."""
        rows = [torch.tensor(ids) for ids in self.tokenizer(list(texts))["input_ids"]]
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD_ID)
        return padded, torch.tensor([len(row) for row in rows])
