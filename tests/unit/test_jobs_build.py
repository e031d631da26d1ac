"""`expertsteer build` from end to end on two random models: resuming, determinism, refusals."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts.bundle import Bundle, load_bundle
from artifacts.commands import build as command
from artifacts.commands import step as step_command
from artifacts.jobs import pair, runner
from artifacts.jobs.build import Build
from artifacts.jobs.config import load_config
from artifacts.jobs.errors import BuildError
from artifacts.jobs.runner import run_build
from artifacts.vectors.score import SignError
from artifacts.verify import check_target, served_model

STEPS = list(runner.STEP_NAMES)


def _build(config: Path, work: Path, restart: bool = False) -> tuple[Bundle, list[str]]:
    lines: list[str] = []
    build = Build(load_config(config), config.parent, work, quiet=True)
    bundle = run_build(build, work.parent / "out" / "tiny.safetensors", restart, lines.append)
    return bundle, [line.partition(":")[0] for line in lines if "skipped" in line]


def _call(config: Path, output: Path, *options: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(config), "-o", str(output), *options]))


@pytest.fixture
def no_aligner_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models share little; the gate has its own tests."""
    monkeypatch.setattr("artifacts.aligner.quality.AlignmentQuality.accepted", True)


pytestmark = pytest.mark.usefixtures("no_aligner_gate")


def test_bundle_holds_what_the_format_asks_for(tiny_build: Any, tiny_target: Path, tmp_path: Path) -> None:
    tiny_build.change(evaluate={"prompt": "be careful", "gates": ["random.mean <= 1"]})
    bundle, skipped = _build(tiny_build.config, tmp_path / "work")
    manifest = bundle.manifest
    assert skipped == []
    check_target(bundle, served_model(tiny_target))
    assert (manifest.target.id, manifest.target.architecture) == ("tiny-target", "LlamaForCausalLM")
    assert manifest.expert is not None
    assert (manifest.expert.hidden_size, manifest.expert.num_layers) == (48, 2)
    assert manifest.target.tokenizer_digest is not None
    assert manifest.data_digest is not None
    assert set(manifest.tool_versions) >= {"torch", "transformers", "xrfm"}
    pair, intervention = manifest.layer_pairs[0], manifest.interventions[0]
    assert intervention.layer == pair.target
    names = {entry.name: entry.shape for entry in bundle.evidence}
    assert tuple(names[f"aligner.{pair.expert}.encoder.weight"]) == (32, 48)
    assert tuple(names[f"aligner.{pair.expert}.decoder.weight"]) == (48, 32)
    assert {f"rfm.{layer}.{part}" for layer in range(2) for part in ("vector", "eigenvalues")} <= set(names)
    norms = json.loads((tmp_path / "work" / "capture" / "norms.json").read_text())
    written = bundle.rows[intervention.write]
    assert float(written.norm()) == pytest.approx(norms[str(pair.target)], rel=1e-4)
    figures: Any = manifest.evaluation
    assert len(figures["pairs"]) == 6
    test = figures["test"]
    assert test["random"]["count"] >= 30
    assert {"off", "on", "negated", "prompt", "own", "untrained"} <= set(test)
    assert test["permuted-labels"]["count"] == test["shuffled-pairs"]["count"] == 10
    assert figures["gates"] == {"random.mean <= 1": True}
    assert {f"control.{name}.{pair.target}" for name in ("own", "untrained", "permuted-labels-9")} <= set(names)
    assert figures["controls"]["own"]["strength"] in (0.05, 0.1)
    assert {"pairing.information.value", "pairing.information.q"} <= set(names)
    page = (tmp_path / "work" / "evaluate" / "report.html").read_text()
    assert "<svg" in page
    assert "gain on the tuning split" in page
    report = json.loads((tmp_path / "work" / "evaluate" / "report.json").read_text())
    assert [(each["expert"], each["target"]) for each in report["pairs"]] == [
        (i, j) for i in range(2) for j in range(3)
    ]
    assert {each["path"] for each in report["data"]} == {"test.jsonl", "neutral.jsonl"}
    assert figures["aligner_and_direction_disjoint"] is True
    assert figures["splits_disjoint"] is True
    assert str(tmp_path) not in manifest.model_dump_json()


