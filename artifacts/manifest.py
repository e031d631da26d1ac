"""What a bundle says about itself."""

import json
from collections import Counter
from enum import StrEnum
from typing import Literal

from pydantic import Field, JsonValue, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from artifacts import strict_json
from artifacts.errors import BundleError, BundleErrorCode, quoted
from artifacts.gates import Trigger, check_gates
from artifacts.intervention import Intervention, Parameters
from artifacts.part import Digest, Name, NonEmpty, Part, unsaid

__all__ = [
    "FORMAT", "SCHEMA", "ExcludedSpan", "Intervention", "LayerPair", "Manifest", "ModelIdentity",
    "Parameters", "Scope", "Trigger",
    "from_metadata", "parse_manifest", "to_metadata",
]  # fmt: skip

FORMAT = "expertsteer-bundle"
SCHEMA = 1
MAX_HIDDEN_SIZE = 2**20
MAX_NUM_LAYERS = 4096
MAX_STRENGTH = 1e4
MAX_INTERVENTIONS_PER_LAYER = 8
# Pydantic error types and fields that have a code of their own; all others are BAD_MANIFEST.
_CODE_OF_TYPE = {
    "layer_out_of_range": BundleErrorCode.LAYER_OUT_OF_RANGE,
    "duplicate_tensor": BundleErrorCode.DUPLICATE_TENSOR,
    "too_many_interventions": BundleErrorCode.TOO_MANY_INTERVENTIONS,
    "bad_gate": BundleErrorCode.BAD_GATE,
}
_CODE_OF_FIELD = {"kind": BundleErrorCode.UNKNOWN_KIND, "layer": BundleErrorCode.LAYER_OUT_OF_RANGE}

# Spans of an answer that others read or check by machine, or that nobody sees.
ExcludedSpan = Literal["tool_calls", "structured_output", "reasoning"]


class Scope(StrEnum):
    """Which of a request's tokens are steered."""

    ALL = "all"
    PROMPT = "prompt"
    RESPONSE = "response"
    GENERATION = "generation"


class ModelIdentity(Part):
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


class LayerPair(Part):
    """An expert layer and the target layer it was paired with (0-based blocks), with the scores that decided."""

    expert: int = Field(ge=0)
    target: int = Field(ge=0)
    scores: dict[str, float] = Field(default={})


