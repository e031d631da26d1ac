"""Step 5: steering directions of the shortlisted pairs by every competing method."""

from dataclasses import dataclass, field

from torch import Tensor

from artifacts.jobs.build import Build
from artifacts.jobs.capture import store
from artifacts.jobs.direction import KINDS, MAPPED, RFM_PARTS, DirectionFitter, Kind, kinds
from artifacts.jobs.errors import BuildError
from artifacts.jobs.pair import shortlist
from artifacts.jobs.progress import progress
from artifacts.jobs.workdir import read_json, read_tensors, write_json, write_tensors
from artifacts.vectors.score import SignError, area_under_curve

NAME = "vectors"
SCORES = "scores.json"
MAPPED_FILE = "mapped.safetensors"
EXPERT_FILE = "expert.safetensors"


@dataclass
class Directions:
    """What the step found.

    Attributes:
        expert: directions in the expert's space and RFM eigenvalues: `{method}[-{part}].{i}`, `rfm-eigenvalues.{i}`.
        mapped: unit directions in the target's space by `{kind}.{i}.{j}`, and `own.{j}`, the target's own difference
            of means.
        auc: held-out area under the curve by the same names.
        refused: reason by name of what has no sign.
    """

    expert: dict[str, Tensor] = field(default_factory=dict)
    mapped: dict[str, Tensor] = field(default_factory=dict)
    auc: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def key(kind: Kind, expert: int, target: int) -> str:
    """Name of a direction."""
    return f"{kind.name}.{expert}.{target}"


def settings(build: Build) -> object:
    """What decides the directions, apart from pairs, aligners and states."""
    config = build.config
    return {"vectors": config.vectors.model_dump(exclude={"resamples"}), "seed": config.seed}


def run(build: Build) -> None:
    """Fit the directions: every method in the expert's space on its layers, the mapped ones for the shortlist.

    Raises:
        BuildError: no direction has a sign.
    """
    directory = build.directory(NAME)
    found = Directions()
    fitter = DirectionFitter(build)
    for layer in progress(build.expert_layers, "vectors expert layers", build.quiet):
        _fit_expert_layer(build, fitter, layer, found)
    for expert, target in progress(shortlist(build), "vectors layer pairs", build.quiet):
        _fit_pair(build, fitter, expert, target, found)
    if all(name.startswith("own.") for name in found.mapped):
        name, reason = next(iter(found.refused.items()))
        raise BuildError(f"none of {len(found.refused)} directions has a sign; the first, {name}: {reason}")
    write_tensors(directory / EXPERT_FILE, found.expert)
    write_tensors(directory / MAPPED_FILE, found.mapped)
    write_json(directory / SCORES, {"auc": found.auc, "refused": found.refused})


def load_directions(build: Build) -> Directions:
    """Everything that the step wrote."""
    directory = build.directory(NAME)
    scores = read_json(directory / SCORES)
    expert, mapped = read_tensors(directory / EXPERT_FILE), read_tensors(directory / MAPPED_FILE)
    return Directions(expert, mapped, scores["auc"], scores["refused"])


def _fit_expert_layer(build: Build, fitter: DirectionFitter, layer: int, found: Directions) -> None:
    """All methods in the expert's own space: what the expert knows, whatever becomes of it in the target."""
    states = fitter.states(layer)
    for method, parts in _expert_methods().items():
        try:
            fitted = fitter.fitted(method, layer)
        except SignError as error:
            found.refused[f"{method}.{layer}"] = str(error)
            continue
        for part in parts:
            name = f"{'-'.join(filter(None, (method, part)))}.{layer}"
            found.expert[name] = fitted[part]
            found.auc[name] = _held_out_auc(build, states, fitted[part])
        if method == "rfm":
            found.expert[f"rfm-eigenvalues.{layer}"] = fitted["eigenvalues"]


def _fit_pair(build: Build, fitter: DirectionFitter, expert: int, target: int, found: Directions) -> None:
    own_states = store(build, "target", "contrast").layer(target)
    for kind in kinds(build):
        name = key(kind, expert, target)
        try:
            found.mapped[name] = fitter.direction(kind, expert, target)
        except SignError as error:
            found.refused[name] = str(error)
            continue
        states = own_states if kind.method == "labeller" else fitter.mapped_states(expert, target)
        found.auc[name] = _held_out_auc(build, states, found.mapped[name])
    own = f"own.{target}"
    if own not in found.mapped:
        found.mapped[own] = fitter.own(target)
        found.auc[own] = _held_out_auc(build, own_states, found.mapped[own])


def _expert_methods() -> dict[str, tuple[str, ...]]:
    methods = {kind.method: ("",) for kind in KINDS if kind.order in (None, MAPPED)}
    return methods | {"rfm": RFM_PARTS}


def _held_out_auc(build: Build, states: Tensor, direction: Tensor) -> float:
    held = build.contrast_split.held
    return area_under_curve(states[held].float() @ direction, build.contrast_split.labels[held])
