"""Step 6: kind of vector and strength, by the objective on the tuning split within the budgets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from artifacts.jobs.build import Build
from artifacts.jobs.capture import layer_norms
from artifacts.jobs.direction import kinds
from artifacts.jobs.errors import BuildError
from artifacts.jobs.pair import shortlist
from artifacts.jobs.progress import progress
from artifacts.jobs.trials import budget_of, try_few, try_strengths
from artifacts.jobs.vectors import Directions, key, load_directions
from artifacts.jobs.workdir import read_value, write_value
from artifacts.pairing.held_out import Trial, best_trial, safe_trials

NAME = "tune"
RESULT = "result.json"


@dataclass(frozen=True)
class Choice:
    """One direction at one layer pair, with its trials."""

    kind: str
    expert: int
    target: int
    best: Trial
    trials: tuple[Trial, ...]

    @property
    def key(self) -> str:
        """Name of its direction."""
        return f"{self.kind}.{self.expert}.{self.target}"


@dataclass(frozen=True)
class Tuned:
    """What the bundle will do.

    Attributes:
        chosen: steered pairs, best first, each at its own target layer.
        recommended: trial of all chosen pairs together at the recommended strength.
        maximum_strength: largest strength up to which every trial kept within the budgets.
        unsteered: on the tuning split.
        candidates: everything that competed, best first.
        trials: of the chosen pairs together.
    """

    chosen: tuple[Choice, ...]
    recommended: Trial
    maximum_strength: float
    unsteered: Trial
    candidates: tuple[Choice, ...]
    trials: tuple[Trial, ...]


def settings(build: Build) -> object:
    """What decides the choice, apart from the directions."""
    config = build.config
    return {
        "tune": config.tune.model_dump(),
        "methods": [kind.name for kind in kinds(build)],
        "pairs": config.pairing.pairs,
        "coarse": config.pairing.strengths,
    }


def run(build: Build) -> None:
    """Try every candidate at a few strengths, the best at all, and choose.

    Raises:
        BuildError: nothing keeps within the budgets, or the gain is below the configured minimum.
    """
    directory = build.directory(NAME)
    config = build.config
    found = load_directions(build)
    candidates = _candidates(build, found)
    tuned = _choose(build, candidates, found.mapped)
    write_value(directory / RESULT, Tuned, tuned)
    objective = config.tune.objective
    gain = tuned.recommended.score(objective) - tuned.unsteered.score(objective)
    if gain < config.tune.minimum_gain:
        raise BuildError(
            f"the best vector {tuned.chosen[0].key} changes the objective ({objective}) on the tuning split by "
            f"{gain:+.3f}; tune.minimum_gain is {config.tune.minimum_gain:+.3f}: lower it, or give other data or layers"
        )


def load_tuned(build: Build) -> Tuned:
    """The result of the step."""
    return read_value(build.directory(NAME) / RESULT, Tuned)


def write_rows(build: Build, tuned: Tuned) -> dict[int, Tensor]:
    """What one unit of strength adds after each steered layer: unit direction times the layer's median norm."""
    directions, norms = load_directions(build).mapped, layer_norms(build)
    return {choice.target: directions[choice.key] * norms[choice.target] for choice in tuned.chosen}


def _candidates(build: Build, found: Directions) -> list[Choice]:
    """Everything within the budgets, best first. Finalists are measured at every strength, the others at a few."""
    config, budget = build.config, budget_of(build)
    names = [(kind, *pair) for pair in shortlist(build) for kind in kinds(build) if key(kind, *pair) in found.mapped]
    coarse: list[Choice | None] = []
    for kind, expert, target in progress(names, "tune vectors", build.quiet):
        trials = try_few(build, _rows(build, found, key(kind, expert, target), target))
        coarse.append(_choice(build, kind.name, expert, target, trials))
    ranked = _ranked(build, [each for each in coarse if each is not None])
    count = max(config.tune.finalists, config.pairing.pairs)
    finalists: list[Choice | None] = []
    for each in progress(ranked[:count], "tune finalists", build.quiet):
        trials = try_strengths(build.tuning, _rows(build, found, each.key, each.target), config.tune.strengths, budget)
        finalists.append(_choice(build, each.kind, each.expert, each.target, trials))
    return [*_ranked(build, [each for each in finalists if each is not None]), *ranked[count:]]


def _rows(build: Build, found: Directions, name: str, target: int) -> dict[int, Tensor]:
    return {target: found.mapped[name] * layer_norms(build)[target]}


def _choice(build: Build, kind: str, expert: int, target: int, trials: tuple[Trial, ...]) -> Choice | None:
    """None when nothing keeps within the budgets."""
    best = best_trial(safe_trials(trials, budget_of(build)), build.config.tune.objective)
    return None if best is None else Choice(kind, expert, target, best, trials)


def _ranked(build: Build, choices: Sequence[Choice]) -> list[Choice]:
    # Sorting is stable: equal results keep the order of the shortlist and of the kinds.
    objective = build.config.tune.objective
    return sorted(choices, key=lambda each: (-each.best.score(objective), each.best.perplexity_ratio))


def _choose(build: Build, candidates: Sequence[Choice], directions: Mapping[str, Tensor]) -> Tuned:
    config, norms, budget = build.config, layer_norms(build), budget_of(build)
    chosen: list[Choice] = []
    for candidate in candidates:
        if len(chosen) < config.pairing.pairs and candidate.target not in [each.target for each in chosen]:
            chosen.append(candidate)
    if 0 < len(chosen) < config.pairing.pairs:
        raise BuildError(
            f"pairing.pairs is {config.pairing.pairs} and the shortlist has usable directions for {len(chosen)} target "
            "layers only; raise pairing.shortlist or ask for fewer pairs"
        )
    trials: tuple[Trial, ...] = ()
    if len(chosen) == 1:
        trials = chosen[0].trials
    elif chosen:
        vectors = {each.target: directions[each.key] * norms[each.target] for each in chosen}
        trials = try_strengths(build.tuning, vectors, config.tune.strengths, budget)
    safe = safe_trials(trials, budget)
    best = best_trial(safe, config.tune.objective)
    if best is None:
        raise BuildError(
            f"no strength keeps within tune.perplexity_budget {budget.perplexity} and tune.retention_budget "
            f"{budget.retention}; the smallest tried is {config.tune.strengths[0]}: add smaller tune.strengths or "
            "raise the budgets"
        )
    return Tuned(tuple(chosen), best, safe[-1].strength, build.tuning.unsteered, tuple(candidates), trials)
