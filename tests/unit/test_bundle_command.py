"""`expertsteer bundle`: what people and scripts get to see."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from artifacts.bundle import CHECKS, load_bundle, write_bundle
from artifacts.commands import bundle as command
from artifacts.manifest import Intervention, LayerPair, Manifest, ModelIdentity
from artifacts.verify import weights_fingerprint

HIDDEN_SIZE = 8


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN_SIZE, "num_hidden_layers": 4}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"norm": torch.ones(HIDDEN_SIZE)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def bundle_path(tmp_path: Path, model_dir: Path) -> Path:
    target = {"id": "tiny-target", "architecture": "LlamaForCausalLM", "hidden_size": HIDDEN_SIZE, "num_layers": 4}
    manifest = Manifest(
        name="careful",
        description="[red]States sums right.\x1b[2J",
        licence="Apache-2.0",
        target=ModelIdentity(**target, fingerprint=weights_fingerprint(model_dir)),
        expert=ModelIdentity(id="tiny-expert", architecture="Qwen2ForCausalLM", hidden_size=12, num_layers=3),
        layer_pairs=(LayerPair(expert=1, target=2, scores={"held_out": 0.75}),),
        interventions=(Intervention(layer=2, kind="add", write="runtime.2.0.write"),),
        recommended_strength=0.5,
        maximum_strength=1.0,
        evaluation={"accuracy": {"off": 0.125, "on": 0.5}},
        tool_versions={"xrfm": "0.4.5"},
    )
    tensors = {"runtime.2.0.write": torch.full((HIDDEN_SIZE,), 0.5), "rfm.1.vector": torch.ones(3, 4)}
    path = tmp_path / "careful.safetensors"
    write_bundle(path, manifest, tensors)
    return path


def test_inspect_shows_everything(bundle_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", bundle_path) == 0
    text = capsys.readouterr().out
    for shown in (
        load_bundle(bundle_path).digest,
        "careful",
        "Apache-2.0",
        "tiny-target (LlamaForCausalLM, hidden size 8, 4 layers, weights sha256:",
        "tiny-expert (Qwen2ForCausalLM, hidden size 12, 3 layers)",
        "0.5 recommended, 1 at most",
        "held_out 0.75",
        "runtime.2.0.write",
        "1.41421",
        "rfm.1.vector",
        "3x4",
        "accuracy.on",
        "xrfm 0.4.5",
    ):
        assert shown in text


def test_a_bundle_cannot_drive_the_terminal(bundle_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("inspect", bundle_path)
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert r"[red]States sums right.\x1b[2J" in text


def test_inspect_as_json(bundle_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", bundle_path, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    bundle = load_bundle(bundle_path)
    assert report["digest"] == bundle.digest
    assert report["num_bytes"] == bundle_path.stat().st_size
    assert Manifest.model_validate(report["manifest"]) == bundle.manifest
    assert report["norms"] == {"runtime.2.0.write": [pytest.approx(2**0.5)]}
    assert report["evidence"] == [{"name": "rfm.1.vector", "shape": [3, 4], "dtype": "F32", "num_bytes": 48}]


def test_inspect_shows_every_kind(
    make_bundle: Callable[..., Path], kind_examples: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [kind_examples[kind] for kind in ("condition", "rotate", "feature")]
    steps += [{"kind": "add", "keep_norm": True, "gate": gate} for gate in ("open", "blank", "listed")]
    triggers = {"blank": {"text_contains": "\n\x1b"}, "listed": {"token_ids": list(range(9))}}
    path = make_bundle("kinds", [0, 0, 1, 2, 3, 4], 3, steps=steps, triggers=triggers, exclude=("tool_calls",))
    assert run("inspect", path) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for shown in (
        "exclude tool_calls",
        "0 condition runtime.0.0.read 1 threshold 2, below, sets open",
        "0 rotate runtime.0.1.read 1, 1 angle 0.7, mode relative",
        "2 add runtime.2.0.write 150 keep_norm, gate open",
        r"blank those that contain '\n\x1b'",
        "listed 0, 1, 2, 3 and 5 more, see --json",
    ):
        assert shown in lines
    run("inspect", path, "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["norms"]["runtime.0.1.read"] == [pytest.approx(1), pytest.approx(1)]
    assert run("verify", path) == 0
    assert "6 interventions (condition, rotate, feature, add)" in capsys.readouterr().out


def test_inspect_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", tmp_path / "none") == 1
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.count("\n") == 1
    assert "No such file" in streams.err


def verify(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    status = run("verify", *arguments, "--json")
    return status, json.loads(capsys.readouterr().out)


def test_verify_passes(bundle_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = verify(capsys, bundle_path, "--model", model_dir)
    assert (status, report["ok"]) == (0, True)
    assert [check["check"] for check in report["checks"]] == [*CHECKS, "model"]
    assert {check["status"] for check in report["checks"]} == {"passed"}
    assert all(check["found"] for check in report["checks"])


def test_verify_prints_one_line_per_check(bundle_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", bundle_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["ok", check] for check in CHECKS]


def test_verify_stops_at_the_first_failure(bundle_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray(bundle_path.read_bytes())
    data[-4 * HIDDEN_SIZE :] = b"\xff" * 4 * HIDDEN_SIZE  # the runtime row is last: NaN
    bundle_path.write_bytes(data)
    status, report = verify(capsys, bundle_path)
    assert (status, report["ok"]) == (1, False)
    statuses = {check["check"]: check["status"] for check in report["checks"]}
    assert statuses == dict.fromkeys(CHECKS[:4], "passed") | {"values": "failed", "digest": "not_run"}


def test_verify_refuses_another_model(bundle_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"norm": torch.zeros(HIDDEN_SIZE)}, model_dir / "model.safetensors")
    status, report = verify(capsys, bundle_path, "--model", model_dir)
    assert status == 1
    assert report["checks"][-1]["check"] == "model"
    assert "weights fingerprint" in report["checks"][-1]["found"]


def test_verify_refuses_a_folder_that_is_no_model(
    bundle_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = verify(capsys, bundle_path, "--model", tmp_path / "none")
    assert status == 1
    assert "no usable model folder" in report["checks"][-1]["found"]


@pytest.mark.parametrize(
    "arguments", [[], ["inspect"], ["verify"], ["pack", "x"], ["explode", "x"], ["inspect", "x", "--model", "y"]]
)
def test_usage_errors_exit_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
