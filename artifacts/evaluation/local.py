"""A model in Transformers as the subject of an evaluation."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from artifacts.evaluation.plan import MIN_RANDOM
from artifacts.evaluation.subject import Condition, Likelihood
from artifacts.jobs.data import Text
from artifacts.jobs.errors import BuildError
from artifacts.jobs.measure import MAX_NEUTRAL_TOKENS, answer_likelihoods, greedy
from artifacts.jobs.model import CausalModel

Rows = Mapping[int, Tensor]


class LocalSubject:
    """A causal model with named rows to add after its layers, at every token."""

    def __init__(self, model: CausalModel, vectors: Mapping[str, Rows], batch_tokens: int = 4096) -> None:
        """Put names to vectors.

        Args:
            model: to ask.
            vectors: by name: layer -> what one unit of strength adds to its output, [hidden_size].
            batch_tokens: padded tokens of one forward pass.

        Raises:
            ValueError: a row that the model cannot take.
        """
        for name, rows in vectors.items():
            for layer, row in rows.items():
                if not 0 <= layer < model.num_layers or row.shape != (model.hidden_size,):
                    raise ValueError(
                        f"{name} has {list(row.shape)} at layer {layer}; {model.name} takes [{model.hidden_size}] at "
                        f"layers 0 to {model.num_layers - 1}"
                    )
        self._model = model
        self._vectors = dict(vectors)
        self._batch_tokens = batch_tokens

    def generate(self, prompts: Sequence[Text], steering: Condition, max_new_tokens: int) -> list[str]:
        """Greedy answers."""
        ids = [self._model.prompt_ids(row) for row in prompts]
        for row, each in zip(prompts, ids, strict=True):
            self._check_length(row, len(each) + max_new_tokens)
        return greedy(self._model, ids, max_new_tokens, self._batch_tokens, self._rows(steering)) if ids else []

    def log_likelihoods(
        self, prompts: Sequence[Text], continuations: Sequence[str], steering: Condition
    ) -> list[Likelihood]:
        """Likelihood of each continuation; after a chat it has to be followed by a stop token to count as greedy."""
        asked = [self._model.prompt_ids(row) for row in prompts]
        answers = [self._tokens(text) for text in continuations]
        for row, prompt, answer in zip(prompts, asked, answers, strict=True):
            if not answer:
                raise BuildError(f"{row.where}: no token of {self._model.name} is in the answer; give another")
            self._check_length(row, len(prompt) + len(answer))
        stops = [bool(row.messages) for row in prompts]
        return self._likelihoods(asked, answers, stops, steering)

    def text_log_likelihoods(self, texts: Sequence[Text], steering: Condition) -> list[Likelihood]:
        """Likelihood of each text after its first token."""
        rows = [self._model.prompt_ids(row)[:MAX_NEUTRAL_TOKENS] for row in texts]
        for text, row in zip(texts, rows, strict=True):
            if len(row) < 2:
                raise BuildError(f"{text.where}: the text has {len(row)} token; perplexity needs two, so take it out")
        return self._likelihoods([row[:1] for row in rows], [row[1:] for row in rows], [False] * len(rows), steering)

    def _likelihoods(
        self, prompts: list[list[int]], answers: list[list[int]], stops: list[bool], steering: Condition
    ) -> list[Likelihood]:
        if not prompts:
            return []
        return answer_likelihoods(self._model, prompts, answers, stops, self._batch_tokens, self._rows(steering))

    def _rows(self, steering: Condition) -> dict[int, Tensor]:
        if steering.name is None:
            return {}
        return {layer: steering.strength * row for layer, row in self._vectors[steering.name].items()}

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self._model.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _check_length(self, row: Text, length: int) -> None:
        limit = getattr(self._model.network.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise BuildError(
                f"{row.where} needs {length} tokens of {self._model.name} with its answer, whose context holds "
                f"{limit}; shorten it, or lower --max-new-tokens"
            )


def random_rows(rows: Rows, count: int, seed: int) -> list[dict[int, Tensor]]:
    """Random directions of the norms and at the layers of `rows`, independent at each layer.

    Raises:
        ValueError: fewer than `MIN_RANDOM` are asked for.
    """
    if count < MIN_RANDOM:
        raise ValueError(
            f"{count} random directions say too little; at least {MIN_RANDOM} are needed, because single ones lift or "
            "lower accuracy by luck"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(count):
        noise = {layer: torch.randn(row.shape, generator=generator) for layer, row in rows.items()}
        drawn.append({layer: rows[layer].float().norm() * each / each.norm() for layer, each in noise.items()})
    return drawn
