"""Rows of evaluation files: the lab's as they are, and every kind of bad line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifacts.evaluation.rows import EvaluationRow, read_questionnaire, with_system_prompt
from artifacts.jobs.errors import BuildError

DATA = Path(__file__).parents[2] / "artifacts" / "lab" / "data"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "what is 1 plus 1"}]}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def run(*rows: dict[str, Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return run


def test_the_lab_files_work_as_they_are() -> None:
    found = read_questionnaire([DATA / "test.jsonl", DATA / "neutral.jsonl"], [DATA / "retention.jsonl"])
    assert (len(found.target), len(found.retention), len(found.neutral)) == (204, 15, 150)
    assert {row.kind for row in found.target} == {"answer"}
    assert {row.split for row in found.neutral} == {"test"}


def test_a_row_may_name_its_task_and_that_wins_over_the_option(write: Callable[..., Path]) -> None:
    path = write(
        {**ASK, "answer": "2", "task": "target"},
        {"text": "the old man", "task": "neutral"},
        {**ASK, "split": "test"},
        {"text": "1 plus 1 is", "pattern": "\\b2\\b"},
        {"text": "1 plus 2 is", "choices": [" 3", " 4"], "correct": 0},
    )
    found = read_questionnaire([], [path])
    assert [row.kind for row in found.target] == ["answer"]
    assert [row.kind for row in found.retention] == ["pattern", "choices"]
    assert [row.expected for row in found.retention] == ["/\\b2\\b/", " 3"]
    assert len(found.neutral) == 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (ASK, "exactly one of"),
        ({**ASK, "answer": "2", "pattern": "2"}, "exactly one of"),
        ({**ASK, "answer": " "}, "empty"),
        ({**ASK, "pattern": "("}, "no regular expression"),
        ({**ASK, "choices": ["2"], "correct": 0}, "at least two"),
        ({**ASK, "choices": ["2", "2"], "correct": 0}, "all different"),
        ({**ASK, "choices": ["2", "3"], "correct": 2}, "0 to 1"),
        ({**ASK, "choices": ["2", "3"], "correct": -1}, "0 to 1"),
        ({**ASK, "choices": ["2", "3"]}, "`correct` is None"),
        ({**ASK, "choices": ["2", "3"], "correct": True}, "integer"),
        ({**ASK, "answer": "2", "correct": 0}, "goes with `choices`"),
        ({**ASK, "answer": "2", "task": "neutral"}, "neutral text has no 'answer'"),
        ({**ASK, "label": 1, "split": "test"}, "fit a direction on"),
        ({**ASK, "answer": "2", "task": "other"}, "target"),
        ({"messages": [*ASK["messages"], {"role": "assistant", "content": "2"}], "answer": "2"}, "user's turn"),
        ({"answer": "2"}, "exactly one of `messages` and `text`"),
    ],
)
def test_bad_rows_are_named_by_line(row: dict[str, Any], reason: str, write: Callable[..., Path]) -> None:
    path = write({**ASK, "answer": "2"}, row)
    with pytest.raises(BuildError, match="line 2") as caught:
        read_questionnaire([path])
    assert reason in str(caught.value)


def test_a_question_asked_twice_is_refused_even_across_files(write: Callable[..., Path]) -> None:
    first = write({**ASK, "answer": "2"}, name="first.jsonl")
    second = write({"text": "1 plus 1 is", "answer": "2"}, {**ASK, "answer": "two"}, name="second.jsonl")
    with pytest.raises(BuildError, match=r"second\.jsonl line 2 asks the question of .*first\.jsonl line 1"):
        read_questionnaire([first, second])


def test_files_without_a_target_question_are_refused(write: Callable[..., Path]) -> None:
    with pytest.raises(BuildError, match="no question of task `target`"):
        read_questionnaire([write({"text": "the old man", "split": "test"})])


def test_rows_of_other_splits_are_left_out(write: Callable[..., Path]) -> None:
    found = read_questionnaire([write({**ASK, "answer": "2"}, {"text": "1 plus 2 is", "answer": "3", "split": "tune"})])
    assert len(found.target) == 1


def test_a_system_prompt_goes_before_the_one_that_is_there() -> None:
    chat = EvaluationRow.model_validate({**ASK, "answer": "2"})
    framed = with_system_prompt(chat, "be careful")
    assert [(each.role, each.content) for each in framed.messages] == [
        ("system", "be careful"),
        ("user", "what is 1 plus 1"),
    ]
    assert with_system_prompt(framed, "old man").messages[0].content == "old man\n\nbe careful"
    assert len(with_system_prompt(framed, "old man").messages) == 2
    text = EvaluationRow.model_validate({"text": "1 plus 1 is", "answer": "2"})
    assert with_system_prompt(text, "be careful").text == "be careful\n\n1 plus 1 is"
    assert framed.answer == "2"
