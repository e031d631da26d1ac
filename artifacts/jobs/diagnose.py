"""Step 7: how much the chosen direction depends on the rows that it was fitted on, and on wrong labels among them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from artifacts.jobs.build import Build
from artifacts.jobs.contrast import CHOOSE_SHARE
from artifacts.jobs.direction import ALIGNED, BY_NAME, DirectionFitter
from artifacts.jobs.estimate import Examples, estimate
from artifacts.jobs.progress import progress
from artifacts.jobs.tune import Choice, load_tuned
from artifacts.jobs.workdir import read_value, write_value
from artifacts.vectors.coordinates import rotated
from artifacts.vectors.stability import flip_sensitivity, stability

NAME = "diagnose"
RESULT = "result.json"
# Angles stay the same in principal coordinates, and a fit in these many is fast.
COMPONENTS = 256


@dataclass(frozen=True)
class Diagnosis:
    """Cosines of refits to the direction of one steered pair; empty figures where the estimator has no rows of its own.

    Attributes:
        key: name of the direction.
        mean, low: of bootstrap refits: mean and 5th percentile.
        halves: mean cosine between refits on two disjoint halves of the groups.
        flips: mean cosine after a share of the labels was flipped, by that share.
    """

    key: str
    mean: float
    low: float
    halves: float
    flips: dict[str, float]


def settings(build: Build) -> object:
    """What decides the diagnosis, apart from the tuned vectors."""
    return {"resamples": build.config.vectors.resamples, "seed": build.config.seed}


def run(build: Build) -> None:
    """Resample the contrast rows of every steered pair."""
    directory = build.directory(NAME)
    chosen = [each for each in load_tuned(build).chosen if BY_NAME[each.kind].method != "labeller"]
    found = tuple(_diagnose(build, each) for each in progress(chosen, "stability", build.quiet))
    write_value(directory / RESULT, tuple[Diagnosis, ...], found)


def load_diagnoses(build: Build) -> tuple[Diagnosis, ...]:
    """The result of the step."""
    return read_value(build.directory(NAME) / RESULT, tuple[Diagnosis, ...])


def _diagnose(build: Build, choice: Choice) -> Diagnosis:
    kind, config, fitter = BY_NAME[choice.kind], build.config, DirectionFitter(build)
    if kind.order == ALIGNED:
        states = fitter.mapped_states(choice.expert, choice.target)
    else:
        states = fitter.states(choice.expert)

    def fit(states: Tensor, labels: Tensor, groups: Tensor) -> Tensor:
        examples = _examples(labels, groups, config.seed)
        found: Mapping[str, Tensor] = estimate(
            kind.method, states, examples, config.vectors, config.seed, config.vectors.sign
        )
        return found[kind.part]

    known = fitter.examples.known
    inputs = rotated(states[known], COMPONENTS, config.seed).of(states[known]).float()
    rows = inputs, fitter.examples.labels[known], fitter.examples.groups[known]
    resampled = stability(fit, *rows, config.vectors.resamples, config.seed)
    flipped = flip_sensitivity(fit, *rows, config.vectors.resamples, config.seed)
    return Diagnosis(choice.key, *resampled, flips={f"{each.share:g}": each.cosine for each in flipped})


def _examples(labels: Tensor, groups: Tensor, seed: int) -> Examples:
    """Rows of some groups choose, as in the build's own split; all of them where those lack a class."""
    names = groups.unique()
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    chosen = torch.isin(groups, names[order[: max(1, round(CHOOSE_SHARE * len(names)))]])
    fit, choose = torch.nonzero(~chosen).flatten().tolist(), torch.nonzero(chosen).flatten().tolist()
    if any(len(labels[rows].unique()) < 2 for rows in (fit, choose)):
        fit = choose = list(range(len(labels)))
    return Examples(labels, groups, fit, choose)
