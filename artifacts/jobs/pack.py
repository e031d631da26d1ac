"""Step 10: the bundle file, with the manifest filled from everything the steps measured."""

from torch import Tensor

from artifacts.bundle import write_bundle
from artifacts.jobs.align import aligner_of, decoder_of
from artifacts.jobs.build import Build
from artifacts.jobs.controls import load_controls
from artifacts.jobs.figures import back_map, evaluation_figures
from artifacts.jobs.matrix import layer_matrix
from artifacts.jobs.pair import load_information
from artifacts.jobs.tools import tool_versions
from artifacts.jobs.tune import Tuned, load_tuned, write_rows
from artifacts.jobs.vectors import Directions, load_directions
from artifacts.jobs.workdir import digest_of, file_digest
from artifacts.manifest import Intervention, LayerPair, Manifest, Scope

NAME = "pack"
BUNDLE = "bundle.safetensors"


def settings(build: Build) -> object:
    """What decides the bundle, apart from the figures."""
    config = build.config
    return {
        "texts": [config.name, config.description, config.licence],
        "models": [build.target_source.identity.model_dump(), build.expert_source.identity.model_dump()],
        "tools": tool_versions(),
    }


def run(build: Build) -> None:
    """Write the bundle into the work directory."""
    directory = build.directory(NAME)
    tuned = load_tuned(build)
    tensors = {f"runtime.{layer}.0.write": row for layer, row in write_rows(build, tuned).items()}
    tensors |= _aligner_tensors(build, tuned) | _rfm_tensors(load_directions(build), back_map(tuned))
    tensors |= {f"control.{name}": row for name, row in load_controls(build)[1].items()}
    tensors |= {f"pairing.information.{name}": matrix for name, matrix in load_information(build).items()}
    write_bundle(directory / BUNDLE, _manifest(build, tuned), tensors)


def _manifest(build: Build, tuned: Tuned) -> Manifest:
    config = build.config
    data = {name: file_digest(path) for name, path in build.data_files.items()}
    matrix = {(each["expert"], each["target"]): each for each in layer_matrix(build)}
    pairs = [(each.expert, each.target) for each in tuned.chosen]
    return Manifest(
        name=config.name,
        description=config.description,
        licence=config.licence,
        target=build.target_source.identity,
        expert=build.expert_source.identity,
        layer_pairs=tuple(
            LayerPair(
                expert=pair[0],
                target=pair[1],
                scores={name: value for name, value in matrix[pair].items() if isinstance(value, float)},
            )
            for pair in pairs
        ),
        interventions=tuple(
            Intervention(layer=each.target, kind="add", write=f"runtime.{each.target}.0.write") for each in tuned.chosen
        ),
        recommended_strength=tuned.recommended.strength,
        maximum_strength=tuned.maximum_strength,
        scope=Scope.ALL,
        data_digest=f"sha256:{digest_of(data)}",
        evaluation=evaluation_figures(build, tuned),
        tool_versions=tool_versions(),
        seed=config.seed,
    )


def _aligner_tensors(build: Build, tuned: Tuned) -> dict[str, Tensor]:
    """Encoder and decoder of the chosen pairs by expert layer; of two pairs with one expert layer, the better."""
    if build.config.align.method == "labeller":
        return {}
    tensors: dict[str, Tensor] = {}
    for choice in reversed(tuned.chosen):
        maps = {
            "encoder": aligner_of(build, choice.expert, choice.target),
            "decoder": decoder_of(build, choice.expert, choice.target),
        }
        for name, aligner in maps.items():
            tensors[f"aligner.{choice.expert}.{name}.weight"] = aligner.weight().float()
            tensors[f"aligner.{choice.expert}.{name}.bias"] = aligner.bias().float()
    return tensors


def _rfm_tensors(directions: Directions, way: str) -> dict[str, Tensor]:
    """Vector and eigenvalues of every expert layer whose RFM has a sign."""
    tensors = {}
    for name, tensor in directions.expert.items():
        kind, _, layer = name.rpartition(".")
        if kind == f"rfm-{way}":
            tensors[f"rfm.{layer}.vector"] = tensor
        elif kind == "rfm-eigenvalues":
            tensors[f"rfm.{layer}.eigenvalues"] = tensor
    return tensors