def test_second_run_skips_and_equal_input_gives_equal_bytes(tiny_build: Any, tmp_path: Path) -> None:
    first, _ = _build(tiny_build.config, tmp_path / "work")
    (tmp_path / "out" / "tiny.safetensors").unlink()
    again, skipped = _build(tiny_build.config, tmp_path / "work")
    torch.manual_seed(99)
    anew, fresh = _build(tiny_build.config, tmp_path / "elsewhere")
    restarted, nothing = _build(tiny_build.config, tmp_path / "work", restart=True)
    assert (skipped, fresh, nothing) == (STEPS, [], [])
    assert first.digest == again.digest == anew.digest == restarted.digest


def test_only_what_depends_on_a_change_runs_again(tiny_build: Any, tmp_path: Path) -> None:
    _build(tiny_build.config, tmp_path / "work")
    content = load_config(tiny_build.config).tune.model_dump(mode="json")
    tiny_build.change(tune=content | {"strengths": [0.05, 0.2]})
    assert _build(tiny_build.config, tmp_path / "work")[1] == STEPS[: STEPS.index("tune")]
    test = tmp_path / "test.jsonl"
    test.write_text(test.read_text().replace("8 plus 4 is 4", "8 plus 4 is 5"))
    assert _build(tiny_build.config, tmp_path / "work")[1] == STEPS[: STEPS.index("evaluate")]
    contrast = tmp_path / "contrast.jsonl"
    contrast.write_text("".join(reversed(contrast.read_text().splitlines(keepends=True))))
    assert _build(tiny_build.config, tmp_path / "work")[1] == []


