"""Vectors to bundles and back: identity, strengths, units, and every mismatch named with both values."""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from artifacts.bundle import Bundle, load_bundle, parse_bundle, write_bundle
from artifacts.commands import vector as command
from artifacts.interchange.vector_export import baked_vectors, lost_in_export
from artifacts.interchange.vector_file import VectorFile, read_vectors, write_vectors
from artifacts.interchange.vector_import import check_vectors
from artifacts.jobs.config import ModelSource
from artifacts.jobs.data import Text
from artifacts.jobs.errors import BuildError
from artifacts.jobs.model import load_model
from artifacts.jobs.source import find_model
from artifacts.jobs.workdir import file_digest
from artifacts.manifest import Intervention, Manifest, ModelIdentity, Scope
from artifacts.verify import check_target, served_model

HIDDEN_SIZE, NUM_LAYERS = 32, 3
VECTORS = {layer: torch.randn(HIDDEN_SIZE, generator=torch.Generator().manual_seed(layer)) for layer in (1, 2)}
TEXTS = ["the old man sold a lamp .", "a lamp is a lamp", "what is 1 plus 2"]


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def target(tiny_target: Path) -> ModelIdentity:
    return find_model(ModelSource(model=str(tiny_target)), Path()).identity


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a refused command prints."""
    assert run(*arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"expertsteer vector {arguments[0]}: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("ending", ["gguf", "npy", "safetensors"])
def test_import_and_export_give_the_same_rows(
    tmp_path: Path, tiny_target: Path, target: ModelIdentity, ending: str
) -> None:
    source, bundle_path, back = tmp_path / f"v.{ending}", tmp_path / "kind-1.safetensors", tmp_path / f"b.{ending}"
    write_vectors(source, VECTORS, target)
    assert run("import", source, "--target", tiny_target, "-o", bundle_path, "--target-id", "org/tiny") == 0
    bundle = load_bundle(bundle_path)
    check_target(bundle, served_model(tiny_target))
    assert all(torch.equal(bundle.rows[f"runtime.{layer}.0.write"], VECTORS[layer]) for layer in VECTORS)
    assert run("export", bundle_path, "-o", back) == 0
    assert back.read_bytes() == source.read_bytes()


def test_the_manifest_tells_where_the_vectors_come_from(
    tmp_path: Path, tiny_target: Path, target: ModelIdentity, capsys: pytest.CaptureFixture[str]
) -> None:
    source, path = tmp_path / "Happy.gguf", tmp_path / "happy.safetensors"
    write_vectors(source, VECTORS, target)
    options = ("--description", "Cheers up.", "--licence", "MIT", "--scope", "response", "--layer", 2)
    assert run("import", source, "--target", tiny_target, "-o", path, *options, "--target-id", "org/tiny") == 0
    bundle = load_bundle(path)
    manifest = bundle.manifest
    assert manifest.target == target.model_copy(update={"id": "org/tiny"})
    assert target.fingerprint is not None and target.tokenizer_digest is not None
    assert (manifest.name, manifest.description, manifest.licence) == ("happy", "Cheers up.", "MIT")
    assert (manifest.recommended_strength, manifest.maximum_strength) == (1.0, 1.0)
    assert (manifest.scope, manifest.expert) == (Scope.RESPONSE, None)
    assert [step.layer for step in manifest.interventions] == [2]
    assert manifest.data_digest == f"sha256:{file_digest(source)}"
    assert manifest.evaluation == {
        "source": {
            "file": "Happy.gguf",
            "format": "gguf",
            "model_hint": "llama",
            "norms": {"2": round(float(VECTORS[2].double().norm()), 6)},
            "unit": "as in the file",
        }
    }
    assert {"expertsteer", "gguf", "torch"} <= manifest.tool_versions.keys()
    printed = capsys.readouterr().out
    assert (
        bundle.digest in printed and "layers 2 of org/tiny (LlamaForCausalLM); the file was made for 'llama'" in printed
    )


def test_strengths_are_arguments(tmp_path: Path, tiny_target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, path = tmp_path / "v.npy", tmp_path / "v.safetensors"
    np.save(source, np.ones(HIDDEN_SIZE))
    start = ("import", source, "--target", tiny_target, "-o", path, "--layer", 0)
    for given, expected in (
        (("--recommended", 0.5), (0.5, 0.5)),
        (("--recommended", -2), (-2.0, 2.0)),
        (("--recommended", 0), (0.0, 1.0)),
        (("--maximum", 3), (1.0, 3.0)),
    ):
        assert run(*start, *given) == 0
        manifest = load_bundle(path).manifest
        assert (manifest.recommended_strength, manifest.maximum_strength) == expected
    capsys.readouterr()
    before = path.read_bytes()
    for given, message in (
        (("--maximum", 0.5), "recommended_strength 1.0 is over maximum_strength 0.5"),
        (("--recommended", "nan"), "recommended_strength"),
        (("--maximum", 1e6), "maximum_strength: Input should be less than or equal to 10000 (it is 1000000.0)"),
        (("--name", "Bad Name"), "name: String should match"),
    ):
        assert message in refusal(capsys, *start, *given)
    assert path.read_bytes() == before


def test_normalised_vectors_count_median_norms(tmp_path: Path, tiny_target: Path, target: ModelIdentity) -> None:
    source, path, texts = tmp_path / "v.gguf", tmp_path / "v.safetensors", tmp_path / "texts.jsonl"
    write_vectors(source, VECTORS, target)
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert run("import", source, "--target", tiny_target, "-o", path, "--normalise", texts, "--device", "cpu") == 0
    bundle = load_bundle(path)
    facts = bundle.manifest.evaluation["source"]
    assert isinstance(facts, dict) and facts["unit"] == "median norms"
    assert facts["texts_digest"] == f"sha256:{file_digest(texts)}"
    model = load_model("tiny", tiny_target, "float32", "cpu")
    ratios = []
    for layer, vector in VECTORS.items():
        norms = torch.cat([_norms(model, layer, text) for text in TEXTS])
        row = bundle.rows[f"runtime.{layer}.0.write"]
        expected = float(norms.median())
        assert float(row.norm()) == pytest.approx(expected, rel=1e-5)
        assert float(torch.cosine_similarity(row, vector, dim=0)) == pytest.approx(1.0, abs=1e-6)
        ratios.append(float(vector.norm()) / expected)
    # Two layers: the recommended strength lies half way between the strengths that the file has there.
    assert bundle.manifest.recommended_strength == pytest.approx(sum(ratios) / 2, rel=1e-5)
    assert bundle.manifest.maximum_strength == bundle.manifest.recommended_strength


def test_texts_that_give_no_norm_are_refused(
    tmp_path: Path, make_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that puts no first token before a text, and a text of one token."""
    model_dir, source, texts = make_model("llama", HIDDEN_SIZE, NUM_LAYERS), tmp_path / "v.npy", tmp_path / "t.jsonl"
    settings = model_dir / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"bos_token": None}))
    np.save(source, np.ones(HIDDEN_SIZE))
    start = ("import", source, "--target", model_dir, "-o", tmp_path / "v.safetensors", "--layer", 1)
    for content, message in (
        ('{"text": "lamp"}\n', "have one token each"),
        ("lamp\n", "line 1"),
        ("", "has no rows"),
    ):
        texts.write_text(content)
        assert message in refusal(capsys, *start, "--normalise", texts, "--device", "cpu")
    assert "missing.jsonl" in refusal(capsys, *start, "--normalise", tmp_path / "missing.jsonl")


