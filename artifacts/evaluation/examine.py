"""Questions put to a subject under one condition, and which of its answers are right."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from artifacts.evaluation import metrics
from artifacts.evaluation.rows import EvaluationRow, with_system_prompt
from artifacts.evaluation.schema import Settings
from artifacts.evaluation.subject import Condition, Likelihood, Subject


@dataclass
class Answered:
    """Answers to questions, in order.

    Attributes:
        correct: by question.
        likelihoods: log-likelihood per token of the right answer in nats; None where it was not asked for.
        texts: generated answers; None where nothing was generated.
        compared: exact questions that both ways of telling an exact answer were used on.
        disagreements: exact questions on which the forced pass and the generated text disagree; None unless both
            were done.
    """

    correct: list[bool]
    likelihoods: list[float | None]
    texts: list[str | None]
    disagreements: int | None = None
    compared: int = 0

    @property
    def mean_likelihood(self) -> float | None:
        """Over the questions that have one."""
        known = [each for each in self.likelihoods if each is not None]
        return sum(known) / len(known) if known else None

    @property
    def agreement(self) -> float | None:
        """Share of the questions compared on which both ways of telling exact answers agree."""
        return None if self.disagreements is None else 1 - self.disagreements / self.compared


class Examiner:
    """Puts questions to one subject."""

    def __init__(self, subject: Subject, settings: Settings) -> None:
        self._subject = subject
        self._settings = settings

    def answer(
        self, rows: Sequence[EvaluationRow], steering: Condition, prompt: str | None = None, texts: bool = False
    ) -> Answered:
        """Ask every question.

        Args:
            rows: no neutral ones.
            steering: of every answer.
            prompt: system prompt to put before every question.
            texts: generate an answer to every question, also where the forced pass tells whether it is right.
        """
        asked = [row if prompt is None else with_system_prompt(row, prompt) for row in rows]
        found = Answered([False] * len(rows), [None] * len(rows), [None] * len(rows))
        places: dict[Literal["answer", "pattern", "choices", "neutral"], list[int]] = {}
        for index, row in enumerate(rows):
            places.setdefault(row.kind, []).append(index)
        forced = self._settings.exact == "forced"
        self._choose(asked, places.get("choices", []), steering, found)
        if forced:
            self._force(asked, places.get("answer", []), steering, found)
        written = (
            list(range(len(rows)))
            if texts
            else places.get("pattern", []) + [index for index in places.get("answer", []) if not forced]
        )
        self._write(asked, sorted(written), steering, found)
        return found

    def read(self, texts: Sequence[EvaluationRow], steering: Condition) -> list[Likelihood]:
        """Likelihood of neutral texts."""
        return self._subject.text_log_likelihoods(texts, steering) if texts else []

    def _choose(self, asked: list[EvaluationRow], places: list[int], steering: Condition, found: Answered) -> None:
        flat = [(place, choice) for place in places for choice in asked[place].choices or ()]
        given = self._likelihoods([asked[place] for place, _ in flat], [choice for _, choice in flat], steering)
        start = 0
        for place in places:
            row = asked[place]
            assert row.choices is not None and row.correct is not None
            mine = given[start : start + len(row.choices)]
            start += len(mine)
            found.correct[place] = metrics.likeliest(mine) == row.correct
            found.likelihoods[place] = metrics.per_token(mine[row.correct])

    def _force(self, asked: list[EvaluationRow], places: list[int], steering: Condition, found: Answered) -> None:
        given = self._likelihoods(
            [asked[place] for place in places], [asked[place].answer or "" for place in places], steering
        )
        for place, each in zip(places, given, strict=True):
            found.correct[place] = each.greedy
            found.likelihoods[place] = metrics.per_token(each)

    def _write(self, asked: list[EvaluationRow], places: list[int], steering: Condition, found: Answered) -> None:
        if not places:
            return
        given = self._subject.generate([asked[place] for place in places], steering, self._settings.max_new_tokens)
        compared = self._settings.exact == "forced"
        for place, text in zip(places, given, strict=True):
            row = asked[place]
            found.texts[place] = text
            if row.pattern is not None:
                found.correct[place] = metrics.pattern_match(text, row.pattern)
            elif row.answer is not None:
                right = metrics.exact_match(text, row.answer)
                if compared:
                    found.compared += 1
                    found.disagreements = (found.disagreements or 0) + (right != found.correct[place])
                else:
                    found.correct[place] = right

    def _likelihoods(
        self, prompts: list[EvaluationRow], continuations: list[str], steering: Condition
    ) -> list[Likelihood]:
        return self._subject.log_likelihoods(prompts, continuations, steering) if prompts else []
