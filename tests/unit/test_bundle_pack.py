"""`expertsteer bundle pack`: bundles of every kind from a description and files of tensors."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from artifacts.bundle import load_bundle
from artifacts.commands import bundle as command
from artifacts.intervention import KindName
from artifacts.jobs.config import ModelSource
from artifacts.jobs.source import find_model

HIDDEN_SIZE = 128
UNIT = torch.nn.functional.normalize(torch.linspace(-1, 2, HIDDEN_SIZE), dim=0)
PLANE = torch.eye(HIDDEN_SIZE)[3:5].contiguous()
ROW = torch.linspace(3, -1, HIDDEN_SIZE)
FIELDS = {"id": "lab", "architecture": "LlamaForCausalLM", "hidden_size": HIDDEN_SIZE, "num_layers": 6}


@pytest.fixture
def pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Pack a description (YAML text, or the fields that differ from a valid one) beside files of tensors."""
    save_file({"unit": UNIT, "plane": PLANE, "half": ROW.half(), "whole": torch.arange(4)}, tmp_path / "t.safetensors")
    np.save(tmp_path / "row.npy", ROW.double().numpy())

    def run(spec: str | None = None, **changes: Any) -> tuple[int, str]:
        fields = {
            "name": "packed",
            "target": FIELDS,
            "recommended_strength": 1,
            "maximum_strength": 2,
            "interventions": [{"layer": 2, "kind": "add", "write": "row.npy"}],
        }
        (tmp_path / "spec.yaml").write_text(yaml.safe_dump(fields | changes) if spec is None else spec)
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        arguments = ["pack", str(tmp_path / "spec.yaml"), "-o", str(tmp_path / "out.safetensors")]
        status = command.run(parser.parse_args(arguments))
        streams = capsys.readouterr()
        return status, streams.err if status else streams.out

    return run


@pytest.mark.parametrize("kind", get_args(KindName))
def test_every_kind(
    pack: Callable[..., tuple[int, str]], tmp_path: Path, kind: str, kind_examples: dict[str, dict[str, Any]]
) -> None:
    fields = {"layer": 3} | kind_examples[kind]
    if kind not in ("add", "add_relative"):
        fields["read"] = "t.safetensors#plane" if kind == "rotate" else "t.safetensors#unit"
    if kind in ("add", "add_relative", "gated_add", "feature", "affine"):
        fields["write"] = "row.npy"
    steps = [fields]
    if kind == "condition":
        steps.append({"layer": 3, "kind": "add", "write": "t.safetensors#half", "gate": fields["sets"]})
    status, text = pack(interventions=steps)
    assert status == 0, text
    bundle = load_bundle(tmp_path / "out.safetensors")
    assert f"out.safetensors: {bundle.digest}" in text
    assert f"layers 3 ({kind})" in text
    packed = bundle.manifest.interventions[0].model_dump(mode="json")
    assert {"parameters": {}} | kind_examples[kind] | {"layer": 3} == {
        name: value for name, value in packed.items() if name not in ("read", "write")
    }
    expected = {"runtime.3.0.read": PLANE if kind == "rotate" else UNIT, "runtime.3.0.write": ROW}
    expected["runtime.3.1.write"] = ROW.half().float()
    assert all(torch.equal(row, expected[name]) for name, row in bundle.rows.items())
    assert set(bundle.manifest.tool_versions) == {"expertsteer"}


def test_the_example_of_the_help(pack: Callable[..., tuple[int, str]], tmp_path: Path, target: Path) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    actions = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    lines = (actions.choices["pack"].epilog or "").splitlines()
    example = "\n".join(line[2:] for line in lines if line.startswith("  "))
    for old, new in (
        ("./my-8b", str(target)),
        ("directions.safetensors#anger", "t.safetensors#unit"),
        ("axis.npy", "t.safetensors#unit"),
        ("pause.npy", "row.npy"),
        ("layer: 12", "layer: 0"),
        ("layer: 14", "layer: 1"),
        ("layer: 16", "layer: 1"),
    ):
        assert old in example
        example = example.replace(old, new)
    status, text = pack(example)
    assert status == 0, text
    manifest = load_bundle(tmp_path / "out.safetensors").manifest
    assert manifest.target == find_model(ModelSource(model=str(target)), Path()).identity
    assert [step.kind for step in manifest.interventions] == ["project", "clamp", "add"]
    assert manifest.triggers["break"].text_contains == "\n\n"


