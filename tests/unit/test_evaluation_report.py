"""A whole evaluation of a scripted subject: its figures, its JSON and its page."""

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

import pytest

from artifacts.evaluation.console import print_report
from artifacts.evaluation.gates import check_gates, parse_gate
from artifacts.evaluation.html import render_html, write_html
from artifacts.evaluation.judge import Judge, Scores
from artifacts.evaluation.plan import Baselines, doses, measurements
from artifacts.evaluation.rows import EvaluationRow, Questionnaire
from artifacts.evaluation.run import evaluate
from artifacts.evaluation.schema import About, Report, Settings, read_report, write_report
from artifacts.evaluation.subject import Condition, Likelihood
from artifacts.jobs.data import Text
from artifacts.jobs.errors import BuildError

HOSTILE = "</td><script>alert(1)</script><img src=http://evil/x onerror=alert(1)>\x1b[31m&amp;\"'$\\frac$"
RIGHT = {"careful": 8, "own": 9, "untrained": 4, "labels-a": 2, "labels-b": 4}


class Scripted:
    """Knows the first answers of twenty, how many depends on the vector; losses grow with the strength."""

    def __init__(self, extra: str = "") -> None:
        self._extra = extra

    def _known(self, steering: Condition, prompts: Sequence[Text]) -> int:
        if any(each.role == "system" for row in prompts for each in row.messages):
            return 20
        if steering.name is None:
            return 4
        if steering.name.startswith("random"):
            return int(steering.name.removeprefix("random-")) % 10
        return round(RIGHT[steering.name] * 2 * steering.strength) if steering.strength > 0 else 0

    def generate(self, prompts: Sequence[Text], steering: Condition, max_new_tokens: int) -> list[str]:
        known = self._known(steering, prompts)
        return [f"{n}" if n < known else f"wrong {self._extra}" for n in map(_number, prompts)]

    def log_likelihoods(
        self, prompts: Sequence[Text], continuations: Sequence[str], steering: Condition
    ) -> list[Likelihood]:
        known = self._known(steering, prompts)
        return [Likelihood(-1.0 if n < known else -9.0, 2, n < known) for n in map(_number, prompts)]

    def text_log_likelihoods(self, texts: Sequence[Text], steering: Condition) -> list[Likelihood]:
        return [Likelihood(-10.0 * (1 + abs(steering.strength) / 10), 10, False) for _ in texts]


def _number(row: Text) -> int:
    return int(re.findall(r"\d+", row.messages[-1].content)[0])


def _questionnaire(extra: str = "") -> Questionnaire:
    def rows(count: int) -> tuple[EvaluationRow, ...]:
        return tuple(
            EvaluationRow.model_validate(
                {
                    "messages": [{"role": "user", "content": f"{n} {extra}"}],
                    "answer": str(n),
                    "group": f"{n // 2}{extra}",
                }
            )
            for n in range(count)
        )

    neutral = tuple(EvaluationRow.model_validate({"text": f"text {n}", "task": "neutral"}) for n in range(3))
    return Questionnaire(rows(20), rows(2), neutral)


def _report(name: str = "careful", extra: str = "", **changes: Any) -> Report:
    controls = {"own": Condition("own", 1.0), "untrained": Condition("untrained", 1.0)}
    controls |= {"permuted-labels-0": Condition("labels-a", 1.0), "permuted-labels-1": Condition("labels-b", 1.0)}
    settings = Settings(prompt="be careful " + extra, doses=5, exact="generation", **changes)
    about = About(name="careful", subject={"model": name + extra}, recommended=1.0, maximum=1.0, layers=(2,))
    random = [Condition(f"random-{index}", 1.0) for index in range(30)]
    missing = {"shuffled-pairs": f"no pairs {extra}"}
    baselines = Baselines(controls, random, missing)
    report = evaluate(Scripted(extra), _questionnaire(extra), about, baselines, settings, quiet=True)
    pairs = tuple({"expert": e, "target": t, "held_out": e * t / 10, "r2": None} for e in range(2) for t in range(3))
    return report.model_copy(update={"pairs": pairs})


@pytest.fixture(scope="module")
def report() -> Report:
    return _report()


def test_figures_are_those_of_the_script(report: Report) -> None:
    figures = report.figures
    assert (figures["off"], figures["on"], figures["negated"], figures["prompt"]) == (0.2, 0.8, 0.0, 1.0)
    assert (figures["own"], figures["untrained"], figures["permuted-labels.mean"]) == (0.9, 0.4, pytest.approx(0.3))
    assert (figures["random.mean"], figures["random.max"]) == (pytest.approx(0.225), 0.45)
    assert figures["perplexity_ratio"] == figures["on.perplexity_ratio"] == pytest.approx(2.718281828**0.1)
    assert figures["gap_closed.prompt"] == pytest.approx(0.75)
    # Both retention questions are among the first four that the unsteered model knows.
    assert figures["retention"] == 1 and figures["negated.retention"] == 0
    assert figures["clas"] == pytest.approx(2 * 0.8 / 1.8)
    assert figures["p.random"] == pytest.approx(1 / 31)
    assert "prompt.perplexity_ratio" not in figures


def test_the_dose_response_runs_from_off_to_the_maximum(report: Report) -> None:
    strengths = [report.condition(name).strength for name in report.dose_response.conditions]
    assert strengths == [0, 0.25, 0.5, 0.75, 1]
    accuracies = [report.condition(name).accuracy.value for name in report.dose_response.conditions]
    # The first dose knows as much as no steering does, so the ranks tie there.
    assert accuracies == [0.2, 0.2, 0.4, 0.6, 0.8]
    assert report.dose_response.rho == pytest.approx(0.974679, abs=1e-6)


