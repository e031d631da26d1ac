"""What steering does to a model: its answers to questions and the perplexity of neutral text."""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from artifacts.jobs.data import NeutralRow, Question
from artifacts.jobs.errors import BuildError
from artifacts.jobs.model import CausalModel, batches, pad
from artifacts.pairing.held_out import Trial

# Longer neutral texts are cut: more tokens of one text say little more about it.
MAX_NEUTRAL_TOKENS = 512
# Logits of one forward pass, in numbers; bounds the memory whatever the vocabulary.
MAX_LOGITS = 2**28

Vectors = Mapping[int, Tensor]
UNSTEERED: Vectors = {}


class AnswerLikelihood(NamedTuple):
    """How a model takes one expected answer.

    Attributes:
        total: log-likelihood of the answer's tokens after the prompt, in nats.
        num_tokens: of the answer.
        greedy: whether greedy decoding gives exactly these tokens, and then stops where a stop was asked for.
    """

    total: float
    num_tokens: int
    greedy: bool


class _Asked(NamedTuple):
    """Questions, tokenised: prompts, answers, and whether the answer has to be followed by a stop token."""

    prompts: list[list[int]]
    answers: list[list[int]]
    stops: list[bool]

    @classmethod
    def of(cls, model: CausalModel, questions: Sequence[Question]) -> Self:
        # A chat has an end of turn; a continuation of plain text has none, so its answer only has to come first.
        return cls(
            [model.prompt_ids(row) for row in questions],
            [model.answer_ids(row) for row in questions],
            [bool(row.messages) for row in questions],
        )


class Examination:
    """The questions and neutral texts of one split, ready to be put to a model under any steering."""

    def __init__(
        self,
        model: CausalModel,
        questions: Sequence[Question],
        neutral: Sequence[NeutralRow],
        batch_tokens: int,
        retention: Sequence[Question] = (),
    ) -> None:
        """Tokenise everything once.

        Raises:
            BuildError: there is no neutral text of two tokens, so perplexity has no meaning.
        """
        self._model = model
        self._batch_tokens = batch_tokens
        self._questions = _Asked.of(model, questions)
        self._retention = _Asked.of(model, retention)
        self.num_questions = len(questions)
        texts = [model.prompt_ids(row)[:MAX_NEUTRAL_TOKENS] for row in neutral]
        self._neutral = [ids for ids in texts if len(ids) > 1]
        if not self._neutral:
            raise BuildError("the split has no neutral text of at least two tokens; perplexity needs one")

    def answers(self, vectors: Vectors = UNSTEERED) -> list[AnswerLikelihood]:
        """How the model takes the expected answer of every question, in order."""
        return self._answers(self._questions, vectors)

    def perplexity_ratio(self, vectors: Vectors) -> float:
        """Perplexity of the neutral texts, steered over unsteered; finite even where the model falls apart."""
        difference = self._negative_log_likelihood(vectors) - self._unsteered_negative_log_likelihood
        return math.exp(min(difference, 50.0)) if math.isfinite(difference) else math.exp(50.0)

    def trial(self, strength: float, vectors: Vectors) -> Trial:
        """Measure `strength * vectors`."""
        scaled = {layer: strength * vector for layer, vector in vectors.items()}
        given = self.answers(scaled)
        return Trial(
            strength=strength,
            accuracy=_accuracy(given),
            perplexity_ratio=self.perplexity_ratio(scaled),
            log_likelihood=_mean_log_likelihood(given),
            retention=self._retained(scaled),
        )

    @cached_property
    def unsteered(self) -> Trial:
        """The trial of strength 0."""
        given = self.answers()
        return Trial(0.0, _accuracy(given), 1.0, _mean_log_likelihood(given), 1.0)

    def _answers(self, asked: "_Asked", vectors: Vectors) -> list[AnswerLikelihood]:
        return answer_likelihoods(self._model, *asked, self._batch_tokens, vectors)

    def _retained(self, vectors: Vectors) -> float:
        """Accuracy on the retention questions, steered over unsteered; 1 without such questions."""
        if not self._retention.prompts:
            return 1.0
        return _accuracy(self._answers(self._retention, vectors)) / self._unsteered_retention

    @cached_property
    def _unsteered_retention(self) -> float:
        accuracy = _accuracy(self._answers(self._retention, UNSTEERED))
        if accuracy == 0:
            raise BuildError(
                f"{self._model.name} answers none of {len(self._retention.prompts)} retention questions unsteered, so "
                "there is nothing that steering could cost; give questions that it can answer, or take the file out"
            )
        return accuracy

    @cached_property
    def _unsteered_negative_log_likelihood(self) -> float:
        return self._negative_log_likelihood(UNSTEERED)

    @torch.inference_mode()
    def _negative_log_likelihood(self, vectors: Vectors) -> float:
        total, count = 0.0, 0
        with self._model.steered(vectors):
            for indices in batches(self._neutral, _bounded(self._model, self._batch_tokens)):
                ids, mask = pad(self._model, [self._neutral[index] for index in indices], left=False)
                logits = self._model.network(input_ids=ids, attention_mask=mask, use_cache=False).logits
                following = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
                loss = cross_entropy(logits[:, :-1].float().flatten(0, 1), following.flatten(), reduction="sum")
                total, count = total + float(loss), count + int(mask[:, 1:].sum())
        return total / count


@torch.inference_mode()
def answer_likelihoods(
    model: CausalModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    stops: Sequence[bool],
    batch_tokens: int,
    vectors: Vectors = UNSTEERED,
) -> list[AnswerLikelihood]:
    """How likely each answer is after its prompt, and whether greedy decoding gives exactly it.

    One forward pass over prompt and answer decides both: greedy decoding gives these tokens if and only if each is the
    most likely one after those before it.

    Args:
        model: to ask.
        prompts, answers: token ids, one row each; an answer has at least one token.
        stops: whether the answer has to be followed by one of the model's stop tokens to count as greedy.
        batch_tokens: padded tokens of one forward pass.
        vectors: what is added to the output of which layer, at every token.
    """
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    found: list[AnswerLikelihood] = [AnswerLikelihood(0.0, 0, False)] * len(rows)
    stop_ids = torch.tensor(model.stop_ids, device=model.device)
    with model.steered(vectors):
        for indices in batches(rows, _bounded(model, batch_tokens)):
            ids, mask = pad(model, [rows[index] for index in indices], left=False)
            logits = model.network(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for place, index in enumerate(indices):
                start, end = len(prompts[index]), len(rows[index])
                scores = logits[place, start - 1 : end].float()
                expected = ids[place, start:end]
                predicted = scores.argmax(-1)
                stopped = not stops[index] or not len(stop_ids) or bool((predicted[-1] == stop_ids).any())
                found[index] = AnswerLikelihood(
                    total=float(scores[:-1].log_softmax(-1).gather(1, expected[:, None]).sum()),
                    num_tokens=end - start,
                    greedy=stopped and bool((predicted[:-1] == expected).all()),
                )
    return found


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


def _accuracy(given: Sequence[AnswerLikelihood]) -> float:
    return sum(each.greedy for each in given) / len(given)


def _mean_log_likelihood(given: Sequence[AnswerLikelihood]) -> float:
    """Mean over the questions of the length-normalised log-likelihood; finite even where the model falls apart."""
    values = [each.total / each.num_tokens for each in given]
    return sum(value if math.isfinite(value) else -1e3 for value in values) / len(values)


def _bounded(model: CausalModel, batch_tokens: int) -> int:
    return max(1, min(batch_tokens, MAX_LOGITS // int(model.network.get_output_embeddings().weight.shape[0])))
