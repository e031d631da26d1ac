"""What a bundle says about itself."""

import json
from collections import Counter
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from artifacts import strict_json
from artifacts.errors import BundleError, BundleErrorCode, quoted

FORMAT = "expertsteer-bundle"
SCHEMA = 1
MAX_HIDDEN_SIZE = 2**20
MAX_NUM_LAYERS = 4096
MAX_STRENGTH = 1e4
# Pydantic error types and fields that have a code of their own; all others are BAD_MANIFEST.
_CODE_OF_TYPE = {
    "layer_out_of_range": BundleErrorCode.LAYER_OUT_OF_RANGE,
    "duplicate_tensor": BundleErrorCode.DUPLICATE_TENSOR,
}
_CODE_OF_FIELD = {"kind": BundleErrorCode.UNKNOWN_KIND, "layer": BundleErrorCode.LAYER_OUT_OF_RANGE}

Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
NonEmpty = Annotated[str, StringConstraints(min_length=1)]


class Scope(StrEnum):
    """Which of a request's tokens are steered."""

    ALL = "all"
    PROMPT = "prompt"
    RESPONSE = "response"
    GENERATION = "generation"


class _Part(BaseModel):
    """Immutable, without unknown keys, without NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelIdentity(_Part):
    """Which model: enough to refuse another one, and to find this one again.

    `architecture` is the class name in the model's config.json ("LlamaForCausalLM"); `num_layers` counts decoder
    blocks; `fingerprint` is `artifacts.verify.weights_fingerprint` of its directory.
    """

    id: NonEmpty
    revision: str | None = None
    architecture: NonEmpty
    hidden_size: int = Field(ge=1, le=MAX_HIDDEN_SIZE)
    num_layers: int = Field(ge=1, le=MAX_NUM_LAYERS)
    tokenizer_digest: Digest | None = None
    fingerprint: Digest | None = None


class LayerPair(_Part):
    """An expert layer and the target layer it was paired with (0-based blocks), with the scores that decided."""

    expert: int = Field(ge=0)
    target: int = Field(ge=0)
    scores: dict[str, float] = {}


class Intervention(_Part):
    """One read-function-write step on the output of decoder block `layer` (0-based) of the target.

    Kind `add`: x += strength * write. It reads nothing and has no parameters.
    """

    layer: int = Field(ge=0)
    kind: Literal["add"]
    read: str | None = None
    write: str
    parameters: dict[str, float] = {}

    @model_validator(mode="after")
    def _only_what_the_kind_uses(self) -> "Intervention":
        # Accepting a field that nothing acts on would steer otherwise than the manifest says.
        if self.read is not None or self.parameters:
            raise PydanticCustomError("unused_field", "kind 'add' takes neither read nor parameters; leave them out")
        return self


class Manifest(_Part):
    """The normative specification of a bundle, schema 1.

    **File.** One `.safetensors` file of at most 1 GiB with a header of at most 1 MiB. Its `__metadata__` holds exactly
    three strings: `format` = "expertsteer-bundle", `schema` = "1" and `manifest` = this object as JSON. Keys are
    unique, numbers are finite, and the tensors fill the data section without gap, overlap or left-over bytes. The
    identity of a bundle is "sha256:" and the hex SHA-256 of the whole file.

    **Runtime tensors** are those whose name starts with "runtime.". The i-th intervention (from 0) listed for layer l
    writes `runtime.{l}.{i}.write`: shape [target.hidden_size], F32, F16 or BF16, finite, 2-norm in [1e-6, 1e6]. Every
    runtime tensor is named by exactly one intervention and every named tensor is in the file. Servers hold them in
    fp32 until they are cast once to the model's dtype.

    **Evidence tensors** are all others: `aligner.{expert_layer}.encoder.weight|bias`,
    `aligner.{expert_layer}.decoder.*`, `rfm.{expert_layer}.vector|eigenvalues`. They may have any dtype and shape;
    servers skip them.

    **Fields.** Layers are 0-based decoder blocks; an intervention acts on the residual stream x after its block:
    x += strength * write, several at one layer in listed order. By convention `write` is a unit direction times the
    median residual norm of that layer, so that strength counts median norms. Strength 0 is off, a negative strength
    reverses.

    * `name`: what a profile is called unless the operator says otherwise.
    * `target`, `expert`: the model that is steered and, where there is one, the model that taught.
    * `layer_pairs`: each (expert, target) pair once; needs `expert`.
    * `interventions`: at least one, all inside the target's layers.
    * `recommended_strength`: what a request gets that names no strength; |recommended| <= maximum.
    * `maximum_strength`: requests with a larger |strength| are refused; in (0, 1e4].
    * `scope`: which tokens are steered unless the request says otherwise.
    * `data_digest`, `evaluation`, `tool_versions`, `seed`: how it was made and how it did.
    """

    name: Name
    description: str = ""
    licence: str = ""
    target: ModelIdentity
    expert: ModelIdentity | None = None
    layer_pairs: tuple[LayerPair, ...] = ()
    interventions: tuple[Intervention, ...]
    recommended_strength: float
    maximum_strength: float = Field(gt=0, le=MAX_STRENGTH)
    scope: Scope = Scope.ALL
    data_digest: Digest | None = None
    evaluation: dict[str, JsonValue] = {}
    tool_versions: dict[str, str] = {}
    seed: int = 0

    @field_validator("evaluation")
    @classmethod
    def _finite(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        # JsonValue lets NaN through; JSON does not.
        json.dumps(value, allow_nan=False)
        return value

    @model_validator(mode="after")
    def _check_strengths(self) -> "Manifest":
        if abs(self.recommended_strength) > self.maximum_strength:
            raise PydanticCustomError(
                "strength_over_maximum",
                "recommended_strength {recommended} is over maximum_strength {maximum}; lower it or raise the maximum",
                {"recommended": self.recommended_strength, "maximum": self.maximum_strength},
            )
        return self

    @model_validator(mode="after")
    def _check_interventions(self) -> "Manifest":
        if not self.interventions:
            raise PydanticCustomError("no_interventions", "there are no interventions; list at least one")
        written: Counter[int] = Counter()
        names: set[str] = set()
        for intervention in self.interventions:
            layer, name = intervention.layer, intervention.write
            _check_layer("intervention", layer, self.target)
            if name in names:
                raise PydanticCustomError(
                    "duplicate_tensor", "two interventions write {name}; give each its own", {"name": repr(name[:80])}
                )
            expected = f"runtime.{layer}.{written[layer]}.write"
            if name != expected:
                raise PydanticCustomError(
                    "tensor_name",
                    "an intervention at layer {layer} writes {name}; it must be called {expected}",
                    {"layer": layer, "name": repr(name[:80]), "expected": expected},
                )
            names.add(name)
            written[layer] += 1
        return self

    @model_validator(mode="after")
    def _check_layer_pairs(self) -> "Manifest":
        if self.layer_pairs and self.expert is None:
            raise PydanticCustomError("pairs_without_expert", "layer_pairs are listed and no expert; name the expert")
        seen: set[tuple[int, int]] = set()
        for pair in self.layer_pairs:
            assert self.expert is not None
            _check_layer("expert", pair.expert, self.expert)
            _check_layer("target", pair.target, self.target)
            if (pair.expert, pair.target) in seen:
                raise PydanticCustomError(
                    "duplicate_pair",
                    "layer pair ({expert}, {target}) is listed twice; keep one",
                    {"expert": pair.expert, "target": pair.target},
                )
            seen.add((pair.expert, pair.target))
        return self


def to_metadata(manifest: Manifest) -> dict[str, str]:
    """Return the `__metadata__` of a bundle. Equal manifests give equal strings, whatever the order of their keys."""
    text = json.dumps(manifest.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return {"format": FORMAT, "manifest": text, "schema": str(SCHEMA)}


def from_metadata(metadata: dict[str, str]) -> Manifest:
    """Return the manifest in the `__metadata__` of a safetensors file.

    Raises:
        BundleError: not a bundle, another schema, or a manifest that breaks the specification.
    """
    if metadata.get("format") != FORMAT:
        raise BundleError(
            BundleErrorCode.WRONG_FORMAT,
            f"The file's format is {quoted(metadata.get('format'))}, not '{FORMAT}'; it is a safetensors file "
            "but no bundle, so build one with `expertsteer build`.",
        )
    if metadata.get("schema") != str(SCHEMA):
        raise BundleError(
            BundleErrorCode.UNKNOWN_SCHEMA,
            f"The bundle has schema {quoted(metadata.get('schema'))} and this version reads '{SCHEMA}'; "
            "install the version that wrote it, or build it again.",
        )
    if metadata.keys() != {"format", "schema", "manifest"}:
        raise BundleError(
            BundleErrorCode.WRONG_FORMAT,
            f"The metadata holds {quoted(sorted(metadata))}, not exactly format, manifest, schema; build it again.",
        )
    try:
        strict_json.loads(metadata["manifest"])
        return Manifest.model_validate_json(metadata["manifest"], strict=True)
    except ValidationError as error:
        raise _refusal(error) from None
    except ValueError as error:
        raise BundleError(
            BundleErrorCode.BAD_MANIFEST, f"The manifest is not valid JSON: {quoted(str(error), 120)}; build it again."
        ) from None


def _refusal(error: ValidationError) -> BundleError:
    """Condense pydantic's report to its first problem and the number of others."""
    problems = error.errors(include_url=False)
    first = problems[0]
    field = ".".join(str(part) for part in first["loc"])
    code = _CODE_OF_TYPE.get(first["type"]) or _CODE_OF_FIELD.get(field.rpartition(".")[2])
    # Without a field the input is the whole manifest, and for a missing field what surrounds it: neither says anything.
    at = f"{quoted(field)}: " if field else ""
    value = f" (it holds {quoted(first['input'])})" if field and first["type"] != "missing" else ""
    more = f", and {len(problems) - 1} more problems" if len(problems) > 1 else ""
    return BundleError(
        code or BundleErrorCode.BAD_MANIFEST,
        f"The manifest is refused: {at}{first['msg'][:300]}{value}{more}; correct it and build again.",
    )


def _check_layer(what: str, layer: int, model: ModelIdentity) -> None:
    if layer >= model.num_layers:
        raise PydanticCustomError(
            "layer_out_of_range",
            "{what} layer {layer} does not exist: the model has {num_layers} layers, so the last is {last}",
            {"what": what, "layer": layer, "num_layers": model.num_layers, "last": model.num_layers - 1},
        )
