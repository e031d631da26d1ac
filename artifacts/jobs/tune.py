"""Step 5: kind of vector and strength, by greedy accuracy on the tuning split within the perplexity budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from artifacts.jobs.build import Build
from artifacts.jobs.capture import layer_norms
from artifacts.jobs.errors import BuildError
from artifacts.jobs.measure import Examination
from artifacts.jobs.pair import shortlist
from artifacts.jobs.progress import progress
from artifacts.jobs.vectors import KINDS, load_directions
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
        maximum_strength: largest strength up to which every trial kept within the perplexity budget.
        unsteered_accuracy: on the tuning split.
        candidates: everything that competed, best first.
        trials: of the chosen pairs together.
    """

    chosen: tuple[Choice, ...]
    recommended: Trial
    maximum_strength: float
    unsteered_accuracy: float
    candidates: tuple[Choice, ...]
    trials: tuple[Trial, ...]


def settings(build: Build) -> object:
    """What decides the choice, apart from the directions."""
    config = build.config
    return {
        "tune": config.tune.model_dump(),
        "methods": config.vectors.methods,
        "pairs": config.pairing.pairs,
    }


def run(build: Build) -> None:
    """Try every candidate at every strength and choose.

    Raises:
        BuildError: no direction has a sign, nothing keeps within the budget, or the gain is below the configured
            minimum.
    """
    directory = build.directory(NAME)
    directory.mkdir(parents=True, exist_ok=True)
    config, norms, tuning = build.config, layer_norms(build), build.tuning
    found = load_directions(build)
    directions = found.mapped
    kinds = [kind for method in config.vectors.methods for kind in KINDS[method]]
    names = [(kind, pair.expert, pair.target) for pair in shortlist(build) for kind in kinds]
    available = [name for name in names if _key(*name) in directions]
    if not available:
        raise BuildError(f"none of vectors.methods {list(config.vectors.methods)} gave a direction: {found.refused}")
    candidates = []
    for kind, expert, target in progress(available, "tune vectors", build.quiet):
        vectors = {target: directions[_key(kind, expert, target)] * norms[target]}
        trials = try_strengths(tuning, vectors, config.tune.strengths)
        best = best_trial(safe_trials(trials, config.tune.perplexity_budget))
        if best is not None:
            candidates.append(Choice(kind, expert, target, best, trials))
    tuned = _choose(build, candidates, directions, norms)
    write_value(directory / RESULT, Tuned, tuned)
    gain = tuned.recommended.accuracy - tuned.unsteered_accuracy
    if gain < config.tune.minimum_gain:
        raise BuildError(
            f"the best vector {tuned.chosen[0].key} changes the accuracy on the tuning split by {gain:+.3f}; "
            f"tune.minimum_gain is {config.tune.minimum_gain:+.3f}: lower it, or give other data or layers"
        )


def try_strengths(
    examination: Examination, vectors: Mapping[int, Tensor], strengths: Sequence[float]
) -> tuple[Trial, ...]:
    """Measure one set of vectors at each strength."""
    return tuple(examination.trial(strength, vectors) for strength in strengths)


def load_tuned(build: Build) -> Tuned:
    """The result of the step."""
    return read_value(build.directory(NAME) / RESULT, Tuned)


def write_rows(build: Build, tuned: Tuned) -> dict[int, Tensor]:
    """What one unit of strength adds after each steered layer: unit direction times the layer's median norm."""
    directions, norms = load_directions(build).mapped, layer_norms(build)
    return {choice.target: directions[choice.key] * norms[choice.target] for choice in tuned.chosen}


def _choose(
    build: Build, candidates: list[Choice], directions: Mapping[str, Tensor], norms: Mapping[int, float]
) -> Tuned:
    config, tuning = build.config, build.tuning
    budget = config.tune.perplexity_budget
    # Sorting is stable: equal results keep the order of the shortlist and of the configured methods.
    ranked = sorted(candidates, key=lambda each: (-each.best.accuracy, each.best.perplexity_ratio))
    chosen: list[Choice] = []
    for candidate in ranked:
        if len(chosen) < config.pairing.pairs and candidate.target not in [each.target for each in chosen]:
            chosen.append(candidate)
    trials: tuple[Trial, ...] = ()
    if len(chosen) == 1:
        trials = chosen[0].trials
    elif chosen:
        vectors = {each.target: directions[each.key] * norms[each.target] for each in chosen}
        trials = try_strengths(tuning, vectors, config.tune.strengths)
    safe = safe_trials(trials, budget)
    best = best_trial(safe)
    if best is None:
        raise BuildError(
            f"no strength keeps the perplexity ratio under tune.perplexity_budget {budget}; the smallest tried is "
            f"{config.tune.strengths[0]}: add smaller tune.strengths or raise the budget"
        )
    maximum = safe[-1].strength
    return Tuned(tuple(chosen), best, maximum, tuning.unsteered_accuracy, tuple(ranked), trials)


def _key(kind: str, expert: int, target: int) -> str:
    return f"{kind}.{expert}.{target}"