class Manifest(Part):
    """The normative specification of a bundle, schema 1.

    **File.** One `.safetensors` file of at most 1 GiB with a header of at most 1 MiB. Its `__metadata__` holds exactly
    three strings: `format` = "expertsteer-bundle", `schema` = "1" and `manifest` = this object as JSON. Keys are
    unique, numbers are finite, and the tensors fill the data section without gap, overlap or left-over bytes. The
    identity of a bundle is "sha256:" and the hex SHA-256 of the whole file.

    **Runtime tensors** are those whose name starts with "runtime.". The i-th intervention (from 0) listed for layer l
    reads `runtime.{l}.{i}.read` and writes `runtime.{l}.{i}.write`, where its kind has them. Shape
    [target.hidden_size], for the read of `rotate` [2, target.hidden_size]; F32, F16 or BF16; finite; every row of
    2-norm in [1e-6, 1e6]. A row called unit below has norm 1 within 1e-3, the two of a plane also |dot product| <=
    1e-3; a row of `affine` may be 0, not both. Every runtime tensor is named by exactly one intervention and every
    named tensor is in the file. Servers hold them in fp32 until they are cast once to the model's dtype.

    **Evidence tensors** are all others: `aligner.{expert_layer}.encoder.weight|bias`,
    `aligner.{expert_layer}.decoder.*`, `rfm.{expert_layer}.vector|eigenvalues`. They may have any dtype and shape;
    servers skip them.

    **Interventions** act on the residual stream x after decoder block `layer` (0-based), in listed order, at most 8 at
    one layer. r is the read row, w the write row, p = r . x, s = strength * gate, where a gate is used. A strength of 0
    is off, bit for bit; a negative one reverses. In brackets the parameters, those in square ones may be missing.

    * `add`: x += s * w. By convention w is a unit direction times the median residual norm of the layer, so that
      strength counts median norms. For CAA, DiffMean, ExpertSteer, RAPTOR; with a trigger for SEAL, with keep_norm for
      GrAInS.
    * `add_relative`: x += s * |x| * w. With a unit w, strength is a share of the token's own norm.
    * `project`: x -= s * p * r; r unit. Strength 1 removes the direction, 2 reflects. For directional ablation.
    * `clamp` ([minimum], [maximum]; one at least): x += s * (min(max(p, minimum), maximum) - p) * r; r unit, bounds in
      units of the residual stream. Strength 1 enforces the bounds; equal ones set the value. For Assistant Axis
      capping, CDAS, mean ablation.
    * `gated_add` (threshold, [slope | below], [cosine]): x += s * g(p) * w, g(p) = sigmoid(slope * (p - threshold)), or
      without slope 1 where p > threshold (with below: p < threshold), else 0. With cosine p = r . x / |x|, r unit. For
      Guiding Giants and other probes.
    * `feature` ([bias], activation, [threshold], edit, value): v = activation(p + bias), x += s * (edit(v) - v) * w; r
      the encoder's row of a sparse auto-encoder, w the decoder's. relu: max(z, 0); jump_relu: z where z > threshold,
      else 0; identity: z. scale: value * v; set: value; add: v + value. Strength 1 is the whole edit. For YaPO, and
      boosting and ablation of features.
    * `rotate` (angle, mode): r has two orthonormal rows, p and q = r[1] . x. (p, q) turns by s * angle (relative) or by
      s times the shortest way to the angle (absolute), from r[0] towards r[1], in radians; the norm stays. For Angular
      Steering (absolute) and Selective Steering (relative).
    * `affine`: x += s * (r * x + w), elementwise, a missing row is 0. Strength 1 maps x to (1 + r) * x + w. For LinEAS
      and Lin-AcT, whose a * x + b is r = a - 1, w = b.
    * `condition` (threshold, [slope | below], [cosine]): gate `sets` := g(p) as in `gated_add`, for this token and
      whatever the strength; x stays. For CAST and G-ACT.

    `keep_norm` (all but `condition`) rescales x to the norm that it had before the intervention.

    **Gates** belong to one token each. `gate` names one that a condition sets before, at a lower layer or earlier in
    the list of the same one, or a trigger: 1 for the tokens it lists, 0 for others. Each is set once and used; at most
    8 in all.

    **Fields.**

    * `name`: what a profile is called unless the operator says otherwise.
    * `target`, `expert`: the model that is steered and, where there is one, the model that taught.
    * `layer_pairs`: each (expert, target) pair once; needs `expert`.
    * `interventions`: at least one, all inside the target's layers.
    * `triggers`: by the name of the gate.
    * `recommended_strength`: what a request gets that names no strength; |recommended| <= maximum.
    * `maximum_strength`: requests with a larger |strength| are refused; in (0, 1e4].
    * `scope`: which tokens are steered unless the request says otherwise.
    * `exclude`: spans inside the scope that stay unsteered unless the operator says otherwise.
    * `data_digest`, `evaluation`, `tool_versions`, `seed`: how it was made and how it did.
    """

    name: Name
    description: str = ""
    licence: str = ""
    target: ModelIdentity
    expert: ModelIdentity | None = None
    layer_pairs: tuple[LayerPair, ...] = ()
    interventions: tuple[Intervention, ...]
    triggers: dict[Name, Trigger] = Field(default={}, exclude_if=unsaid)
    recommended_strength: float
    maximum_strength: float = Field(gt=0, le=MAX_STRENGTH)
    scope: Scope = Scope.ALL
    exclude: tuple[ExcludedSpan, ...] = Field(default=(), exclude_if=unsaid)
    data_digest: Digest | None = None
    evaluation: dict[str, JsonValue] = Field(default={})
    tool_versions: dict[str, str] = Field(default={})
    seed: int = 0

    @field_validator("evaluation")
    @classmethod
    def _finite(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        # JsonValue lets NaN through; JSON does not.
        json.dumps(value, allow_nan=False)
        return value

    @field_validator("exclude")
    @classmethod
    def _said_once(cls, value: tuple[ExcludedSpan, ...]) -> tuple[ExcludedSpan, ...]:
        if len(set(value)) < len(value):
            raise PydanticCustomError("duplicate_span", "a span is excluded twice; keep one")
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
        listed: Counter[int] = Counter()
        names: set[str] = set()
        for intervention in self.interventions:
            layer = intervention.layer
            _check_layer("intervention", layer, self.target)
            _check_names(intervention, listed[layer], names)
            names.update(intervention.tensors)
            listed[layer] += 1
        for layer, count in listed.items():
            if count > MAX_INTERVENTIONS_PER_LAYER:
                raise PydanticCustomError(
                    "too_many_interventions",
                    "there are {count} interventions at layer {layer} and {most} fit; merge some, or make two bundles",
                    {"count": count, "layer": layer, "most": MAX_INTERVENTIONS_PER_LAYER},
                )
        check_gates(self.interventions, self.triggers)
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

    @property
    def gates(self) -> tuple[str, ...]:
        """Every gate: those of the triggers, then those of the conditions, each in listed order."""
        return (*self.triggers, *(step.sets for step in self.interventions if step.sets is not None))


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
    return parse_manifest(metadata["manifest"])


def parse_manifest(text: str) -> Manifest:
    """Return the manifest that `text` spells as strict JSON.

    Raises:
        BundleError: it breaks the specification.
    """
    try:
        strict_json.loads(text)
        return Manifest.model_validate_json(text, strict=True)
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


def _check_names(intervention: Intervention, index: int, taken: set[str]) -> None:
    for role, name in (("read", intervention.read), ("write", intervention.write)):
        expected = f"runtime.{intervention.layer}.{index}.{role}"
        if name in taken:
            raise PydanticCustomError(
                "duplicate_tensor",
                "two interventions {role} {name}; give each its own",
                {"role": role, "name": quoted(name)},
            )
        if name is not None and name != expected:
            raise PydanticCustomError(
                "tensor_name",
                "an intervention at layer {layer} {role}s {name}; it must be called {expected}",
                {"layer": intervention.layer, "role": role, "name": quoted(name), "expected": expected},
            )
