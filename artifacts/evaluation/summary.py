"""What the conditions of an evaluation say together: chance, comparisons, dose-response, figures by name."""

from collections.abc import Mapping, Sequence

import numpy as np

from artifacts.evaluation import metrics
from artifacts.evaluation.schema import About, Comparison, ConditionResult, DoseResponse, Draws
from artifacts.evaluation.statistics import (
    difference_interval,
    draws_interval,
    holm,
    mcnemar,
    rank_p_value,
)

DrawOf = Sequence[str | None]
_COMPARED = ("off", "prompt", "control")


def draws(
    conditions: Sequence[ConditionResult], draw_of: DrawOf, groups: Sequence[str], seed: int
) -> tuple[Draws, ...]:
    """Each kind of chance, summarised over its draws."""
    on = _named(conditions, "on")
    found = []
    for name in dict.fromkeys(each for each in draw_of if each is not None):
        drawn = [each for each, owner in zip(conditions, draw_of, strict=True) if owner == name]
        correct = np.array([each.correct for each in drawn], float)
        accuracies = [each.accuracy.value for each in drawn]
        found.append(
            Draws(
                name=name,
                count=len(drawn),
                mean=draws_interval(correct, groups, seed),
                minimum=min(accuracies),
                maximum=max(accuracies),
                difference=draws_interval(correct, groups, seed, against=on.correct),
                p_value=rank_p_value(on.accuracy.value, accuracies),
            )
        )
    return tuple(found)


def comparisons(
    conditions: Sequence[ConditionResult], draw_of: DrawOf, groups: Sequence[str], seed: int
) -> tuple[Comparison, ...]:
    """`on` against unsteered, prompt and every control that is no draw of chance."""
    on = _named(conditions, "on")
    others = [each for each, owner in zip(conditions, draw_of, strict=True) if each.kind in _COMPARED and owner is None]
    tests = [mcnemar(on.correct, other.correct) for other in others]
    adjusted = holm([test.p_value for test in tests])
    return tuple(
        Comparison(
            against=other.name,
            difference=difference_interval(on.correct, other.correct, groups, seed),
            on_only=test.first_only,
            other_only=test.second_only,
            p_value=test.p_value,
            p_holm=p_holm,
        )
        for other, test, p_holm in zip(others, tests, adjusted, strict=True)
    )


def dose_response(conditions: Sequence[ConditionResult], about: About) -> DoseResponse:
    """Strengths of the vector in order; the correlation is of those from 0 towards the maximum."""
    sign = -1.0 if about.recommended < 0 else 1.0
    of_vector = [each for each in conditions if each.kind in ("off", "on", "dose")]
    if any(each.kind == "dose" and sign * each.strength < 0 for each in conditions):
        of_vector.append(_named(conditions, "negated"))
    of_vector.sort(key=lambda each: each.strength)
    upwards = [each for each in of_vector if sign * each.strength >= 0]
    found = metrics.dose_response([sign * each.strength for each in upwards], [each.accuracy.value for each in upwards])
    return DoseResponse(
        conditions=tuple(each.name for each in of_vector),
        rho=None if found is None else found.rho,
        p_value=None if found is None else found.p_value,
    )


def gaps(named: Mapping[str, ConditionResult], ceilings: Mapping[str, float]) -> dict[str, float]:
    """Accuracies of the ceilings, and the share of each gap that the vector closes; no gap, no share."""
    known = dict(ceilings)
    if "prompt" in named:
        known["prompt"] = named["prompt"].accuracy.value
    on, off = named["on"].accuracy.value, named["off"].accuracy.value
    shares = {name: metrics.gap_closed(on, off, ceiling) for name, ceiling in known.items()}
    return {**ceilings, **{f"gap_closed.{name}": share for name, share in shares.items() if share is not None}}


def figures(
    conditions: Sequence[ConditionResult],
    draw_of: DrawOf,
    summaries: Sequence[Draws],
    compared: Sequence[Comparison],
    response: DoseResponse,
) -> dict[str, float]:
    """Every figure by the name that gates use; those of `on` also without the `on.`."""
    found: dict[str, float | None] = {}
    for each, owner in zip(conditions, draw_of, strict=True):
        if each.kind != "dose" and owner is None:
            found |= _condition_figures(each)
    found |= {name.removeprefix("on."): value for name, value in found.items() if name.startswith("on.")}
    for draw in summaries:
        found |= {f"{draw.name}.mean": draw.mean.value, f"{draw.name}.max": draw.maximum}
        found |= {f"{draw.name}.min": draw.minimum, f"p.{draw.name}": draw.p_value}
    found |= {f"p.{each.against}": each.p_holm for each in compared}
    found["spearman"] = response.rho
    return {name: value for name, value in found.items() if value is not None}


def _condition_figures(each: ConditionResult) -> dict[str, float | None]:
    name = each.name
    return {
        name: each.accuracy.value,
        f"{name}.low": each.accuracy.low,
        f"{name}.high": each.accuracy.high,
        f"{name}.perplexity_ratio": None if each.perplexity_ratio is None else each.perplexity_ratio.value,
        f"{name}.retention": None if each.retention is None else each.retention.value,
        f"{name}.clas": each.clas,
        f"{name}.axbench": None if each.judge is None or each.judge.overall is None else each.judge.overall.value,
        f"{name}.likelihood": each.likelihood,
    }


def _named(conditions: Sequence[ConditionResult], name: str) -> ConditionResult:
    return next(each for each in conditions if each.name == name)
