"""What steering does to a model: exact greedy answers and perplexity of neutral text."""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from artifacts.jobs.data import NeutralRow, Question
from artifacts.jobs.errors import BuildError
from artifacts.jobs.model import CausalModel, batches, pad
from artifacts.pairing.held_out import Trial

# Longer neutral texts are cut: more tokens of one text say little more about it.
MAX_NEUTRAL_TOKENS = 512
# Logits of one forward pass, in numbers; bounds the memory of the perplexity whatever the vocabulary.
MAX_LOGITS = 2**28
# Room for the end-of-turn token and one token of a different spelling.
SPARE_TOKENS = 2

Vectors = Mapping[int, Tensor]
UNSTEERED: Vectors = {}


class Examination:
    """The questions and neutral texts of one split, ready to be put to a model under any steering."""

    def __init__(
        self,
        model: CausalModel,
        questions: Sequence[Question],
        neutral: Sequence[NeutralRow],
        batch_tokens: int,
        max_new_tokens: int | None = None,
    ) -> None:
        """Tokenise everything once.

        Raises:
            BuildError: there is no neutral text of two tokens, so perplexity has no meaning.
        """
        self._model = model
        self._batch_tokens = batch_tokens
        self._answers = [question.answer.strip() for question in questions]
        self._prompts = [model.prompt_ids(question) for question in questions]
        self._max_new_tokens = max_new_tokens or SPARE_TOKENS + max(len(model.answer_ids(each)) for each in questions)
        self.num_questions = len(questions)
        texts = [model.prompt_ids(row)[:MAX_NEUTRAL_TOKENS] for row in neutral]
        self._neutral = [ids for ids in texts if len(ids) > 1]
        if not self._neutral:
            raise BuildError("the split has no neutral text of at least two tokens; perplexity needs one")

    def answers(self, vectors: Vectors = UNSTEERED) -> list[str]:
        """Greedy answers, special tokens and surrounding space taken off, in the order of the questions."""
        return greedy(self._model, self._prompts, self._max_new_tokens, self._batch_tokens, vectors)

    def accuracy(self, vectors: Vectors = UNSTEERED) -> float:
        """Share of questions whose greedy answer is exactly the expected one."""
        given = self.answers(vectors)
        return sum(map(str.__eq__, given, self._answers)) / len(given)

    def perplexity_ratio(self, vectors: Vectors) -> float:
        """Perplexity of the neutral texts, steered over unsteered; finite even where the model falls apart."""
        difference = self._negative_log_likelihood(vectors) - self._unsteered_negative_log_likelihood
        return math.exp(min(difference, 50.0)) if math.isfinite(difference) else math.exp(50.0)

    def trial(self, strength: float, vectors: Vectors) -> Trial:
        """Measure `strength * vectors`."""
        scaled = {layer: strength * vector for layer, vector in vectors.items()}
        return Trial(strength, self.accuracy(scaled), self.perplexity_ratio(scaled))

    @cached_property
    def unsteered_accuracy(self) -> float:
        return self.accuracy()

    @cached_property
    def _unsteered_negative_log_likelihood(self) -> float:
        return self._negative_log_likelihood(UNSTEERED)

    @torch.inference_mode()
    def _negative_log_likelihood(self, vectors: Vectors) -> float:
        total, count = 0.0, 0
        batch_tokens = min(
            self._batch_tokens, MAX_LOGITS // self._model.network.get_output_embeddings().weight.shape[0]
        )
        with self._model.steered(vectors):
            for indices in batches(self._neutral, batch_tokens):
                ids, mask = pad(self._model, [self._neutral[index] for index in indices], left=False)
                logits = self._model.network(input_ids=ids, attention_mask=mask, use_cache=False).logits
                following = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
                loss = cross_entropy(logits[:, :-1].float().flatten(0, 1), following.flatten(), reduction="sum")
                total, count = total + float(loss), count + int(mask[:, 1:].sum())
        return total / count


@torch.inference_mode()
def greedy(
    model: CausalModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_tokens: int,
    vectors: Vectors = UNSTEERED,
) -> list[str]:
    """Greedy continuations of tokenised prompts, decoded without special tokens and stripped, in order."""
    from transformers import GenerationConfig

    # A configuration of its own: the model's may sample or punish repetition.
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=model.stop_ids or None, pad_token_id=model.pad_id
    )
    texts = [""] * len(prompts)
    with model.steered(vectors):
        for indices in batches(prompts, batch_tokens):
            ids, mask = pad(model, [prompts[index] for index in indices], left=True)
            output = model.network.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
            decoded = model.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
            for index, text in zip(indices, decoded, strict=True):
                texts[index] = text.strip()
    return texts
