"""Step 4: steering directions of the shortlisted pairs, by difference of means and by Recursive Feature Machines."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from artifacts.jobs.align import load_aligner
from artifacts.jobs.build import Build
from artifacts.jobs.capture import store
from artifacts.jobs.pair import shortlist
from artifacts.jobs.progress import progress
from artifacts.jobs.workdir import read_json, read_tensors, write_json, write_tensors
from artifacts.vectors.difference import difference_of_means, unit
from artifacts.vectors.rfm import RfmVectors, fit_rfm
from artifacts.vectors.score import SignError, area_under_curve

NAME = "vectors"
SCORES = "scores.json"
MAPPED = "mapped.safetensors"
EXPERT = "expert.safetensors"

DIFFMEAN = "diffmean"
# Directions that the RFM of a pair gives: fitted in the expert's space and mapped, or fitted on mapped states.
RFM_BACK_MAPS = ("covector", "displacement")
KINDS: Mapping[str, tuple[str, ...]] = {
    "diffmean": (DIFFMEAN,),
    "rfm": (*(f"rfm-{each}" for each in RFM_BACK_MAPS), *(f"rfm-aligned-{each}" for each in RFM_BACK_MAPS)),
}


@dataclass
class Directions:
    """What the step found.

    Attributes:
        expert: directions in the expert's space and RFM eigenvalues: `diffmean.{i}`, `rfm.{i}.covector|displacement|
            eigenvalues`.
        mapped: unit directions in the target's space by `{kind}.{i}.{j}`, and `own.{j}`, the target's own difference
            of means.
        auc: held-out area under the curve by the same names.
        refused: reason by name of what has no sign.
    """

    expert: dict[str, Tensor] = field(default_factory=dict)
    mapped: dict[str, Tensor] = field(default_factory=dict)
    auc: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def settings(build: Build) -> object:
    """What decides the directions, apart from pairs, aligners and states."""
    config = build.config
    return {
        "vectors": config.vectors.model_dump(exclude={"methods"}),
        "seed": config.seed,
        "shortlist": [config.pairing.shortlist, config.pairing.pairs],
    }


def run(build: Build) -> None:
    """Fit the directions: RFM on every expert layer, the mapped ones for the shortlisted pairs."""
    directory = build.directory(NAME)
    directory.mkdir(parents=True, exist_ok=True)
    fitting = _Fitting(build)
    for layer in progress(build.expert_layers, "vectors expert layers", build.quiet):
        fitting.expert_layer(layer)
    for pair in progress(shortlist(build), "vectors layer pairs", build.quiet):
        fitting.pair(pair.expert, pair.target)
    found = fitting.found
    write_tensors(directory / EXPERT, found.expert)
    write_tensors(directory / MAPPED, found.mapped)
    write_json(directory / SCORES, {"auc": found.auc, "refused": found.refused})


def load_directions(build: Build) -> Directions:
    """Everything that the step wrote."""
    directory = build.directory(NAME)
    scores = read_json(directory / SCORES)
    expert, mapped = read_tensors(directory / EXPERT), read_tensors(directory / MAPPED)
    return Directions(expert, mapped, scores["auc"], scores["refused"])


class _Fitting:
    """Directions of one build, collected layer by layer."""

    def __init__(self, build: Build) -> None:
        self._build = build
        self._split = build.contrast_split
        self._labels = self._split.labels
        self.found = Directions()

    def expert_layer(self, layer: int) -> None:
        """Fit both methods in the expert's space."""
        states = self._states("expert", layer)
        mean = difference_of_means(states[self._split.known], self._labels[self._split.known])
        self.found.expert[f"{DIFFMEAN}.{layer}"] = mean
        self._score(f"{DIFFMEAN}.{layer}", states, mean)
        vectors = self._rfm(f"rfm.{layer}", states)
        if vectors is None:
            return
        self.found.expert[f"rfm.{layer}.eigenvalues"] = vectors.eigenvalues
        for back_map in RFM_BACK_MAPS:
            name, direction = f"rfm.{layer}.{back_map}", getattr(vectors, back_map)
            self.found.expert[name] = direction
            self._score(name, states, direction)

    def pair(self, expert: int, target: int) -> None:
        """Map the expert's directions to a target layer, and fit the RFM on mapped states."""
        aligner = load_aligner(self._build, expert, target)
        mapped_states = aligner.states(self._states("expert", expert))
        sources = {DIFFMEAN: f"{DIFFMEAN}.{expert}"}
        sources |= {f"rfm-{each}": f"rfm.{expert}.{each}" for each in RFM_BACK_MAPS}
        for kind, source in sources.items():
            if source in self.found.expert:
                direction = unit(aligner.direction(self.found.expert[source]))
                self._keep(f"{kind}.{expert}.{target}", mapped_states, direction)
        vectors = self._rfm(f"rfm-aligned.{expert}.{target}", mapped_states)
        for back_map in RFM_BACK_MAPS if vectors is not None else ():
            self._keep(f"rfm-aligned-{back_map}.{expert}.{target}", mapped_states, getattr(vectors, back_map))
        if f"own.{target}" not in self.found.mapped:
            states = self._states("target", target)
            mean = difference_of_means(states[self._split.known], self._labels[self._split.known])
            self._keep(f"own.{target}", states, mean)

    def _states(self, role: str, layer: int) -> Tensor:
        return store(self._build, role, "contrast").layer(layer)

    def _keep(self, name: str, states: Tensor, direction: Tensor) -> None:
        self.found.mapped[name] = direction
        self._score(name, states, direction)

    def _score(self, name: str, states: Tensor, direction: Tensor) -> None:
        held = self._split.held
        self.found.auc[name] = area_under_curve(states[held].float() @ direction, self._labels[held])

    def _rfm(self, name: str, states: Tensor) -> RfmVectors | None:
        split, config = self._split, self._build.config
        try:
            return fit_rfm(
                states[split.fit],
                self._labels[split.fit],
                states[split.choose],
                self._labels[split.choose],
                config.vectors.components,
                config.vectors.iterations,
                config.seed,
                config.vectors.sign,
            )
        except SignError as error:
            self.found.refused[name] = str(error)
            return None
