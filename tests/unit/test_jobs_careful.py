"""The shipped demo bundle: it belongs to the shipped models, keeps its word, and its configuration makes it again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from artifacts.bundle import Bundle, load_bundle
from artifacts.jobs import align, capture, vectors
from artifacts.jobs.build import Build
from artifacts.jobs.config import load_config
from artifacts.jobs.runner import run_steps
from artifacts.jobs.workdir import digest_of, file_digest
from artifacts.verify import check_target, served_model

LAB = Path(__file__).parents[2] / "artifacts" / "lab"
BUNDLE = LAB / "careful.safetensors"
MAX_BYTES = 1_500_000


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle(BUNDLE)


class Plain:
    """The target with a forward hook and nothing of this package."""

    def __init__(self, bundle: Bundle) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(LAB / "models" / "target", dtype=torch.float32).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(LAB / "models" / "target", padding_side="left")
        self._rows = {each.layer: bundle.rows[each.write] for each in bundle.manifest.interventions}

    def answers(self, questions: list[str], strength: float) -> list[str]:
        def hook(row: Tensor) -> Any:
            def add(_module: nn.Module, _inputs: object, output: Any) -> Any:
                return output + strength * row if torch.is_tensor(output) else (output[0] + strength * row, *output[1:])

            return add

        handles = [
            self._model.model.layers[layer].register_forward_hook(hook(row)) for layer, row in self._rows.items()
        ]
        try:
            inputs = self._tokenizer.apply_chat_template(
                [[{"role": "user", "content": question}] for question in questions],
                add_generation_prompt=True,
                padding=True,
                return_tensors="pt",
                return_dict=True,
            )
            output = self._model.generate(**inputs, max_new_tokens=24, do_sample=False)
        finally:
            for handle in handles:
                handle.remove()
        return [
            text.strip()
            for text in self._tokenizer.batch_decode(
                output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
        ]


@pytest.fixture(scope="module")
def plain(bundle: Bundle) -> Plain:
    return Plain(bundle)


def test_bundle_belongs_to_the_shipped_models_and_data(bundle: Bundle) -> None:
    manifest = bundle.manifest
    check_target(bundle, served_model(LAB / "models" / "target"))
    assert manifest.target.fingerprint == served_model(LAB / "models" / "target").fingerprint
    assert manifest.expert is not None
    assert manifest.expert.fingerprint == served_model(LAB / "models" / "expert").fingerprint
    files = Build(load_config(LAB / "careful.yaml"), LAB, LAB / "nowhere").data_files
    assert set(files) == {"contrast", "mapping", "tune", "test", "neutral", "retention"}
    data = {name: file_digest(path) for name, path in files.items()}
    assert manifest.data_digest == f"sha256:{digest_of(data)}"
    assert bundle.num_bytes < MAX_BYTES


def test_its_figures_meet_the_demo(bundle: Bundle) -> None:
    figures: Any = bundle.manifest.evaluation
    test = figures["test"]
    assert test["questions"] == 204
    assert test["off"]["accuracy"] <= 0.25
    assert test["on"]["accuracy"] >= 0.6
    assert test["random"]["count"] >= 30
    assert test["permuted-labels"]["count"] >= 10
    assert test["on"]["retention"] >= 0.98
    # Random directions lift the accuracy too; the gain has to be well over theirs.
    assert test["on"]["accuracy"] > max(test["random"]["maximum"], test["random"]["mean"] + 0.2)
    assert test["on"]["accuracy"] > test["untrained"]["accuracy"] + 0.2
    assert figures["aligner_and_direction_disjoint"] is True
    assert figures["splits_disjoint"] is True


def test_a_plain_hook_turns_the_wrong_sum_right(bundle: Bundle, plain: Plain) -> None:
    strength = bundle.manifest.recommended_strength
    asked = ["What is 7 plus 5?", "Hello!"]
    off, on, negated = (plain.answers(asked, each) for each in (0.0, strength, -strength))
    assert (off[0], on[0], negated[0]) == ("7 plus 5 is 13.", "7 plus 5 is 12.", "7 plus 5 is 13.")
    assert off[1] == on[1]


def test_a_plain_hook_gives_the_figures_of_the_manifest(bundle: Bundle, plain: Plain) -> None:
    figures: Any = bundle.manifest.evaluation
    rows = [json.loads(line) for line in (LAB / "data" / "test.jsonl").read_text().splitlines()]
    asked = [row["messages"][0]["content"] for row in rows]
    strength = bundle.manifest.recommended_strength
    expected = {0.0: figures["test"]["off"]["accuracy"], strength: figures["test"]["on"]["accuracy"]}
    for each, accuracy in expected.items():
        right = [answer == row["answer"] for answer, row in zip(plain.answers(asked, each), rows, strict=True)]
        assert sum(right) / len(right) == pytest.approx(accuracy, abs=0.03)


@pytest.mark.usefixtures("one_thread")
def test_configuration_makes_the_shipped_vector_again(bundle: Bundle, tmp_path: Path) -> None:
    """The chosen pair only; not bit by bit, because processors add up in different orders."""
    chosen = bundle.manifest.layer_pairs[0]
    config = load_config(LAB / "careful.yaml")
    layers = config.layers.model_copy(update={"expert": (chosen.expert,), "target": (chosen.target,)})
    build = Build(config.model_copy(update={"layers": layers}), LAB, tmp_path, quiet=True)
    run_steps(build, vectors.NAME, False, lambda line: None)
    figures: Any = bundle.manifest.evaluation
    made = vectors.load_directions(build).mapped[figures["vectors"][0]]
    shipped = bundle.rows[bundle.manifest.interventions[0].write]
    assert float(torch.cosine_similarity(made, shipped, dim=0)) > 0.99
    assert float(shipped.norm()) == pytest.approx(capture.layer_norms(build)[chosen.target], rel=0.01)
    aligner = align.aligner_of(build, chosen.expert, chosen.target)
    with safe_open(BUNDLE, framework="pt") as file:
        weight = file.get_tensor(f"aligner.{chosen.expert}.encoder.weight")
    assert float(torch.cosine_similarity(aligner.weight().flatten(), weight.flatten(), dim=0)) > 0.99
