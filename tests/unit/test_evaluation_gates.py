"""Gates: what they accept, what they say, and that nothing in them is run."""

import pytest

from artifacts.evaluation.gates import check_gates, parse_gate

FIGURES = {"on": 0.8, "off": 0.2, "random.mean": 0.4, "untrained": 0.8, "permuted-labels.mean": 0.3, "retention": 0.98}


@pytest.mark.parametrize(
    ("text", "passed"),
    [
        ("on >= 0.6", True),
        ("on>=0.8", True),
        ("on > 0.8", False),
        ("on - random.mean >= 0.2", True),
        ("on - random.mean - off > 0.2", False),
        ("on > untrained", False),
        ("on >= untrained", True),
        ("on >= permuted-labels.mean + 0.4", True),
        ("0.25 > off", True),
        ("off - on < -0.5", True),
        ("retention >= 9.8e-1", True),
        ("  on   <=   .9 ", True),
    ],
)
def test_gates_hold_or_fail(text: str, passed: bool) -> None:
    assert parse_gate(text).check(FIGURES).passed is passed


def test_a_failed_gate_shows_figure_and_bound() -> None:
    (result,) = check_gates([parse_gate("on - random.mean >= 0.5")], FIGURES)
    assert (result.figure, result.bound) == (pytest.approx(0.4), 0.5)
    assert str(result) == "FAILED: on - random.mean >= 0.5 (0.4 against 0.5)"


def test_a_figure_that_was_not_measured_fails_the_gate() -> None:
    result = parse_gate("on > untrainde").check(FIGURES)
    assert not result.passed
    assert str(result) == "FAILED: on > untrainde (untrainde was not measured; close to it: untrained)"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "on",
        "on >=",
        ">= 0.6",
        "on = 0.6",
        "on == 0.6",
        "0.5 <= 0.6",
        "on-random.mean >= 0.2 + ",
        "on * 2 >= 1",
        "on - - off > 0",
        "on > off > 0",
        "__import__('os') >= 1",
        "on <= 1e999",
        "on >= " + "9" * 600,
    ],
)
def test_what_is_no_gate_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a gate is like"):
        parse_gate(text)
