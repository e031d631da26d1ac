"""Step 6: the test split, once, with the controls that a steering figure is worth nothing without."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from artifacts.jobs.build import Build
from artifacts.jobs.capture import layer_norms
from artifacts.jobs.data import Question, shared_contents
from artifacts.jobs.measure import UNSTEERED
from artifacts.jobs.progress import progress
from artifacts.jobs.tune import Tuned, load_tuned, try_strengths, write_rows
from artifacts.jobs.untrained import untrained_direction
from artifacts.jobs.vectors import load_directions
from artifacts.jobs.workdir import file_digest, read_value, write_value
from artifacts.pairing.held_out import Trial, best_trial, safe_trials
from artifacts.vectors.difference import unit

NAME = "evaluate"
RESULT = "result.json"


@dataclass(frozen=True)
class Spread:
    """Accuracy of several draws."""

    count: int
    mean: float
    maximum: float


@dataclass(frozen=True)
class Overlap:
    """Distinct texts that two data files share, and groups that two splits share. All zero is best."""

    mapping_and_contrast: int
    tune_and_test: int
    tune_and_test_groups: int
    fit_and_test_groups: int

    @property
    def splits_disjoint(self) -> bool:
        """Whether fit, tuning and test splits share neither texts nor groups."""
        return not (self.tune_and_test or self.tune_and_test_groups or self.fit_and_test_groups)


@dataclass(frozen=True)
class Evaluation:
    """Figures of the test split. Accuracy is the share of exact greedy answers.

    Attributes:
        num_questions: of the test split.
        off, on, negated: unsteered, at the recommended strength and at minus that.
        random: directions of the same norm at the same layers.
        own: the target's own difference of means, its strength tuned in the same way; None when no strength of it
            kept within the budget.
        untrained: the same pipeline with an untrained expert; None when not asked for or nothing kept within
            the budget.
        overlap: whether the splits are disjoint.
    """

    num_questions: int
    off: float
    on: Trial
    negated: Trial
    random: Spread
    own: Trial | None
    untrained: Trial | None
    overlap: Overlap


def settings(build: Build) -> object:
    """What decides the figures, apart from the tuned vectors."""
    return {
        "evaluate": build.config.evaluate.model_dump(),
        "seed": build.config.seed,
        "test": file_digest(build.data_path("test")),
    }


def run(build: Build) -> None:
    """Measure the tuned vectors and their controls."""
    directory = build.directory(NAME)
    directory.mkdir(parents=True, exist_ok=True)
    tuned, testing = load_tuned(build), build.testing
    rows, strength = write_rows(build, tuned), tuned.recommended.strength
    result = Evaluation(
        num_questions=testing.num_questions,
        off=testing.accuracy(UNSTEERED),
        on=testing.trial(strength, rows),
        negated=testing.trial(-strength, rows),
        random=_random_directions(build, rows, strength),
        own=_own(build, tuned),
        untrained=_untrained(build, tuned) if build.config.evaluate.controls else None,
        overlap=_overlap(build),
    )
    write_value(directory / RESULT, Evaluation, result)


def load_evaluation(build: Build) -> Evaluation:
    """The result of the step."""
    return read_value(build.directory(NAME) / RESULT, Evaluation)


def _random_directions(build: Build, rows: Mapping[int, Tensor], strength: float) -> Spread:
    generator = torch.Generator().manual_seed(build.config.seed)
    accuracies = []
    for _ in progress(range(build.config.evaluate.random_directions), "random directions", build.quiet):
        drawn = {
            layer: strength * row.norm() * unit(torch.randn(row.shape, generator=generator))
            for layer, row in rows.items()
        }
        accuracies.append(build.testing.accuracy(drawn))
    return Spread(len(accuracies), sum(accuracies) / len(accuracies), max(accuracies))


def _own(build: Build, tuned: Tuned) -> Trial | None:
    """The target's own difference of means at the same layers: what could be had without an expert."""
    directions, norms = load_directions(build).mapped, layer_norms(build)
    rows = {each.target: directions[f"own.{each.target}"] * norms[each.target] for each in tuned.chosen}
    return _tune_and_test(build, rows)


def _untrained(build: Build, tuned: Tuned) -> Trial | None:
    """The whole way with an untrained expert: what the mapping texts alone give."""
    norms = layer_norms(build)
    target = tuned.chosen[0].target
    results = []
    for direction in untrained_direction(build, target):
        rows = {target: direction * norms[target]}
        best = _tune(build, rows)
        if best is not None:
            results.append((best, rows))
    if not results:
        return None
    best, rows = max(results, key=lambda each: each[0].accuracy)
    return build.testing.trial(best.strength, rows)


def _tune(build: Build, rows: Mapping[int, Tensor]) -> Trial | None:
    trials = try_strengths(build.tuning, rows, build.config.tune.strengths)
    return best_trial(safe_trials(trials, build.config.tune.perplexity_budget))


def _tune_and_test(build: Build, rows: Mapping[int, Tensor]) -> Trial | None:
    best = _tune(build, rows)
    return None if best is None else build.testing.trial(best.strength, rows)


def _overlap(build: Build) -> Overlap:
    tune, test = build.rows("tune", Question), build.rows("test", Question)
    groups = {name: {row.group for row in rows} - {None} for name, rows in (("tune", tune), ("test", test))}
    fitted = {row.group for row in [*build.contrast, *build.mapping]}
    return Overlap(
        mapping_and_contrast=shared_contents(build.mapping, build.contrast),
        tune_and_test=shared_contents(tune, test),
        tune_and_test_groups=len(groups["tune"] & groups["test"]),
        fit_and_test_groups=len(fitted & groups["test"]),
    )
