"""Strengths tried on the tuning split, in ascending order and no further than the budget allows."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from artifacts.jobs.build import Build
from artifacts.jobs.measure import Examination
from artifacts.pairing.held_out import Budget, Trial, best_trial, safe_trials

Rows = Mapping[int, Tensor]


def budget_of(build: Build) -> Budget:
    """What the configuration lets steering cost."""
    return Budget(build.config.tune.perplexity_budget, build.config.tune.retention_budget)


def try_strengths(
    examination: Examination, rows: Rows, strengths: Sequence[float], budget: Budget
) -> tuple[Trial, ...]:
    """Measure one set of rows at ascending strengths, up to the first that breaks the budget (which is measured)."""
    trials: list[Trial] = []
    for strength in sorted(strengths):
        trials.append(examination.trial(strength, rows))
        if not budget.keeps(trials[-1]):
            break
    return tuple(trials)


def try_few(build: Build, rows: Rows) -> tuple[Trial, ...]:
    """Measure a candidate at the strengths of the pairing, or at the smallest of all where they break the budget."""
    budget, few = budget_of(build), build.config.pairing.strengths
    trials = try_strengths(build.tuning, rows, few, budget)
    if budget.keeps(trials[0]) or build.config.tune.strengths[0] >= few[0]:
        return trials
    return try_strengths(build.tuning, rows, build.config.tune.strengths[:1], budget)


def best_rows(build: Build, candidates: Sequence[Rows]) -> tuple[Rows, Trial] | None:
    """The best candidate at its best strength, chosen as the bundle's own: all at a few strengths, the best at all.

    None when nothing keeps within the budgets.
    """
    objective = build.config.tune.objective
    tried = [(best, rows) for rows in candidates if (best := _best(build, try_few(build, rows))) is not None]
    if not tried:
        return None
    rows = max(tried, key=lambda each: each[0].score(objective))[1]
    best = _best(build, try_strengths(build.tuning, rows, build.config.tune.strengths, budget_of(build)))
    return None if best is None else (rows, best)


def _best(build: Build, trials: Sequence[Trial]) -> Trial | None:
    return best_trial(safe_trials(trials, budget_of(build)), build.config.tune.objective)
