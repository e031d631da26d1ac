"""The evaluation itself: every condition put to the same questions, with baselines, intervals and tests."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from artifacts.evaluation import metrics
from artifacts.evaluation.examine import Answered, Examiner
from artifacts.evaluation.judge import Judge
from artifacts.evaluation.plan import Baselines, Measurement, measurements, not_measured
from artifacts.evaluation.rows import EvaluationRow, Questionnaire, Task
from artifacts.evaluation.schema import About, ConditionResult, Example, JudgeFigures, QuestionInfo, Report, Settings
from artifacts.evaluation.statistics import Array, Interval, accuracy_interval, bootstrap, ratio
from artifacts.evaluation.subject import UNSTEERED, Likelihood, Subject
from artifacts.evaluation.summary import comparisons, dose_response, draws, figures, gaps
from artifacts.jobs.progress import progress

# Answers of these conditions are written out, for the judge and for people.
_WRITTEN = ("off", "on", "negated", "prompt")
_JUDGED = ("off", "on", "prompt")


@dataclass
class _Raw:
    """What a subject gave under one condition."""

    measurement: Measurement
    target: Answered
    retention: Answered | None
    neutral: list[Likelihood] | None


def evaluate(
    subject: Subject,
    questionnaire: Questionnaire,
    about: About,
    baselines: Baselines,
    settings: Settings,
    *,
    expert: Subject | None = None,
    judge: Judge | None = None,
    quiet: bool = False,
) -> Report:
    """Measure a vector and everything it has to be compared with, on the same questions.

    Args:
        subject: knows the vector as `about.name`, and the vectors of the baselines.
        questionnaire: questions and neutral texts.
        about: vector and strengths.
        baselines: controls and random directions; those missing are named in the report.
        settings: how to measure.
        expert: unsteered, answers the target questions as the ceiling of `gap_closed.expert`.
        judge: scores the answers without steering, with it and with the prompt.
        quiet: no progress bar.

    Raises:
        BuildError: a row does not suit the model, or the subject cannot answer.
        ValueError: fewer random directions than `MIN_RANDOM`.
    """
    plan = measurements(about, baselines, settings)
    examiner = Examiner(subject, settings)
    raw = [_measure(examiner, questionnaire, each) for each in progress(plan, "evaluate", quiet)]
    off = raw[0]
    judged = {} if judge is None else _judged(judge, questionnaire, raw, settings)
    conditions = tuple(_result(each, off, questionnaire, settings, judged) for each in raw)
    groups = _groups(questionnaire.target)
    ceilings = {} if expert is None else {"expert": _ceiling(expert, questionnaire, settings)}
    named = {each.name: each for each in conditions}
    summaries = draws(conditions, [each.draw_of for each in plan], groups, settings.seed)
    compared = comparisons(conditions, [each.draw_of for each in plan], groups, settings.seed)
    response = dose_response(conditions, about)
    closed = gaps(named, ceilings)
    return Report(
        about=about,
        settings=settings,
        questions=tuple(_infos(questionnaire)),
        tokens=tuple(each.num_tokens for each in off.neutral or ()),
        conditions=conditions,
        draws=summaries,
        comparisons=compared,
        dose_response=response,
        figures=figures(conditions, [each.draw_of for each in plan], summaries, compared, response) | closed,
        not_measured=not_measured(baselines, settings),
        examples=_examples(questionnaire, raw, settings),
    )


def _measure(examiner: Examiner, questionnaire: Questionnaire, measurement: Measurement) -> _Raw:
    kind, _, steering, prompt, draw_of = measurement
    target = examiner.answer(questionnaire.target, steering, prompt, texts=kind in _WRITTEN)
    # Draws of chance are many, and only their accuracy is compared.
    if draw_of is not None:
        return _Raw(measurement, target, None, None)
    retention = examiner.answer(questionnaire.retention, steering, prompt) if questionnaire.retention else None
    # A prompt before a text is part of no text, so its perplexity has no meaning.
    neutral = examiner.read(questionnaire.neutral, steering) if questionnaire.neutral and prompt is None else None
    return _Raw(measurement, target, retention, neutral)


def _result(
    raw: _Raw, off: _Raw, questionnaire: Questionnaire, settings: Settings, judged: Mapping[str, JudgeFigures]
) -> ConditionResult:
    seed = settings.seed
    accuracy = accuracy_interval(raw.target.correct, _groups(questionnaire.target), seed)
    kept, ratio_of_losses = None, None
    if raw.retention is not None and off.retention is not None and any(off.retention.correct):
        columns = np.array([raw.retention.correct, off.retention.correct], float).T
        kept = bootstrap(columns, _groups(questionnaire.retention), ratio, seed)
    if raw.neutral is not None and off.neutral is not None:
        ratio_of_losses = _perplexity_ratio(raw.neutral, off.neutral, _groups(questionnaire.neutral), seed)
    return ConditionResult(
        kind=raw.measurement.kind,
        name=raw.measurement.name,
        vector=raw.measurement.steering.name,
        strength=raw.measurement.steering.strength,
        correct=tuple(raw.target.correct),
        accuracy=accuracy,
        likelihood=raw.target.mean_likelihood,
        retained=None if raw.retention is None else tuple(raw.retention.correct),
        retention=kept,
        losses=None if raw.neutral is None else tuple(_loss(each) for each in raw.neutral),
        perplexity_ratio=ratio_of_losses,
        clas=None if kept is None else metrics.clas(accuracy.value, min(1.0, kept.value)),
        agreement=raw.target.agreement,
        judge=judged.get(raw.measurement.name),
    )


def _perplexity_ratio(
    steered: Sequence[Likelihood], unsteered: Sequence[Likelihood], groups: Sequence[str], seed: int
) -> Interval:
    value = metrics.perplexity_ratio(steered, unsteered)
    tokens = [each.num_tokens for each in steered]
    more = [_loss(on) - _loss(off) for on, off in zip(steered, unsteered, strict=True)]

    def figure(sums: Array) -> Array:
        found: Array = np.exp(np.minimum(ratio(sums), metrics.MAX_LOG_RATIO))
        return found

    return bootstrap(np.array([more, tokens], float).T, groups, figure, seed)._replace(value=value)


def _loss(likelihood: Likelihood) -> float:
    return -metrics.per_token(likelihood) * likelihood.num_tokens


def _judged(
    judge: Judge, questionnaire: Questionnaire, raw: Sequence[_Raw], settings: Settings
) -> dict[str, JudgeFigures]:
    found = {}
    questions = [_question(row) for row in questionnaire.target]
    groups = _groups(questionnaire.target)
    for each in raw:
        if each.measurement.kind in _JUDGED:
            scores = judge.score(questions, [text or "" for text in each.target.texts])
            usable = [(score, group) for score, group in zip(scores, groups, strict=True) if score is not None]
            columns = np.array([[metrics.axbench(*score), 1.0] for score, _ in usable])
            found[each.measurement.name] = JudgeFigures(
                scores=tuple(scores),
                failed=len(scores) - len(usable),
                overall=bootstrap(columns, [group for _, group in usable], ratio, settings.seed) if usable else None,
            )
    return found


def _ceiling(expert: Subject, questionnaire: Questionnaire, settings: Settings) -> float:
    correct = Examiner(expert, settings).answer(questionnaire.target, UNSTEERED).correct
    return sum(correct) / len(correct)


def _examples(questionnaire: Questionnaire, raw: Sequence[_Raw], settings: Settings) -> tuple[Example, ...]:
    """Questions spread evenly over the file, not chosen by their answers."""
    count = min(settings.num_examples, len(questionnaire.target))
    places = [index * len(questionnaire.target) // count for index in range(count)]
    return tuple(
        Example(
            question=_question(questionnaire.target[place]),
            expected=questionnaire.target[place].expected,
            answers={
                each.measurement.name: each.target.texts[place] or ""
                for each in raw
                if each.measurement.kind in _WRITTEN
            },
        )
        for place in places
    )


def _question(row: EvaluationRow) -> str:
    return "\n".join(f"{each.role}: {each.content}" for each in row.messages) if row.messages else row.text


def _infos(questionnaire: Questionnaire) -> Iterator[QuestionInfo]:
    tasks: tuple[Task, ...] = ("target", "retention", "neutral")
    for task in tasks:
        rows: Sequence[EvaluationRow] = getattr(questionnaire, task)
        for row in rows:
            yield QuestionInfo(where=row.where, task=task, kind=row.kind, group=row.group or row.where)


def _groups(rows: Sequence[EvaluationRow]) -> list[str]:
    return [row.group or row.where for row in rows]