def _norms(model: object, layer: int, text: str) -> Tensor:
    """Norms after a block of every token but the first, from Transformers' own record."""
    ids = torch.tensor([model.prompt_ids(Text(text=text))])  # type: ignore[attr-defined]
    with torch.inference_mode():
        states: list[Tensor] = []
        handle = model.layers[layer].register_forward_hook(lambda _m, _i, out: states.append(out))  # type: ignore[attr-defined]
        model.network(input_ids=ids)  # type: ignore[attr-defined]
        handle.remove()
    return states[0][0, 1:].norm(dim=-1)


def test_vectors_of_another_model_are_refused_with_both_values(
    tmp_path: Path, tiny_target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "v.npy"
    start = ("import", source, "--target", tiny_target, "-o", tmp_path / "v.safetensors")
    row = np.ones(HIDDEN_SIZE, dtype=np.float32)
    with_nan = row.copy()
    with_nan[[3, 5]] = [math.nan, math.inf]
    for array, layers, message in (
        (np.ones(48), [1], "the vector of layer 1 has shape [48] and"),
        (np.ones(48), [1], "has hidden size 32"),
        (row, [3], "has a vector for layer 3 and"),
        (row, [3], "has 3 layers, 0 to 2"),
        (row, [-1], "has a vector for layer -1 and"),
        (np.ones((4, HIDDEN_SIZE)), [], "the file has 4 rows and"),
        (np.ones((4, HIDDEN_SIZE)), [], "has 3 layers"),
        (with_nan, [1], "holds NaN or infinity in 2 values"),
        (np.zeros(HIDDEN_SIZE), [1], "has norm 0, outside [1e-06, 1e+06]"),
        (row * 1e7, [1], "has norm 5.66e+07, outside"),
        (np.zeros((3, HIDDEN_SIZE)), [], "holds vectors of layers none"),
        (row, [], "give one --layer"),
        (row, [1, 2], "give one --layer"),
    ):
        np.save(source, array)
        assert message in refusal(capsys, *start, *(f"--layer={layer}" for layer in layers))
    assert [path.name for path in tmp_path.iterdir()] == ["v.npy"]


def test_a_zero_direction_of_a_gguf_file_is_named(target: ModelIdentity) -> None:
    with pytest.raises(BuildError, match=r"layer 2 has norm 0, outside.*other layers with --layer"):
        check_vectors(VectorFile("gguf", {1: VECTORS[1], 2: torch.zeros(HIDDEN_SIZE)}), target)


def test_missing_and_foreign_files(tmp_path: Path, tiny_target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, bundle_path = tmp_path / "v.npy", tmp_path / "v.safetensors"
    np.save(source, np.ones((NUM_LAYERS, HIDDEN_SIZE)))
    no_model = refusal(capsys, "import", source, "--target", tmp_path / "model", "-o", bundle_path)
    assert "there is no model folder" in no_model
    assert "config.json cannot be read" in refusal(capsys, "import", source, "--target", tmp_path, "-o", bundle_path)
    away = tmp_path / "no" / "v.safetensors"
    assert "No such file" in refusal(capsys, "import", source, "--target", tiny_target, "-o", away)
    assert run("import", source, "--target", tiny_target, "-o", bundle_path) == 0
    capsys.readouterr()
    again = refusal(capsys, "import", bundle_path, "--target", tiny_target, "-o", away)
    assert "is a bundle already" in again
    assert "ends in '.pt'" in refusal(capsys, "export", bundle_path, "-o", tmp_path / "v.pt")
    assert "cannot steer decoder block 0" in refusal(capsys, "export", bundle_path, "-o", tmp_path / "v.gguf")
    assert "NumPy array file" in refusal(capsys, "export", source, "-o", tmp_path / "v.gguf")
    assert "No such file" in refusal(capsys, "export", bundle_path, "-o", tmp_path / "no" / "v.npy")
    assert "strength 1.5 is outside [-1, 1]" in refusal(
        capsys, "export", bundle_path, "-o", tmp_path / "v.npy", "--strength", 1.5
    )


def _bundle(tmp_path: Path, rows: list[tuple[int, Tensor]], scope: Scope = Scope.ALL) -> Bundle:
    """A bundle whose rows may share a layer; recommended strength 0.5, at most 2."""
    layers = [layer for layer, _ in rows]
    names = [f"runtime.{layer}.{layers[:index].count(layer)}.write" for index, layer in enumerate(layers)]
    manifest = Manifest(
        name="rows",
        target=ModelIdentity(id="tiny", architecture="LlamaForCausalLM", hidden_size=4, num_layers=6),
        interventions=tuple(
            Intervention(layer=layer, kind="add", write=name) for layer, name in zip(layers, names, strict=True)
        ),
        recommended_strength=0.5,
        maximum_strength=2.0,
        scope=scope,
    )
    path = tmp_path / "rows.safetensors"
    write_bundle(path, manifest, {name: row for name, (_, row) in zip(names, rows, strict=True)})
    return parse_bundle(path.read_bytes())


def test_the_strength_is_multiplied_in(tmp_path: Path) -> None:
    one, other, third = torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.0, 0, -3, 2]), torch.tensor([0.1, 0.2, 0.3, 0.7])
    bundle = _bundle(tmp_path, [(4, one), (2, third), (4, other)], Scope.RESPONSE)
    recommended = baked_vectors(bundle)
    assert list(recommended) == [2, 4]
    assert recommended[4].tolist() == [1, 1, 0, 3]
    assert torch.equal(baked_vectors(bundle, 1.0)[2], third)
    assert baked_vectors(bundle, -2.0)[4].tolist() == [-4, -4, 0, -12]
    assert lost_in_export(bundle)[0] == "the bundle steers scope 'response'; llama.cpp steers every token"
    for strength, message in ((0.0, "norm 0, outside"), (math.nan, "strength nan"), (2.1, "outside .-2, 2.")):
        with pytest.raises(BuildError, match=message):
            baked_vectors(bundle, strength)
    with pytest.raises(BuildError, match="layer 1 has norm 0, outside"):
        baked_vectors(_bundle(tmp_path, [(1, one), (1, -one)]))


def test_other_kinds_and_excluded_spans_are_lost_in_no_silence(
    make_bundle: Callable[..., Path], kind_examples: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_bundle("turn", [2], 1, steps=[kind_examples["rotate"]])
    assert "at layer 2 is of kind 'rotate'" in refusal(capsys, "export", path, "-o", path.with_suffix(".npy"))
    path = make_bundle("quiet", [2], 1, exclude=("tool_calls", "reasoning"))
    assert lost_in_export(load_bundle(path))[0] == (
        "the bundle leaves tool_calls, reasoning unsteered; llama.cpp steers every token"
    )


def test_an_exported_file_is_imported_for_the_same_model_only(
    tmp_path: Path, tiny_target: Path, make_model: Callable[..., Path], target: ModelIdentity
) -> None:
    write_vectors(tmp_path / "v.gguf", VECTORS, target)
    shallow = find_model(ModelSource(model=str(make_model("llama", HIDDEN_SIZE, 2))), Path()).identity
    with pytest.raises(BuildError, match=r"has a vector for layer 2 and .* has 2 layers, 0 to 1"):
        check_vectors(read_vectors(tmp_path / "v.gguf", ()), shallow)
    check_vectors(read_vectors(tmp_path / "v.gguf", [1]), shallow)
