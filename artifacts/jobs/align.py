"""Step 3: one aligner per (expert layer, target layer), measured on held-out pairs against permuted ones."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from artifacts.aligner.affine import AffineMap
from artifacts.aligner.axes import PrincipalAxes, principal_axes
from artifacts.aligner.fit import ALIGNERS, choose_regularisation, fit_aligner, fit_decoder
from artifacts.aligner.quality import alignment_quality
from artifacts.jobs.build import Build
from artifacts.jobs.capture import store
from artifacts.jobs.errors import BuildError
from artifacts.jobs.label import label_or_refuse
from artifacts.jobs.progress import progress
from artifacts.jobs.workdir import read_value, write_value

NAME = "align"
SCORES = "scores.json"


@dataclass(frozen=True)
class AlignScore:
    """Figures of one layer pair's way; only `accepted` ones are steered through.

    Attributes:
        expert, target: layer indices.
        accepted: whether it knows more than permuted pairs teach.
        hyperparameter: what the held-out pairs chose for the method.
        figures: `r2`, `r2_permuted_mean`, `r2_permuted_95` of a map, all on held-out pairs; `label_auc`,
            `label_p`, `confident_0`, `confident_1` of a labeller.
    """

    expert: int
    target: int
    accepted: bool
    hyperparameter: float
    figures: dict[str, float]


def settings(build: Build) -> object:
    """What decides the aligners, apart from the states."""
    return {"align": build.config.align.model_dump(), "seed": build.config.seed}


def run(build: Build) -> None:
    """Measure every aligner. Maps are not kept: they follow from the states in less time than they take to read.

    Raises:
        BuildError: no aligner is better than permuted pairs, or the expert cannot label.
    """
    directory = build.directory(NAME)
    if build.config.align.method == "labeller":
        scores = _score_labeller(build)
    else:
        layers = progress(build.expert_layers, "align expert layers", build.quiet)
        scores = [score for layer in layers for score in _score_layer(build, layer)]
    write_value(directory / SCORES, tuple[AlignScore, ...], tuple(scores))
    if not any(score.accepted for score in scores):
        best = max(scores, key=lambda score: score.figures["r2"])
        raise BuildError(
            f"no aligner is better than permuted pairs: the best, expert layer {best.expert} to target layer "
            f"{best.target}, has held-out R^2 {best.figures['r2']:.3f} against {best.figures['r2_permuted_95']:.3f} "
            "(95th percentile); give more or more varied mapping texts, or use align.method labeller"
        )


def align_scores(build: Build) -> list[AlignScore]:
    """Figures of every pair."""
    return list(read_value(build.directory(NAME) / SCORES, tuple[AlignScore, ...]))


def aligner_of(
    build: Build,
    expert: int,
    target: int,
    role: str = "expert",
    pairs: int | None = None,
    seed: int | None = None,
    axes: PrincipalAxes | None = None,
) -> AffineMap:
    """The map of a pair from the states of a role.

    Args:
        build: whose states are read.
        expert, target: layer indices.
        role: `expert` or `untrained`.
        pairs: seed of a permutation of the pairs; None leaves them.
        seed: of the aligner's initialisation; None takes the build's.
        axes: `known_axes` of that layer where they are at hand; they take longer than the map.
    """
    return _fit(build, fit_aligner, (role, expert), ("target", target), pairs, seed, axes)


def known_axes(build: Build, role: str, layer: int) -> PrincipalAxes:
    """Principal axes of a layer's states on the mapping rows that are not held out."""
    split, config = build.mapping_split, build.config
    states = store(build, role, "mapping").layer(layer)
    return principal_axes(states[sorted([*split.fit, *split.choose])], config.align.max_components, config.seed)


def decoder_of(build: Build, expert: int, target: int) -> AffineMap:
    """The map of a pair back to the expert's states: the method's own, or the same method fitted backwards."""
    if ALIGNERS[build.config.align.method].decoder is None:
        return _fit(build, fit_aligner, ("target", target), ("expert", expert))
    return _fit(build, fit_decoder, ("expert", expert), ("target", target))


def _fit(
    build: Build,
    fit: Callable[..., AffineMap],
    source: tuple[str, int],
    destination: tuple[str, int],
    pairs: int | None = None,
    seed: int | None = None,
    axes: PrincipalAxes | None = None,
) -> AffineMap:
    """Fit on all mapping rows that are not held out."""
    split, config = build.mapping_split, build.config
    inputs = store(build, source[0], "mapping").layer(source[1])
    outputs = store(build, destination[0], "mapping").layer(destination[1])
    if pairs is not None:
        outputs = outputs[torch.randperm(len(outputs), generator=torch.Generator().manual_seed(pairs))]
    # What the step chose holds for the same states; chance and the way back choose anew.
    scores = [] if (source[0], pairs) != ("expert", None) else align_scores(build)
    known_choice = [each.hyperparameter for each in scores if (each.expert, each.target) == (source[1], destination[1])]
    chosen = known_choice[0] if known_choice else _hyperparameter(build, inputs, outputs)
    known = sorted([*split.fit, *split.choose])
    axes = axes or known_axes(build, *source)
    seed = config.seed if seed is None else seed
    return fit(config.align.method, axes, outputs[known], chosen, seed, config.align.joint_weight)


def _hyperparameter(build: Build, inputs: Tensor, outputs: Tensor, axes: PrincipalAxes | None = None) -> float:
    """What held-out pairs choose, 0 for a method that has none."""
    split, config = build.mapping_split, build.config.align
    if not ALIGNERS[config.method].regularised:
        return 0.0
    return choose_regularisation(
        config.method,
        axes or principal_axes(inputs[split.fit], config.max_components, build.config.seed),
        outputs[split.fit],
        inputs[split.choose],
        outputs[split.choose],
        config.regularisation,
        config.joint_weight,
    )


def _score_layer(build: Build, expert: int) -> list[AlignScore]:
    """Measure the maps from one expert layer.

    The hyper-parameter is chosen on one part of the groups; the map is then fitted on that part too, and its R^2 is of
    a third part that neither saw.
    """
    config, seed, split = build.config.align, build.config.seed, build.mapping_split
    known = sorted([*split.fit, *split.choose])
    states = store(build, "expert", "mapping").layer(expert)
    first_axes = principal_axes(states[split.fit], config.max_components, seed)
    axes = known_axes(build, "expert", expert)
    scores = []
    for target in build.target_layers:
        paired = store(build, "target", "mapping").layer(target)
        chosen = _hyperparameter(build, states, paired, first_axes)
        quality = alignment_quality(
            fit_aligner(config.method, axes, paired[known], chosen, seed, config.joint_weight),
            config.method,
            axes,
            paired[known],
            states[split.held],
            paired[split.held],
            chosen,
            config.permutations,
            seed,
            config.joint_weight,
        )
        figures = {
            "r2": quality.r2,
            "r2_permuted_mean": quality.permuted_mean,
            "r2_permuted_95": quality.permuted_95,
        }
        # Who asks for a method that sees no pairs has decided to go without this check.
        scores.append(AlignScore(expert, target, quality.accepted or not quality.paired, chosen, figures))
    return scores


def _score_labeller(build: Build) -> list[AlignScore]:
    """One way for every target layer, from the expert layer whose probe labels best."""
    labelling = label_or_refuse(build)
    figures = {
        "label_auc": labelling.auc,
        "label_p": labelling.p_value,
        "confident_0": float(labelling.confident[0]),
        "confident_1": float(labelling.confident[1]),
    }
    return [AlignScore(labelling.layer, target, True, labelling.ridge, figures) for target in build.target_layers]
