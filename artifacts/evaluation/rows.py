"""Rows of the JSON Lines files that an evaluation reads, and what they ask."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import StrictInt, model_validator

from artifacts.jobs.data import Message, Text, content, read_rows
from artifacts.jobs.errors import BuildError

Task = Literal["target", "retention", "neutral"]


class EvaluationRow(Text):
    """A question with what a right answer is, or neutral text.

    A question has exactly one of `answer` (the exact text), `pattern` (a regular expression that the answer must
    contain a match of) and `choices` with `correct` (index of the right one). Neutral text has none of them; it says
    `task: neutral` or `split`, and of splits only `test` is used.

    `task` is `target` (what the vector is for), `retention` (what it must leave alone) or `neutral`. Rows of one
    `group` are resampled together.
    """

    PAIRED: ClassVar[bool] = False

    answer: str | None = None
    pattern: str | None = None
    choices: tuple[str, ...] | None = None
    correct: StrictInt | None = None
    task: Task | None = None
    split: Literal["fit", "tune", "test"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_no_contrast(cls, value: Any) -> Any:
        # Its texts would otherwise pass for neutral ones, because they have a split and no answer.
        if isinstance(value, dict) and "label" in value:
            raise ValueError(
                "the row has a `label`, so it is an example to fit a direction on; give rows to evaluate on"
            )
        return value

    @model_validator(mode="after")
    def _asks_one_thing(self) -> Self:
        given = [name for name in ("answer", "pattern", "choices") if getattr(self, name) is not None]
        if self.is_neutral:
            if given or self.correct is not None:
                raise ValueError(f"neutral text has no {(given or ['correct'])[0]!r}; take it out or name another task")
            return self
        if len(given) != 1:
            raise ValueError(
                f"a question has exactly one of `answer`, `pattern` and `choices`, this row has {len(given)}; "
                "neutral text says `task`: `neutral`"
            )
        if self.has_response:
            raise ValueError("a question ends in the user's turn; what the model should say goes into `answer`")
        return self

    @model_validator(mode="after")
    def _right_answer_is_usable(self) -> Self:
        if self.answer is not None and not self.answer.strip():
            raise ValueError("`answer` is empty or white space")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"`pattern` {self.pattern!r} is no regular expression: {error}") from None
        if self.choices is None:
            if self.correct is not None:
                raise ValueError("`correct` goes with `choices`")
            return self
        if len(set(self.choices)) != len(self.choices) or len(self.choices) < 2 or not all(self.choices):
            raise ValueError(f"`choices` are {len(self.choices)}; at least two are needed, all different, none empty")
        if self.correct is None or not 0 <= self.correct < len(self.choices):
            raise ValueError(
                f"`correct` is {self.correct}; it must be the index of a choice, 0 to {len(self.choices) - 1}"
            )
        return self

    @property
    def is_neutral(self) -> bool:
        if self.task is not None:
            return self.task == "neutral"
        return self.split is not None and self.answer is None and self.pattern is None and self.choices is None

    @property
    def expected(self) -> str:
        """The right answer, for people."""
        if self.choices is not None and self.correct is not None:
            return self.choices[self.correct]
        return self.answer if self.answer is not None else f"/{self.pattern}/"

    @property
    def kind(self) -> Literal["answer", "pattern", "choices", "neutral"]:
        if self.choices is not None:
            return "choices"
        if self.pattern is not None:
            return "pattern"
        return "neutral" if self.answer is None else "answer"


@dataclass(frozen=True)
class Questionnaire:
    """Everything that is put to a model.

    Attributes:
        target: questions that the vector is for; never empty.
        retention: questions that it must leave alone.
        neutral: texts whose perplexity it must leave alone.
    """

    target: tuple[EvaluationRow, ...]
    retention: tuple[EvaluationRow, ...] = ()
    neutral: tuple[EvaluationRow, ...] = ()


def read_questionnaire(data: Sequence[Path], retention: Sequence[Path] = ()) -> Questionnaire:
    """Read evaluation files.

    Args:
        data: files whose rows are of task `target` unless they say otherwise.
        retention: files whose rows are of task `retention` unless they say otherwise.

    Raises:
        BuildError: a file cannot be read, a line is no such row, a question is asked twice for one task, or nothing is
            of task `target`; lines are named.
    """
    tasks: dict[Task, list[EvaluationRow]] = {"target": [], "retention": [], "neutral": []}
    files: list[tuple[Path, Task]] = [(path, "target") for path in data] + [(path, "retention") for path in retention]
    for path, default in files:
        for row in read_rows(path, EvaluationRow):
            if row.split in (None, "test"):
                tasks["neutral" if row.is_neutral else row.task or default].append(row)
    for task, rows in tasks.items():
        if task != "neutral":
            _refuse_repeats(task, rows)
    if not tasks["target"]:
        raise BuildError(
            f"no question of task `target` in {', '.join(map(str, [*data, *retention]))}; at least one is needed "
            "(rows of split fit or tune are left out)"
        )
    return Questionnaire(*(tuple(tasks[task]) for task in ("target", "retention", "neutral")))


def with_system_prompt(row: EvaluationRow, prompt: str) -> EvaluationRow:
    """The same row under a system prompt, which is put before one that a chat already has, and before plain text."""
    if not row.messages:
        changed = row.model_copy(update={"text": f"{prompt}\n\n{row.text}"})
    elif row.messages[0].role == "system":
        first = Message(role="system", content=f"{prompt}\n\n{row.messages[0].content}")
        changed = row.model_copy(update={"messages": (first, *row.messages[1:])})
    else:
        changed = row.model_copy(update={"messages": (Message(role="system", content=prompt), *row.messages)})
    return changed


def _refuse_repeats(task: Task, rows: Sequence[EvaluationRow]) -> None:
    seen: dict[str, EvaluationRow] = {}
    for row in rows:
        first = seen.setdefault(content(row), row)
        if first is not row:
            raise BuildError(
                f"{row.where} asks the question of {first.where} again (task {task}), so it would count twice; "
                "take one of them out"
            )
