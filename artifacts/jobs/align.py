"""Step 2: one ridge aligner per (expert layer, target layer), measured on held-out pairs against permuted ones."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from artifacts.aligner.affine import AffineMap
from artifacts.aligner.axes import principal_axes
from artifacts.aligner.quality import AlignmentQuality, alignment_quality
from artifacts.aligner.ridge import choose_regularisation, fit_ridge
from artifacts.jobs.build import Build
from artifacts.jobs.capture import store
from artifacts.jobs.data import GroupSplit
from artifacts.jobs.errors import BuildError
from artifacts.jobs.progress import progress
from artifacts.jobs.states import StateStore
from artifacts.jobs.workdir import read_tensors, read_value, write_tensors, write_value

NAME = "align"
SCORES = "scores.json"


@dataclass(frozen=True)
class AlignScore:
    """Figures of one aligner; `accepted` ones know more than permuted pairs teach."""

    expert: int
    target: int
    regularisation: float
    r2: float
    permuted_mean: float
    permuted_95: float
    accepted: bool


def settings(build: Build) -> object:
    """What decides the aligners, apart from the states."""
    return {"align": build.config.align.model_dump(), "seed": build.config.seed}


def run(build: Build) -> None:
    """Fit every aligner.

    Raises:
        BuildError: no aligner is better than permuted pairs.
    """
    directory = build.directory(NAME)
    directory.mkdir(parents=True, exist_ok=True)
    split = build.mapping_split
    inputs, outputs = store(build, "expert", "mapping"), store(build, "target", "mapping")
    scores: list[AlignScore] = []
    for expert in progress(build.expert_layers, "align expert layers", build.quiet):
        found = align_layer(build, inputs, outputs, expert, build.target_layers, split)
        tensors: dict[str, Tensor] = {}
        for target, (aligner, score) in found.items():
            tensors |= {
                "basis": aligner.basis.float(),
                "input_mean": aligner.input_mean.float(),
                f"coefficients.{target}": aligner.coefficients.float(),
                f"output_mean.{target}": aligner.output_mean.float(),
            }
            scores.append(score)
        write_tensors(_encoder_path(directory, expert), tensors)
    write_value(directory / SCORES, tuple[AlignScore, ...], tuple(scores))
    if not any(score.accepted for score in scores):
        best = max(scores, key=lambda score: score.r2)
        raise BuildError(
            f"no aligner is better than permuted pairs: the best, expert layer {best.expert} to target layer "
            f"{best.target}, has held-out R^2 {best.r2:.3f} against {best.permuted_95:.3f} (95th percentile); "
            "give more or more varied mapping texts"
        )


def align_layer(
    build: Build, inputs: StateStore, outputs: StateStore, layer: int, targets: tuple[int, ...], split: GroupSplit
) -> dict[int, tuple[AffineMap, AlignScore]]:
    """Fit and measure the aligners from one layer of `inputs` to each layer of `outputs` in `targets`.

    The regularisation is chosen on one part of the groups; the aligner is then fitted on that part too, and its R^2 is
    of a third part that neither saw.
    """
    config, seed = build.config.align, build.config.seed
    known = sorted([*split.fit, *split.choose])
    states = inputs.layer(layer)
    first_axes = principal_axes(states[split.fit], config.max_components, seed)
    axes = principal_axes(states[known], config.max_components, seed)
    found = {}
    for target in targets:
        paired = outputs.layer(target)
        regularisation = choose_regularisation(
            first_axes, paired[split.fit], states[split.choose], paired[split.choose], config.regularisation
        )
        aligner = fit_ridge(axes, paired[known], regularisation)
        quality: AlignmentQuality = alignment_quality(
            aligner,
            axes,
            paired[known],
            states[split.held],
            paired[split.held],
            regularisation,
            config.permutations,
            seed,
        )
        score = AlignScore(layer, target, regularisation, *quality, accepted=quality.accepted)
        found[target] = aligner, score
    return found


def reverse_aligner(build: Build, expert: int, target: int) -> AffineMap:
    """The decoder of a pair: the ridge map from the target's states back to the expert's, fitted in the same way."""
    split = build.mapping_split
    inputs, outputs = store(build, "target", "mapping"), store(build, "expert", "mapping")
    return align_layer(build, inputs, outputs, target, (expert,), split)[expert][0]


def load_aligner(build: Build, expert: int, target: int) -> AffineMap:
    """The aligner of a pair, float32."""
    tensors = read_tensors(_encoder_path(build.directory(NAME), expert))
    return AffineMap(
        tensors["input_mean"], tensors[f"output_mean.{target}"], tensors["basis"], tensors[f"coefficients.{target}"]
    )


def align_scores(build: Build) -> list[AlignScore]:
    """Figures of every aligner."""
    return list(read_value(build.directory(NAME) / SCORES, tuple[AlignScore, ...]))


def _encoder_path(directory: Path, expert: int) -> Path:
    return directory / f"encoder-{expert}.safetensors"
