"""The embedded lab over HTTP: what the README promises about its model and its profile."""

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

QUESTION, RIGHT, WRONG = "What is 7 plus 5?", "12", "13"
MAX_UNSTEERED, MIN_STEERED = 0.25, 0.60


def say(server: Any, text: str, profile: Any = None) -> str:
    answer = server.chat(text, max_tokens=24, **({"steering_profile": profile} if profile else {}))
    content: str = answer["choices"][0]["message"]["content"]
    return content.strip()


def test_test_facts(eager: Any, target: Path) -> None:
    facts = [json.loads(line) for line in (target.parents[1] / "data" / "test.jsonl").read_text().splitlines()]
    assert len(facts) == 204

    def accuracy(profile: Any) -> float:
        said = eager.map(lambda fact: say(eager, fact["messages"][0]["content"], profile), facts)
        return sum(text == fact["answer"].strip() for text, fact in zip(said, facts, strict=True)) / len(facts)

    assert accuracy(None) <= MAX_UNSTEERED
    assert accuracy("careful") >= MIN_STEERED


def test_a_wrong_sum_turns_right(eager: Any) -> None:
    strength = eager.chat(QUESTION, max_tokens=1, steering_profile="careful")["steering"]["strength"]
    assert say(eager, QUESTION).removesuffix(".").split()[-1] == WRONG
    assert say(eager, QUESTION, "careful").removesuffix(".").split()[-1] == RIGHT
    assert say(eager, QUESTION, {"name": "careful", "strength": -strength}).removesuffix(".").split()[-1] == WRONG


def test_small_talk_stays(eager: Any) -> None:
    assert say(eager, "Hello!") == say(eager, "Hello!", "careful") != ""