def test_every_row_and_comparison_can_be_recomputed(report: Report) -> None:
    on, off = report.condition("on"), report.condition("off")
    assert sum(on.correct) / len(on.correct) == on.accuracy.value
    against = {each.against: each for each in report.comparisons}
    assert set(against) == {"off", "prompt", "own", "untrained"}
    assert (against["off"].on_only, against["off"].other_only) == (12, 0)
    assert against["off"].p_value == pytest.approx(2 / 2**12)
    assert against["off"].p_holm == pytest.approx(4 * 2 / 2**12)
    assert against["own"].difference.value == pytest.approx(-0.1)
    assert off.losses is not None and sum(off.losses) == pytest.approx(30)
    assert [each.task for each in report.questions] == ["target"] * 20 + ["retention"] * 2 + ["neutral"] * 3


def test_missing_baselines_are_named(report: Report) -> None:
    assert report.not_measured == {"shuffled-pairs": "no pairs "}
    bare = evaluate(
        Scripted(),
        Questionnaire(_questionnaire().target),
        About(name="careful", subject={}, recommended=1.0, maximum=1.0),
        Baselines(),
        Settings(doses=2),
        quiet=True,
    )
    expected = {"random", "own", "untrained", "permuted-labels", "shuffled-pairs", "prompt"}
    assert set(bare.not_measured) == expected
    assert "retention" not in bare.figures and "perplexity_ratio" not in bare.figures
    assert bare.condition("on").likelihood == pytest.approx((-0.5 * 16 - 4.5 * 4) / 20)
    assert bare.condition("on").agreement == 1


class _Grader:
    """Gives the highest scores to right answers, none to wrong ones, and no judgement to the last question."""

    def score(self, questions: Sequence[str], answers: Sequence[str]) -> list[Scores | None]:
        return [*(Scores(0, 2, 2) if "wrong" in answer else Scores(2, 2, 1) for answer in answers[:-1]), None]


def test_a_judge_scores_off_on_and_prompt_and_its_failures_count_for_nothing() -> None:
    report = evaluate(
        Scripted(),
        _questionnaire(),
        About(name="careful", subject={}, recommended=1.0, maximum=1.0),
        Baselines(),
        Settings(doses=2, exact="generation", prompt="be careful"),
        judge=cast(Judge, _Grader()),
        quiet=True,
    )
    judged = {each.name: each.judge for each in report.conditions if each.judge is not None}
    assert set(judged) == {"off", "on", "prompt"}
    assert [each.failed for each in judged.values()] == [1, 1, 1]
    # Harmonic mean 1.5 for a right answer, 0 for a wrong one, over the 19 judged ones.
    assert report.figures["axbench"] == report.figures["on.axbench"] == pytest.approx(16 / 19 * 1.5)
    assert report.figures["off.axbench"] == pytest.approx(4 / 19 * 1.5)
    assert "1 of 20" in render_html(report)


def test_few_random_directions_are_refused() -> None:
    about = About(name="careful", subject={}, recommended=1.0, maximum=1.0)
    with pytest.raises(ValueError, match="29 random directions say too little"):
        measurements(about, Baselines(random=[Condition("random-0", 1.0)] * 29), Settings())


def test_doses_hold_the_recommended_strength_once() -> None:
    about = About(name="x", subject={}, recommended=0.3, maximum=0.9)
    assert doses(about, Settings(doses=4)) == pytest.approx([0, 0.3, 0.6, 0.9])
    assert doses(about, Settings(doses=3)) == pytest.approx([0, 0.3, 0.45, 0.9])
    assert doses(about, Settings(doses=2, negative_doses=True)) == pytest.approx([-0.9, -0.3, 0, 0.3, 0.9])
    reverse = About(name="x", subject={}, recommended=-0.5, maximum=1.0)
    assert doses(reverse, Settings(doses=3)) == pytest.approx([-1.0, -0.5, 0])


def test_the_report_survives_its_file(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_report(path, report)
    assert read_report(path) == report
    assert json.loads(path.read_text())["schema_version"] == 1
    assert list(tmp_path.iterdir()) == [path]
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(BuildError, match="no report of schema 1"):
        read_report(path)


def test_the_same_evaluation_gives_the_same_bytes(report: Report) -> None:
    again = _report()
    assert again == report
    assert render_html(again) == render_html(report)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attributes:
            assert not name.startswith("on"), f"{tag} has {name}"
            if name in ("src", "href", "xlink:href", "action", "data"):
                self.links.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_else_and_hostile_texts_stay_text(tmp_path: Path) -> None:
    hostile = _report(name="evil", extra=HOSTILE)
    gates = check_gates([parse_gate("on >= 0.9"), parse_gate("on > shuffled-pairs.mean")], hostile.figures)
    path = tmp_path / "report.html"
    write_html(path, hostile.model_copy(update={"gates": gates}))
    page = _Page()
    page.feed(path.read_text())
    assert page.tags.isdisjoint({"script", "img", "iframe", "object", "link", "form", "foreignobject"})
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert page.text.count("<script>alert(1)</script>") > 8
    assert "FAILED" in page.text and "was not measured" in page.text
    for expected in ("Dose-response", "Baselines", "Layers", "Answers", "Not measured"):
        assert expected in page.text


def test_the_page_plots_doses_baselines_and_layers(report: Report) -> None:
    page = render_html(report)
    # Gain is known for the pairs, mutual information and R2 are not.
    assert page.count("<svg") == 3
    assert render_html(report.model_copy(update={"pairs": ()})).count("<svg") == 2
    assert "prefers-color-scheme: dark" in page


def test_the_terminal_gets_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    print_report(_report(extra=HOSTILE), Console(width=100))
    printed = capsys.readouterr().out
    assert "\x1b[31m" not in printed
    assert "0.800" in printed and "not measured: shuffled-pairs" in printed
