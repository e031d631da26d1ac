"""Order of a benchmark's turns, and the arguments that vLLM's client gets."""

import json
import math
from collections import Counter
from dataclasses import replace

import pytest

from server.bench.plan import UNSTEERED, Plan, Turn

PLAN = Plan(
    server="http://127.0.0.1:8000",
    model="lab",
    tokenizer="folder",
    profiles=("careful",),
    rates=(2.0, math.inf),
    num_prompts=32,
    input_tokens=64,
    output_tokens=16,
    num_rounds=4,
    seed=5,
    salt="run",
)


def option(arguments: list[str], name: str) -> str:
    """Value of an option."""
    return arguments[arguments.index(name) + 1]


def test_drift_cancels() -> None:
    turns = [turn for turn in PLAN.turns() if turn.rate == 2.0]
    assert [turn.arm for turn in turns] == [UNSTEERED, "careful", "careful", UNSTEERED] * 2
    assert [turn.round for turn in turns] == [0, 0, 1, 1, 2, 2, 3, 3]
    three = replace(PLAN, profiles=("a", "b"), rates=(1.0,))
    # A drift that grows by one with every turn falls on all arms alike.
    assert len({sum(place for place, turn in enumerate(three.turns()) if turn.arm == arm) for arm in three.arms}) == 1


def test_arms_share_prompts_and_arrivals_and_nothing_in_the_cache() -> None:
    seeds, salts = {}, []
    for turn in PLAN.turns():
        arguments = PLAN.arguments(turn)
        seeds.setdefault((turn.rate, turn.round), set()).add(option(arguments, "--seed"))
        salts.append(json.loads(option(arguments, "--extra-body"))["cache_salt"])
    assert all(len(seed) == 1 for seed in seeds.values())
    assert len(set.union(*seeds.values())) == len(seeds) == 8
    warm_ups = [json.loads(option(each, "--extra-body"))["cache_salt"] for each in PLAN.warm_ups()]
    assert max(Counter([*salts, *warm_ups]).values()) == 1


def test_names_say_what_is_steered() -> None:
    def name(arm: str) -> str:
        return option(PLAN.arguments(Turn(2.0, 0, arm)), "--served-model-name")

    assert (name(UNSTEERED), name("careful")) == ("lab", "lab@careful")
    assert option(PLAN.arguments(Turn(math.inf, 0, "careful")), "--request-rate") == "inf"


@pytest.mark.parametrize(("rates", "least_s"), [((2.0,), 128.0), ((2.0, 4.0, math.inf), 192.0), ((math.inf,), 0.0)])
def test_least_duration(rates: tuple[float, ...], least_s: float) -> None:
    assert replace(PLAN, rates=rates).least_duration_s == least_s
