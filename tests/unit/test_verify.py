"""Does a bundle belong to the served model: fingerprints, model folders, and the comparison."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from artifacts.bundle import Bundle, BundleError, BundleErrorCode
from artifacts.manifest import Intervention, Manifest, ModelIdentity
from artifacts.verify import ServedModel, check_target, served_model, weights_fingerprint

DIGEST, OTHER_DIGEST = "sha256:" + "0" * 64, "sha256:" + "1" * 64
CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_hidden_layers": 2}
SERVED = ServedModel("served", "LlamaForCausalLM", 8, 2, DIGEST)


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed": torch.randn(600, 4, generator=generator),  # over 4 KiB
        "norm": torch.ones(8, dtype=torch.bfloat16),
        "scale": torch.tensor(2.0),
        "empty": torch.zeros(0),
    }


def bundle_for(**target: Any) -> Bundle:
    identity = {"id": "target", "architecture": "LlamaForCausalLM", "hidden_size": 8, "num_layers": 2}
    manifest = Manifest(
        name="careful",
        target=ModelIdentity(**identity | target),
        interventions=(Intervention(layer=0, kind="add", write="runtime.0.0.write"),),
        recommended_strength=0.5,
        maximum_strength=1.0,
    )
    return Bundle(DIGEST, manifest, 1, {})


def test_fingerprint_does_not_depend_on_sharding(tmp_path: Path) -> None:
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    whole.mkdir()
    sharded.mkdir()
    tensors = weights()
    save_file(tensors, whole / "model.safetensors", {"format": "pt"})
    save_file({"norm": tensors.pop("norm")}, sharded / "model-00001-of-00002.safetensors")
    save_file(tensors, sharded / "model-00002-of-00002.safetensors")
    digest = weights_fingerprint(whole)
    assert digest is not None
    assert digest.startswith("sha256:")
    assert weights_fingerprint(sharded) == digest


def rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["other"] = tensors.pop("norm")


def convert(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm"] = tensors["norm"].to(torch.float16)


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm"] = tensors["norm"].reshape(2, 4)


def retrain(tensors: dict[str, torch.Tensor]) -> None:
    tensors["embed"][0, 0] += 1


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["empty"]


@pytest.mark.parametrize("change", [rename, convert, reshape, retrain, drop])
def test_fingerprint_sees_other_weights(tmp_path: Path, change: Any) -> None:
    path = tmp_path / "model.safetensors"
    tensors = weights()
    save_file(tensors, path)
    before = weights_fingerprint(tmp_path)
    change(tensors)
    save_file(tensors, path)
    assert weights_fingerprint(tmp_path) != before


def test_no_safetensors_no_fingerprint(tmp_path: Path) -> None:
    assert weights_fingerprint(tmp_path) is None


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(BundleError, match=r"'model\.safetensors' in .* cut off") as caught:
        weights_fingerprint(tmp_path)
    assert caught.value.code is BundleErrorCode.TRUNCATED


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        {"architectures": ["LlamaForCausalLM", "Other"], "n_embd": 8, "n_layer": 2},
        CONFIG | {"time_step_limit": [0.0, float("inf")]},
        {
            "architectures": ["LlamaForCausalLM"],
            "text_config": {"hidden_size": 8, "num_hidden_layers": 2},
            "vision_config": {"hidden_size": 99},
        },
    ],
    ids=["plain", "gpt2 names", "state-space limits", "multimodal"],
)
def test_model_folder_is_described(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert served_model(tmp_path) == ServedModel(str(tmp_path), "LlamaForCausalLM", 8, 2, None)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        (None, "cannot be read"),
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("[" * 100_000, "not valid JSON"),
        (json.dumps(CONFIG | {"architectures": None}), "architectures None"),
        (json.dumps(CONFIG | {"architectures": []}), "not a class name"),
        (json.dumps(CONFIG | {"hidden_size": "8"}), "hidden size None and depth 2"),
        (json.dumps(CONFIG | {"num_hidden_layers": 0}), "hidden size 8 and depth None"),
    ],
)
def test_unusable_model_folder_is_refused(tmp_path: Path, text: str | None, pattern: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(BundleError, match=pattern) as caught:
        served_model(tmp_path)
    assert caught.value.code is BundleErrorCode.BAD_MODEL


@pytest.mark.parametrize("fingerprint", [None, DIGEST])
def test_matching_bundle_is_accepted(fingerprint: str | None) -> None:
    check_target(bundle_for(fingerprint=fingerprint), SERVED)


@pytest.mark.parametrize(
    ("target", "pattern"),
    [
        ({"architecture": "Qwen2ForCausalLM"}, "architecture 'Qwen2ForCausalLM' and 'served' has 'LlamaForCausalLM'"),
        ({"hidden_size": 16}, "hidden size 16 and 'served' has 8"),
        ({"num_layers": 3}, "number of layers 3 and 'served' has 2"),
        ({"fingerprint": OTHER_DIGEST}, f"fingerprint '{OTHER_DIGEST}' and 'served' has '{DIGEST}'"),
    ],
)
def test_bundle_of_another_model_is_refused_naming_both(target: dict[str, Any], pattern: str) -> None:
    with pytest.raises(BundleError, match=pattern) as caught:
        check_target(bundle_for(**target), SERVED)
    assert caught.value.code is BundleErrorCode.MODEL_MISMATCH


def test_weights_that_cannot_be_compared_are_not_taken_on_trust() -> None:
    served = ServedModel("served", "LlamaForCausalLM", 8, 2, None)
    with pytest.raises(BundleError, match="fingerprint"):
        check_target(bundle_for(fingerprint=DIGEST), served)
    check_target(bundle_for(), served)
