"""The manifest: what it accepts, what it refuses, and its one spelling in a file."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import artifacts
from artifacts.bundle import BundleError, BundleErrorCode
from artifacts.header import read_header
from artifacts.manifest import Intervention, LayerPair, Manifest, ModelIdentity, Scope, from_metadata, to_metadata

DIGEST = "sha256:" + "0" * 64
TARGET = {"id": "target", "architecture": "LlamaForCausalLM", "hidden_size": 8, "num_layers": 4}
EXPERT = {"id": "expert", "architecture": "Qwen2ForCausalLM", "hidden_size": 12, "num_layers": 3}


def step(layer: int, index: int = 0) -> dict[str, Any]:
    return {"layer": layer, "kind": "add", "write": f"runtime.{layer}.{index}.write"}


def fields(**changes: Any) -> dict[str, Any]:
    """The fields of a valid manifest, with changes."""
    return {
        "name": "careful",
        "target": TARGET,
        "interventions": [step(2)],
        "recommended_strength": 0.5,
        "maximum_strength": 1.0,
    } | changes


def metadata(manifest: dict[str, Any] | str) -> dict[str, str]:
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    return {"format": "expertsteer-bundle", "schema": "1", "manifest": text}


def test_defaults() -> None:
    manifest = Manifest.model_validate(fields())
    assert manifest.scope is Scope.ALL
    assert manifest.expert is None
    assert manifest.layer_pairs == ()
    assert manifest.seed == 0


def test_is_built_from_python_objects() -> None:
    manifest = Manifest(
        name="careful",
        target=ModelIdentity(**TARGET),
        expert=ModelIdentity(**EXPERT),
        layer_pairs=(LayerPair(expert=2, target=2, scores={"held_out": 0.3}),),
        interventions=(Intervention(layer=2, kind="add", write="runtime.2.0.write"),),
        recommended_strength=-0.5,
        maximum_strength=0.5,
        scope=Scope.GENERATION,
    )
    assert from_metadata(to_metadata(manifest)) == manifest


def test_metadata_round_trip_keeps_every_field() -> None:
    manifest = Manifest.model_validate(
        fields(
            description="Zähle richtig.\n",
            licence="Apache-2.0",
            target=TARGET | {"revision": "main", "tokenizer_digest": DIGEST, "fingerprint": DIGEST},
            expert=EXPERT,
            layer_pairs=[{"expert": 0, "target": 3, "scores": {"mi": 0.1}}, {"expert": 0, "target": 2}],
            interventions=[step(3), step(2), step(2, 1)],
            scope="response",
            data_digest=DIGEST,
            evaluation={"accuracy": {"off": 0.1, "on": [0.8, None, True]}},
            tool_versions={"torch": "2"},
            seed=7,
        )
    )
    assert from_metadata(to_metadata(manifest)) == manifest


def test_equal_manifests_have_equal_metadata() -> None:
    one = Manifest.model_validate(fields(tool_versions={"a": "1", "b": "2"}, evaluation={"x": {"p": 1, "q": 2}}))
    other = Manifest.model_validate(fields(evaluation={"x": {"q": 2, "p": 1}}, tool_versions={"b": "2", "a": "1"}))
    assert to_metadata(one) == to_metadata(other)


def test_is_frozen() -> None:
    manifest = Manifest.model_validate(fields())
    with pytest.raises(ValidationError, match="frozen"):
        manifest.name = "other"


WRONG = {
    "name with capitals": {"name": "Careful"},
    "name with a newline at its end": {"name": "careful\n"},
    "name too long": {"name": "a" * 65},
    "unknown key": {"steer_everything": True},
    "unknown scope": {"scope": "everything"},
    "no interventions": {"interventions": []},
    "recommended over maximum": {"recommended_strength": 1.5},
    "negative recommended over maximum": {"recommended_strength": -1.5},
    "NaN strength": {"recommended_strength": float("nan")},
    "infinite maximum": {"maximum_strength": float("inf")},
    "maximum of zero": {"recommended_strength": 0.0, "maximum_strength": 0.0},
    "absurd maximum": {"maximum_strength": 1e5},
    "layer past the last": {"interventions": [step(4)]},
    "negative layer": {"interventions": [step(-1)]},
    "unknown kind": {"interventions": [step(2) | {"kind": "exec"}]},
    "same tensor twice": {"interventions": [step(2), step(2)]},
    "tensor of another layer": {"interventions": [step(2) | {"write": "runtime.1.0.write"}]},
    "tensor that skips an index": {"interventions": [step(2), step(2, 2)]},
    "tensor outside runtime": {"interventions": [step(2) | {"write": "rfm.2.vector"}]},
    "read that kind add would ignore": {"interventions": [step(2) | {"read": "runtime.2.0.read"}]},
    "parameter that kind add would ignore": {"interventions": [step(2) | {"parameters": {"keep_norm": 1.0}}]},
    "NaN in the evaluation": {"evaluation": {"accuracy": [{"on": float("nan")}]}},
    "NaN score": {"expert": EXPERT, "layer_pairs": [{"expert": 0, "target": 0, "scores": {"mi": float("nan")}}]},
    "digest that is none": {"data_digest": "sha256:abc"},
    "pairs without an expert": {"layer_pairs": [{"expert": 0, "target": 0}]},
    "pair past the expert's last layer": {"expert": EXPERT, "layer_pairs": [{"expert": 3, "target": 0}]},
    "pair past the target's last layer": {"expert": EXPERT, "layer_pairs": [{"expert": 0, "target": 4}]},
    "same pair twice": {"expert": EXPERT, "layer_pairs": [{"expert": 0, "target": 0}] * 2},
    "hidden size of zero": {"target": TARGET | {"hidden_size": 0}},
    "hidden size without end": {"target": TARGET | {"hidden_size": 2**40}},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG.keys())
def test_refuses(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Manifest.model_validate(fields(**changes))


CODES = {
    "layer past the last": (BundleErrorCode.LAYER_OUT_OF_RANGE, "layer 4 does not exist: the model has 4 layers"),
    "negative layer": (BundleErrorCode.LAYER_OUT_OF_RANGE, r"greater than or equal to 0 \(it holds -1\)"),
    "unknown kind": (BundleErrorCode.UNKNOWN_KIND, r"or 'condition' \(it holds 'exec'\); correct it"),
    "same tensor twice": (BundleErrorCode.DUPLICATE_TENSOR, "two interventions write 'runtime.2.0.write'"),
    "recommended over maximum": (BundleErrorCode.BAD_MANIFEST, "1.5 is over maximum_strength 1"),
    "unknown key": (BundleErrorCode.BAD_MANIFEST, "'steer_everything': Extra inputs"),
}


@pytest.mark.parametrize("case", CODES)
def test_refusal_from_a_file_has_its_code_and_names_the_value(case: str) -> None:
    code, pattern = CODES[case]
    with pytest.raises(BundleError, match=pattern) as caught:
        from_metadata(metadata(fields(**WRONG[case])))
    assert caught.value.code is code


@pytest.mark.parametrize("changes", [{"seed": "7"}, {"seed": True}, {"maximum_strength": "1"}, {"name": 5}])
def test_a_file_is_read_without_type_coercion(changes: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="it holds"):
        from_metadata(metadata(fields(**changes)))


def test_only_the_first_of_many_problems_is_spelled_out() -> None:
    with pytest.raises(BundleError, match="and 2 more problems") as caught:
        from_metadata(metadata(fields(a=1, b=2, c=3)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("{", "not valid JSON"),
        ("[]", "refused"),
        ('{"name": "a", "name": "b"}', "'name' appears twice"),
        ('{"seed": NaN}', "NaN is not a JSON number"),
        ('{"seed": 1e999}', "too large for a 64-bit float"),
        ('{"seed": 18446744073709551616}', r"outside \[-2\^63, 2\^64\)"),
        ('{"description": "\\ud800"}', "half of a surrogate pair"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_manifest_text_must_be_strict_json(text: str, pattern: str) -> None:
    with pytest.raises(BundleError, match=pattern) as caught:
        from_metadata(metadata(text))
    assert caught.value.code is BundleErrorCode.BAD_MANIFEST


def test_other_formats_and_schemas_are_named() -> None:
    good = metadata(fields())
    with pytest.raises(BundleError, match="format is 'pt'") as caught:
        from_metadata(good | {"format": "pt"})
    assert caught.value.code is BundleErrorCode.WRONG_FORMAT
    with pytest.raises(BundleError, match="format is None"):
        from_metadata({})
    with pytest.raises(BundleError, match="schema '2' and this version reads '1'") as caught:
        from_metadata(good | {"schema": "2"})
    assert caught.value.code is BundleErrorCode.UNKNOWN_SCHEMA
    with pytest.raises(BundleError, match="not exactly"):
        from_metadata(good | {"note": "hello"})


def test_the_shipped_bundle_is_spelled_as_today() -> None:
    # Fields that say nothing stay unwritten, so a manifest of additions has the bytes that it always had.
    path = Path(artifacts.__file__).parent / "lab" / "careful.safetensors"
    with path.open("rb") as file:
        metadata = read_header(file, path.stat().st_size, 1 << 20).metadata
    assert to_metadata(from_metadata(metadata)) == metadata