ADD = {"layer": 2, "kind": "add"}
REFUSED = {
    "no such file": ({"interventions": [ADD | {"write": "none.npy"}]}, "none.npy' cannot be read"),
    "no such tensor": ({"interventions": [ADD | {"write": "t.safetensors#row"}]}, "and tensor 'row' as one of"),
    "integers": ({"interventions": [ADD | {"write": "t.safetensors#whole"}]}, "holds it as I64"),
    "no tensor named": ({"interventions": [ADD | {"write": "t.safetensors"}]}, "or FILE.safetensors#TENSOR"),
    "another format": ({"interventions": [ADD | {"write": "t.pt"}]}, "write FILE.npy or"),
    "a number for a tensor": ({"interventions": [ADD | {"write": 5}]}, "5 names no tensor"),
    "a part of an array": ({"interventions": [ADD | {"write": "row.npy#0"}]}, "write FILE.npy or"),
    "a tensor that the kind ignores": (
        {"interventions": [ADD | {"write": "row.npy", "read": "t.safetensors#unit"}]},
        "kind 'add' takes no read",
    ),
    "a direction that is no unit": (
        {"interventions": [{"layer": 2, "kind": "project", "read": "row.npy"}]},
        "runtime.2.0.read has norm",
    ),
    "a plane for a row": ({"interventions": [ADD | {"write": "t.safetensors#plane"}]}, "has shape [2, 128]"),
    "unknown kind": ({"interventions": [{"layer": 2, "kind": "exec", "write": "row.npy"}]}, "Input should be 'add'"),
    "no layer": ({"interventions": [{"kind": "add", "write": "row.npy"}]}, "an intervention has layer None"),
    "layer past the last": ({"interventions": [ADD | {"layer": 6, "write": "row.npy"}]}, "layer 6 does not exist"),
    "no list": ({"interventions": {"layer": 2}}, "a list of mappings is needed"),
    "text for a number": ({"maximum_strength": "2"}, "maximum_strength"),
    "date": ({"description": yaml.safe_load("2026-01-01")}, "holds what a manifest cannot"),
    "NaN": ({"recommended_strength": float("nan")}, "holds what a manifest cannot"),
    "unknown key": ({"strength": 1.0}, "'strength': Extra inputs"),
    "no model folder": ({"target": "./none"}, "there is no model folder"),
    "model of another width": ({"target": FIELDS | {"hidden_size": 64}}, "[64]; build the bundle for this target"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_one_line_and_leave_nothing(
    pack: Callable[..., tuple[int, str]], tmp_path: Path, name: str
) -> None:
    changes, message = REFUSED[name]
    status, text = pack(**changes)
    assert status == 1
    assert message in text
    assert text.startswith("expertsteer bundle pack: ")
    assert text.count("\n") == 1
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("- a\n", "holds a list; a mapping of keys is needed"),
        ("a: [\n", "is not a YAML file"),
        ("a: !!python/object/apply:os.getcwd []\n", "is not a YAML file"),
        ("[" * 5000, "is not a YAML file"),
        ("a: &a [*a]\ninterventions: []\n", "holds what a manifest cannot"),
        ("#" * (1 << 20) + "\n", "more than 1048576 bytes"),
    ],
)
def test_a_description_that_is_none(pack: Callable[..., tuple[int, str]], spec: str, message: str) -> None:
    status, text = pack(spec)
    assert status == 1
    assert message in text
    assert text.count("\n") == 1
