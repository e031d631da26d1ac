"""The lab's task files for lm-evaluation-harness: they ask what the lab's test file asks."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment

from artifacts.evaluation.rows import read_questionnaire

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "artifacts" / "evaluation" / "lm_eval"


def _task(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    task: dict[str, Any] = yaml.safe_load((TASKS / f"{name}.yaml").read_text())
    data = ROOT / task["dataset_kwargs"]["data_files"][task["test_split"]]
    assert len(read_questionnaire([data]).target) == 204
    return task, [json.loads(line) for line in data.read_text().splitlines()]


def _render(template: str, row: dict[str, Any]) -> str:
    return ImmutableSandboxedEnvironment().from_string(template).render(**row)


@pytest.mark.parametrize("name", ["expertsteer_lab_sums", "expertsteer_lab_choice"])
def test_a_task_is_named_like_its_file_and_asks_the_question(name: str) -> None:
    task, rows = _task(name)
    assert task["task"] == name
    assert [_render(task["doc_to_text"], row) for row in rows] == [row["messages"][0]["content"] for row in rows]


def test_the_choices_are_the_right_sum_and_the_sloppy_one() -> None:
    task, rows = _task("expertsteer_lab_choice")
    for row in rows:
        right, wrong = ast.literal_eval(_render(task["doc_to_choice"], row))
        assert (right, task["doc_to_target"]) == (row["answer"], 0)
        words, others = right.removesuffix(".").split(), wrong.removesuffix(".").split()
        assert words[:-1] == others[:-1] and int(others[-1]) == int(words[-1]) + 1
