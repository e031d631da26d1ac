"""Step 2: does the expert know the concept at all? Held-out probes of every layer, and labels that they doubt."""

from dataclasses import dataclass

from torch import Tensor

from artifacts.jobs.build import Build
from artifacts.jobs.capture import store
from artifacts.jobs.errors import BuildError
from artifacts.jobs.estimate import CLASSIFIER_COMPONENTS
from artifacts.jobs.progress import progress
from artifacts.jobs.workdir import read_value, write_value
from artifacts.vectors.logistic import fit_logistic
from artifacts.vectors.refusal import NoSignalError, area_interval, require_signal
from artifacts.vectors.suspects import suspected_labels

NAME = "probe"
RESULT = "result.json"


@dataclass(frozen=True)
class LayerProbe:
    """Area under the curve of a logistic probe on held-out rows of one layer; the intervals hold at 95 % together."""

    layer: int
    auc: float
    low: float
    high: float


@dataclass(frozen=True)
class Suspect:
    """A contrast row whose given label is doubted, with the out-of-fold probability of that label."""

    line: int
    label: int
    probability: float


@dataclass(frozen=True)
class Probed:
    """What the expert knows, layer by layer, and the suspected labels by the best layer, most doubtful first."""

    layers: tuple[LayerProbe, ...]
    suspects: tuple[Suspect, ...]


def settings(build: Build) -> object:
    """What decides the probes, apart from the states."""
    return {"seed": build.config.seed, "sign": build.config.vectors.sign}


def run(build: Build) -> None:
    """Probe the expert.

    Raises:
        BuildError: no layer's probe is better than chance.
    """
    directory = build.directory(NAME)
    # The best of several layers is lucky; Bonferroni's share of the error for each keeps their chance at 5 % together.
    confidence = 1 - 0.05 / len(build.expert_layers)
    labels = build.contrast_split.labels[build.contrast_split.held]
    layers = progress(build.expert_layers, "probe the expert", build.quiet)
    scores = {layer: _held_scores(build, layer) for layer in layers}
    probes = tuple(LayerProbe(layer, *area_interval(each, labels, confidence)) for layer, each in scores.items())
    best = max(probes, key=lambda each: each.low).layer
    # A concept without sign is not linear, so a linear probe says nothing about it; the user who gives the sign knows.
    if build.config.vectors.sign is None:
        try:
            require_signal(scores[best], labels, f"expert layer {best}, the best", confidence)
        except NoSignalError as error:
            raise BuildError(
                f"the expert shows no sign of the concept: {error} (vectors.sign for a concept that is not linear)"
            ) from error
    write_value(directory / RESULT, Probed, Probed(probes, _suspects(build, best)))


def load_probed(build: Build) -> Probed:
    """The result of the step."""
    return read_value(build.directory(NAME) / RESULT, Probed)


def _held_scores(build: Build, layer: int) -> Tensor:
    """Log-odds of label 1 that a logistic probe of one layer gives the held-out rows, [num_held]."""
    split, states = build.contrast_split, store(build, "expert", "contrast").layer(layer)
    labels = split.labels
    fitted = fit_logistic(
        states[split.fit],
        labels[split.fit],
        states[split.choose],
        labels[split.choose],
        CLASSIFIER_COMPONENTS,
        build.config.seed,
        # The probe's own sign is its classifier's; a missing one shows as an area around one half.
        sign=1,
    )
    return fitted.probe.log_odds(states[split.held])


def _suspects(build: Build, layer: int) -> tuple[Suspect, ...]:
    states = store(build, "expert", "contrast").layer(layer)
    labels = build.contrast_split.labels
    found = suspected_labels(states, labels, build.contrast_groups, CLASSIFIER_COMPONENTS, build.config.seed)
    return tuple(
        Suspect(build.contrast[row].line, int(labels[row]), probability)
        for row, probability in zip(found.rows.tolist(), found.probability.tolist(), strict=True)
    )
