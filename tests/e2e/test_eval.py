"""`expertsteer eval` through a real server and offline: the same figures, and gates that make the exit status."""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts.bundle import load_bundle, write_bundle
from artifacts.commands import eval as command
from artifacts.evaluation.schema import Report, read_report

pytestmark = pytest.mark.engine

LAB = Path(__file__).parents[2] / "artifacts" / "lab"
TARGET = LAB / "models" / "target"
PROMPT = "You are a careful clerk."


def _eval(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(each) for each in arguments]))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lab's bundle under another name, with one control vector."""
    careful = load_bundle(LAB / "careful.safetensors")
    noise = torch.randn(128, generator=torch.Generator().manual_seed(5))
    row = careful.rows["runtime.2.0.write"]
    manifest = careful.manifest.model_copy(
        update={"name": "controlled", "evaluation": {"controls": {"own": {"strength": 0.3}}, "prompt": PROMPT}}
    )
    path = tmp_path_factory.mktemp("bundle") / "controlled.safetensors"
    own = row + row.norm() * noise / noise.norm()
    write_bundle(path, manifest, {"runtime.2.0.write": row, "control.own.2": own})
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """A part of the lab's test files, a quarter of the sums as multiple choice, and a continuation of plain text."""
    directory = tmp_path_factory.mktemp("data")
    rows = [json.loads(line) for line in (LAB / "data" / "test.jsonl").read_text().splitlines()[::8]]
    for row in rows[::4]:
        answer = row.pop("answer")
        last = answer.split()[-1]
        wrong = answer.removesuffix(last) + f"{int(last.removesuffix('.')) + 1}."
        row |= {"choices": [wrong, answer], "correct": 1}
    rows.append({"text": "<|user|>What is 7 plus 5?<|end|><|assistant|>", "pattern": "plus 5 is 12"})
    (directory / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, step in (("neutral", 20), ("retention", 5)):
        lines = (LAB / "data" / f"{name}.jsonl").read_text().splitlines()
        (directory / f"{name}.jsonl").write_text("\n".join(lines[::step]) + "\n")
    test, neutral, retention = (directory / f"{name}.jsonl" for name in ("test", "neutral", "retention"))
    return ["--data", test, neutral, "--retention", retention, "--doses", 2]


@pytest.fixture(scope="module")
def server(start_server: Callable[..., Any], bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    controls = tmp_path_factory.mktemp("controls")
    assert _eval(bundle, "--write-controls", controls) == 0
    files = [str(path) for path in sorted(controls.iterdir())]
    assert len(files) == 31
    flags = ("--enforce-eager", "--max-num-seqs", "40", "--steering-bundle", str(bundle), *files)
    with start_server("eval", *flags) as running:
        yield running


@pytest.fixture(scope="module")
def offline(bundle: Path, data: list[object], tmp_path_factory: pytest.TempPathFactory) -> Report:
    output = tmp_path_factory.mktemp("offline")
    assert _eval(bundle, "--target", TARGET, *data, "--output", output, "--quiet") == 0
    return read_report(output / "report.json")


def test_server_and_offline_agree(
    server: Any, bundle: Path, data: list[object], offline: Report, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    gates = ("--gate", "on - off >= 0.3", "--gate", "perplexity_ratio <= 1.0001")
    status = _eval(bundle, "--server", server.url, *data, "--output", tmp_path, "--quiet", *gates)
    assert status == 3
    (failed,) = capfd.readouterr().err.splitlines()
    assert failed.startswith("expertsteer eval: gate FAILED: perplexity_ratio <= 1.0001 (1.0")
    online = read_report(tmp_path / "report.json")
    assert [each.name for each in online.conditions] == [each.name for each in offline.conditions]
    for ours, theirs in zip(online.conditions, offline.conditions, strict=True):
        # Two ways of computing may break a tie differently; more than one question in thirty would be another model.
        differing = sum(left != right for left, right in zip(ours.correct, theirs.correct, strict=True))
        assert differing <= 1, ours.name
        assert ours.retained == theirs.retained
        if theirs.perplexity_ratio is not None and ours.perplexity_ratio is not None:
            assert ours.perplexity_ratio.value == pytest.approx(theirs.perplexity_ratio.value, abs=5e-3)
    for name in ("off", "on"):
        assert online.condition(name).correct == offline.condition(name).correct
    assert set(online.not_measured) == {"untrained", "permuted-labels", "shuffled-pairs"}
    assert online.about.receipts["controlled"] == load_bundle(bundle).digest
    assert len(set(online.about.receipts.values())) == 32


def test_likelihoods_through_the_server_are_the_offline_ones(
    server: Any, bundle: Path, data: list[object], offline: Report, tmp_path: Path
) -> None:
    assert _eval(bundle, "--server", server.url, *data, "--output", tmp_path, "--quiet", "--exact", "forced") == 0
    online = read_report(tmp_path / "report.json")
    for name in ("off", "on", "negated", "own", "prompt"):
        ours, theirs = online.condition(name), offline.condition(name)
        assert ours.likelihood == pytest.approx(theirs.likelihood, abs=2e-3)
        assert ours.correct == theirs.correct
        assert ours.agreement in (None, 1.0)


def test_controls_that_the_server_does_not_hold_are_named(server: Any, data: list[object], tmp_path: Path) -> None:
    careful = LAB / "careful.safetensors"
    assert _eval(careful, "--server", server.url, *data, "--output", tmp_path, "--quiet", "--prompt", PROMPT) == 0
    report = read_report(tmp_path / "report.json")
    assert report.not_measured["random"].startswith(
        "0 directions of at least 30: the server holds no profile of 30 such"
    )
    assert report.draws == ()


def test_a_bundle_that_is_not_served_is_refused(
    server: Any, bundle: Path, data: list[object], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = load_bundle(bundle)
    path = tmp_path / "other.safetensors"
    write_bundle(path, other.manifest.model_copy(update={"seed": 99}), other.rows)
    assert _eval(path, "--server", server.url, *data) == 1
    assert "no profile of the server is this bundle" in capfd.readouterr().err