@pytest.mark.parametrize("step", STEPS)
def test_interrupted_build_goes_on(
    step: str, tiny_build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, _ = _build(tiny_build.config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        others = {
            "capture": "write_json",
            "vectors": "write_json",
            "evaluate": "write_html",
            "pack": "write_bundle",
        }
        writer = others.get(step, "write_value")

        def interrupt(*_arguments: object, **_options: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(f"artifacts.jobs.{step}.{writer}", interrupt)
        output = tmp_path / "out" / "broken.safetensors"
        assert _call(tiny_build.config, output, "--work", str(tmp_path / "work"), "--quiet") == 130
        assert not output.exists()
    assert "interrupted" in capsys.readouterr().err
    bundle, skipped = _build(tiny_build.config, tmp_path / "work")
    assert skipped == STEPS[: STEPS.index(step)]
    assert bundle.digest == expected.digest


def test_several_pairs_share_one_strength(tiny_build: Any, tmp_path: Path) -> None:
    tiny_build.change(pairing={"pairs": 2, "shortlist": 6, "strengths": [0.1], "components": 4})
    bundle, _ = _build(tiny_build.config, tmp_path / "work")
    layers = [intervention.layer for intervention in bundle.manifest.interventions]
    assert len(layers) == len(set(layers)) == 2
    assert [pair.target for pair in bundle.manifest.layer_pairs] == layers


def test_layers_can_be_chosen(tiny_build: Any, tmp_path: Path) -> None:
    tiny_build.change(layers={"expert": [1], "target": [0, 2]}, vectors={"methods": ["diffmean"], "sign": 1})
    bundle, _ = _build(tiny_build.config, tmp_path / "work")
    figures: Any = bundle.manifest.evaluation
    assert [(pair["expert"], pair["target"]) for pair in figures["pairs"]] == [(1, 0), (1, 2)]
    assert all(name.startswith("diffmean.") for name in figures["tune"]["candidates"])
    assert "rfm.1.vector" in {entry.name for entry in bundle.evidence}


def test_vectors_without_a_sign_are_refused(tiny_build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise SignError("covers 0")

    monkeypatch.setattr("artifacts.jobs.estimate.fit_rfm", refuse)
    bundle, _ = _build(tiny_build.config, tmp_path / "both")
    figures: Any = bundle.manifest.evaluation
    assert figures["refused"]["rfm.0"] == "covers 0"
    assert figures["vectors"][0].startswith("diffmean.")
    assert not any(entry.name.startswith("rfm.") for entry in bundle.evidence)
    tiny_build.change(vectors={"methods": ["rfm"]})
    with pytest.raises(BuildError, match=r"no direction has a sign.*covers 0"):
        _build(tiny_build.config, tmp_path / "rfm")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": {"target": [3]}}, "layers.target names layer 3; the model has 3, so the last is 2"),
        ({"tune": {"strengths": [0.1], "perplexity_budget": 1.0000001}}, "tune.perplexity_budget"),
        ({"tune": {"strengths": [0.1], "perplexity_budget": 10.0, "minimum_gain": 0.9}}, "tune.minimum_gain is +0.900"),
        ({"target": {"model": "./nowhere"}}, "there is no model directory"),
        ({"data": {}}, "data.contrast: Field required"),
    ],
)
def test_refusals_are_one_line(
    change: dict[str, Any], said: str, tiny_build: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_build.change(**change)
    output = tmp_path / "out.safetensors"
    assert _call(tiny_build.config, output, "--quiet") == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not output.exists()


def test_neutral_texts_of_both_splits_are_needed_before_any_work(tiny_build: Any, tmp_path: Path) -> None:
    neutral = tmp_path / "neutral.jsonl"
    neutral.write_text(neutral.read_text().replace('"test"', '"tune"'))
    with pytest.raises(BuildError, match=r"split \['tune'\]"):
        _build(tiny_build.config, tmp_path / "work")
    assert not (tmp_path / "work" / "capture").exists()


def test_command_prints_the_figures(tiny_build: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "tiny.safetensors"
    assert _call(tiny_build.config, output) == 0
    assert (tmp_path / ".expertsteer" / "build" / "tiny" / "pack").is_dir()
    printed = capsys.readouterr()
    for word in (
        "Vectors on the tuning split",
        "Test split, 5 questions",
        "random, mean of 30",
        "negated",
        "stability",
    ):
        assert word in printed.out
    assert load_bundle(output).digest in printed.out.replace("\n", "")
    assert "capture: done in" in printed.err
    assert _call(tiny_build.config, output, "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_every_step_is_a_command_and_prints_what_it_found(
    tiny_build: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [*step_command.STEPS, "pack"] == STEPS
    parser = argparse.ArgumentParser()
    step_command.add_arguments(parser)
    for name in step_command.STEPS:
        arguments = [name, str(tiny_build.config), "--work", str(tmp_path / "work")]
        assert step_command.run(parser.parse_args(arguments)) == 0
        printed = capsys.readouterr()
        assert f"{name}: done in" in printed.err
        assert printed.out.count("\n") > 4


@pytest.mark.parametrize("method", ["procrustes", "cca", "joint", "autoencoder"])
def test_every_aligner_makes_a_bundle(method: str, tiny_build: Any, tmp_path: Path) -> None:
    tiny_build.change(align={"method": method, "permutations": 20}, layers={"expert": [1], "target": [0, 1]})
    bundle, _ = _build(tiny_build.config, tmp_path / "work")
    figures: Any = bundle.manifest.evaluation
    assert figures["align"] == method
    drawn = "autoencoder" if method == "autoencoder" else "shuffled-pairs"
    assert figures["test"][drawn]["count"] == 10
    assert {"aligner.1.encoder.weight", "aligner.1.decoder.weight"} <= {entry.name for entry in bundle.evidence}


@pytest.mark.parametrize("method", ["low-mi", "high-mi", "same-depth"])
def test_every_pairing_orders_the_pairs(method: str, tiny_build: Any, tmp_path: Path) -> None:
    pairing = {"method": method, "shortlist": 2, "strengths": [0.1], "components": 4, "permutations": 40}
    tiny_build.change(pairing=pairing)
    build = Build(load_config(tiny_build.config), tiny_build.config.parent, tmp_path / "work", quiet=True)
    runner.run_steps(build, "pair", False, lambda line: None)
    found = pair.load_information(build)["value"]
    order = pair.shortlist(build)
    values = [float(found[place]) for place in order]
    assert len(order) == 2
    if method == "same-depth":
        assert order == [(0, 1), (0, 0)]
    else:
        assert values == sorted(found.flatten().tolist(), reverse=method == "high-mi")[:2]


def test_one_to_one_takes_every_layer_once(tiny_build: Any, tmp_path: Path) -> None:
    tiny_build.change(pairing={"shortlist": 6, "strengths": [0.1], "components": 4, "one_to_one": True})
    build = Build(load_config(tiny_build.config), tiny_build.config.parent, tmp_path / "work", quiet=True)
    runner.run_steps(build, "pair", False, lambda line: None)
    order = pair.shortlist(build)
    assert len(pair.pair_scores(build)) == 6
    assert len(order) == len({each.expert for each in order}) == len({each.target for each in order}) == 2


def test_paper_preset_needs_no_other_prompts(tiny_build: Any, tmp_path: Path) -> None:
    tiny_build.change(preset="paper")
    options = ["--preset", "paper", "--set", "pairing.components=4", "--set", "pairing.permutations=40", "--quiet"]
    output = tmp_path / "paper.safetensors"
    assert _call(tiny_build.config, output, *options) == 0
    figures: Any = load_bundle(output).manifest.evaluation
    assert (figures["preset"], figures["align"], figures["pairing"]) == ("paper", "autoencoder", "low-mi")
    assert all(name.startswith("rfm-aligned") for name in figures["tune"]["candidates"])
    assert figures["aligner_and_direction_disjoint"] is False


def test_without_mapping_texts_the_contrast_rows_are_halved(tiny_build: Any, tmp_path: Path) -> None:
    content = load_config(tiny_build.config).data.model_dump(mode="json", exclude={"mapping"})
    tiny_build.change(data=content)
    build = Build(load_config(tiny_build.config), tiny_build.config.parent, tmp_path / "work", quiet=True)
    assert len(build.contrast) + len(build.mapping) == 72
    assert not {row.group for row in build.contrast} & {row.group for row in build.mapping}
    assert build.prompts_differ


def test_failed_gate_writes_the_bundle_and_says_so(
    tiny_build: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_build.change(evaluate={"gates": ["on >= 2"]})
    output = tmp_path / "tiny.safetensors"
    assert _call(tiny_build.config, output, "--quiet") == 3
    assert "on >= 2" in capsys.readouterr().err
    assert output.exists()


def test_dry_run_touches_nothing(tiny_build: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert _call(tiny_build.config, tmp_path / "out.safetensors", "--dry-run", "--rate", "2") == 0
    assert "2,000 GFLOP/s (given)" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_expert_without_signal_stops_the_build(tiny_build: Any, tmp_path: Path) -> None:
    contrast = tmp_path / "contrast.jsonl"
    rows = [json.loads(line) for line in contrast.read_text().splitlines()]
    # Whether a sum comes out even says nothing about how it is asked for.
    for index, row in enumerate(rows):
        row["label"] = (index // 2 + index // 12) % 2
    contrast.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_build.change(vectors={"methods": ["diffmean"]})
    with pytest.raises(
        BuildError, match=r"no sign of the concept: expert layer \d, .* under the curve of 0\.\d+, 97.5 % interval \["
    ):
        _build(tiny_build.config, tmp_path / "work")


def test_aligner_no_better_than_permuted_pairs_stops_the_build(
    tiny_build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("artifacts.aligner.quality.AlignmentQuality.accepted", False)
    with pytest.raises(BuildError, match="no aligner is better than permuted pairs"):
        _build(tiny_build.config, tmp_path / "work")
