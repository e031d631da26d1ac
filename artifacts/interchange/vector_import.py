"""A bundle from vectors that somebody else made, for one target model.

**Strength.** Files of vectors carry no unit. Taken as they are, strength 1 adds exactly the file's vectors, as
llama.cpp does by default. Brought to the unit of our own bundles, every vector becomes its direction times the median
norm of the residual stream after its layer, and strength counts median norms.

**Defaults** are cautious, since no evidence about the vectors comes with them. Recommended: the strength of the file,
which is 1 as they are, and the median over the layers of |vector| / median norm in our unit. Maximum: the recommended
strength itself, so that nobody steers harder than the file says without having asked for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

from pydantic import JsonValue, ValidationError
from torch import Tensor

from artifacts.bundle import write_bundle
from artifacts.errors import quoted
from artifacts.interchange.vector_file import VectorFile
from artifacts.jobs.errors import BuildError
from artifacts.jobs.workdir import file_digest
from artifacts.manifest import Intervention, Manifest, ModelIdentity, Scope
from artifacts.rows import MAX_NORM, MIN_NORM

TOOLS = ("expertsteer", "gguf", "numpy", "safetensors", "torch", "transformers")
# More digits are noise.
_DIGITS = 6


@dataclass(frozen=True)
class ImportSettings:
    """What the file does not say.

    Attributes:
        name: of the bundle.
        description, licence: for its readers.
        recommended, maximum: strengths; None takes the defaults of this module.
        scope: which tokens are steered unless a request says otherwise; llama.cpp and repeng steer all.
    """

    name: str
    description: str = ""
    licence: str = ""
    recommended: float | None = None
    maximum: float | None = None
    scope: Scope = Scope.ALL


@dataclass(frozen=True)
class ResidualNorms:
    """Median norm of the target's residual stream after each layer, and the digest of the texts it was measured on."""

    medians: Mapping[int, float]
    texts_digest: str


def check_vectors(file: VectorFile, target: ModelIdentity) -> None:
    """Hold vectors against the model that they shall steer.

    Raises:
        BuildError: another hidden size or number of layers, NaN, infinity, or a norm that no bundle may have.
    """
    if file.num_rows is not None and file.num_rows != target.num_layers:
        raise BuildError(
            f"the file has {file.num_rows} rows and {target.id} has {target.num_layers} layers; "
            "name the model it was made for"
        )
    for layer, vector in file.vectors.items():
        if vector.numel() != target.hidden_size:
            raise BuildError(
                f"the vector of layer {layer} has shape {list(vector.shape)} and {target.id} has hidden size "
                f"{target.hidden_size}; name the model it was made for"
            )
        if not 0 <= layer < target.num_layers:
            raise BuildError(
                f"the file has a vector for layer {layer} and {target.id} has {target.num_layers} layers, 0 to "
                f"{target.num_layers - 1}; name the model it was made for, or choose layers with --layer"
            )
        num_bad = int((~vector.isfinite()).sum())
        if num_bad:
            raise BuildError(f"the vector of layer {layer} holds NaN or infinity in {num_bad} values; make it again")
        norm = float(vector.double().norm())
        if not MIN_NORM <= norm <= MAX_NORM:
            raise BuildError(
                f"the vector of layer {layer} has norm {norm:.3g}, outside [{MIN_NORM:g}, {MAX_NORM:g}]; "
                "rescale it, or choose other layers with --layer"
            )


def import_bundle(
    output: Path,
    source: Path,
    file: VectorFile,
    target: ModelIdentity,
    settings: ImportSettings,
    norms: ResidualNorms | None = None,
) -> str:
    """Write the bundle and return its digest.

    Args:
        output: where to write.
        source: the file of vectors, for its name and digest.
        file: what it holds, passed by `check_vectors`.
        target: the model.
        settings: see there.
        norms: of every layer in `file`: bring the vectors to median norms; None takes them as they are.

    Raises:
        BuildError: settings that no manifest may have.
        BundleError, OSError: it cannot be written.
    """
    rows = file.vectors if norms is None else _in_median_norms(file.vectors, norms)
    lengths = {layer: float(vector.double().norm()) for layer, vector in file.vectors.items()}
    strength = 1.0 if norms is None else median(lengths[layer] / norms.medians[layer] for layer in lengths)
    recommended = round(strength, _DIGITS) if settings.recommended is None else settings.recommended
    try:
        manifest = Manifest(
            name=settings.name,
            description=settings.description,
            licence=settings.licence,
            target=target,
            interventions=tuple(
                Intervention(layer=layer, kind="add", write=f"runtime.{layer}.0.write") for layer in rows
            ),
            recommended_strength=recommended,
            maximum_strength=settings.maximum if settings.maximum is not None else abs(recommended) or 1.0,
            scope=settings.scope,
            data_digest=f"sha256:{file_digest(source)}",
            evaluation={"source": _provenance(source, file, lengths, norms)},
            tool_versions={name: version(name) for name in TOOLS},
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        given = f" (it is {quoted(first['input'])})" if field else ""
        raise BuildError(f"the bundle is refused: {field or 'manifest'}: {first['msg']}{given}") from None
    return write_bundle(output, manifest, {f"runtime.{layer}.0.write": row for layer, row in rows.items()})


def _in_median_norms(vectors: Mapping[int, Tensor], norms: ResidualNorms) -> dict[int, Tensor]:
    """Unit direction times the layer's median norm; in fp64, rounded once."""
    return {
        layer: (vector.double() / vector.double().norm() * norms.medians[layer]).float()
        for layer, vector in vectors.items()
    }


def _provenance(
    source: Path, file: VectorFile, lengths: Mapping[int, float], norms: ResidualNorms | None
) -> dict[str, JsonValue]:
    """Where the vectors come from; nothing about how well they work is known."""
    facts: dict[str, JsonValue] = {
        # A file name may hold bytes that are no text.
        "file": source.name.encode("utf-8", "replace").decode(),
        "format": file.format,
        "unit": "as in the file" if norms is None else "median norms",
        "norms": {str(layer): round(length, _DIGITS) for layer, length in lengths.items()},
    }
    if file.model_hint:
        facts["model_hint"] = file.model_hint
    if norms is not None:
        facts["median_norms"] = {str(layer): round(norms.medians[layer], _DIGITS) for layer in lengths}
        facts["texts_digest"] = norms.texts_digest
    return facts
