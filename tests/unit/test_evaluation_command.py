"""`expertsteer eval` offline: files, exit codes, controls from and to bundles."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from artifacts.bundle import load_bundle, write_bundle
from artifacts.commands import eval as command
from artifacts.commands import eval_arguments
from artifacts.evaluation.controls import bundle_vectors, control_description, write_controls
from artifacts.evaluation.plan import MIN_RANDOM
from artifacts.evaluation.schema import read_report
from artifacts.jobs.errors import BuildError
from artifacts.manifest import Intervention, Manifest, ModelIdentity, Scope
from artifacts.verify import served_model

LAB = Path(__file__).parents[2] / "artifacts" / "lab"
BUNDLE, TARGET = LAB / "careful.safetensors", LAB / "models" / "target"


def _eval(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(each) for each in arguments]))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A tenth of the lab's test files."""
    directory = tmp_path_factory.mktemp("data")
    paths = []
    for name, step in (("test", 10), ("neutral", 30), ("retention", 8)):
        lines = (LAB / "data" / f"{name}.jsonl").read_text().splitlines()
        paths.append(directory / f"{name}.jsonl")
        paths[-1].write_text("\n".join(lines[::step]) + "\n")
    return paths


@pytest.fixture
def with_controls(tmp_path: Path, tiny_target: Path) -> Callable[..., Path]:
    """Write a bundle for the tiny target with control vectors."""

    def write(names: tuple[str, ...], strengths: object = None, **changes: object) -> Path:
        served = served_model(tiny_target)
        generator = torch.Generator().manual_seed(3)
        tensors = {f"runtime.{layer}.{place}.write": torch.randn(32, generator=generator) for layer, place in STEPS}
        tensors |= {
            f"control.{name}.{layer}": torch.randn(32, generator=generator) for name in names for layer in (0, 2)
        }
        manifest = {
            "name": "tiny",
            "description": "A test.",
            "target": ModelIdentity(
                id="tiny",
                architecture=served.architecture,
                hidden_size=32,
                num_layers=3,
                fingerprint=served.fingerprint,
            ),
            "interventions": tuple(
                Intervention(layer=layer, kind="add", write=f"runtime.{layer}.{place}.write") for layer, place in STEPS
            ),
            "recommended_strength": 0.5,
            "maximum_strength": 1.0,
            "evaluation": {
                "controls": strengths or {name: {"strength": 0.25} for name in names},
                "prompt": "be careful",
            },
        }
        path = tmp_path / "tiny.safetensors"
        write_bundle(path, Manifest(**(manifest | changes)), tensors)
        return path

    return write


STEPS = ((0, 0), (0, 1), (2, 0))
NAMES = ("own", "untrained", *(f"permuted-labels-{index}" for index in range(11)), "shuffled-pairs-0")


def test_the_lab_bundle_offline(data: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    gates = ("--gate", "on - off >= 0.2", "--gate", "perplexity_ratio <= 1.25")
    files = ("--data", *data[:2], "--retention", data[2], "--output", output)
    options = ("--prompt", "You are a careful clerk.", "--doses", 2, "--expert", LAB / "models" / "expert")
    status = _eval(BUNDLE, "--target", TARGET, *files, *options, *gates)
    assert status == 0
    report = read_report(output / "report.json")
    assert sorted(path.name for path in output.iterdir()) == ["report.html", "report.json"]
    assert report.about.bundle == load_bundle(BUNDLE).digest
    assert [Path(file.path).name for file in report.data] == ["test.jsonl", "neutral.jsonl", "retention.jsonl"]
    assert (report.figures["prompt"], report.figures["on.retention"]) == (1, 1)
    assert report.condition("on").agreement == 1 == report.condition("off").agreement
    counts = {"permuted-labels": 10, "shuffled-pairs": 10, "random": 30}
    assert {draw.name: draw.count for draw in report.draws} == counts
    assert report.not_measured == {}
    assert {"own", "untrained"} <= set(report.figures)
    assert 0 < report.figures["expert"] < 1
    assert report.pairs and "held_out" in report.pairs[0]
    printed = capsys.readouterr()
    assert "untrained" in printed.out and "gate passed" in printed.out


def test_a_failed_gate_is_exit_status_3_with_figure_and_bound(
    data: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (BUNDLE, "--target", TARGET, "--data", data[0], "--doses", 2, "--quiet", "--output", tmp_path)
    assert _eval(*arguments, "--gate", "off > on", "--gate", "on > labeller") == 3
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert lines[0].startswith("expertsteer eval: gate FAILED: off > on (0.")
    assert lines[1] == "expertsteer eval: gate FAILED: on > labeller (labeller was not measured)"
    assert [each.passed for each in read_report(tmp_path / "report.json").gates] == [False, False]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--target", TARGET, "--data", "x", "--gate", "on"),
        ("--target", TARGET, "--data", "x", "--random-directions", "29"),
        ("--target", TARGET, "--data", "x", "--server", "http://h"),
        ("--data", "x"),
    ],
)
def test_wrong_usage_is_exit_status_2(arguments: tuple[object, ...]) -> None:
    with pytest.raises(SystemExit) as caught:
        _eval(BUNDLE, *arguments)
    assert caught.value.code == 2


def test_the_parser_knows_the_least_number_of_random_directions() -> None:
    assert eval_arguments.MIN_RANDOM == MIN_RANDOM


def test_usage_that_only_the_whole_shows_is_exit_status_2_too() -> None:
    assert _eval(BUNDLE, "--target", TARGET) == 2
    assert _eval(BUNDLE, "--target", TARGET, "--data", "x", "--judge-url", "http://h") == 2


def test_refusals_are_one_line_and_exit_status_1(
    data: list[Path], tmp_path: Path, tiny_target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n')
    asked = ("--data", data[0], "--output", tmp_path / "out")
    for arguments, reason in (
        ((BUNDLE, "--target", tiny_target, *asked), "was built for"),
        ((tmp_path / "none", "--target", TARGET, *asked), "cannot be read"),
        ((BUNDLE, "--target", TARGET, "--data", bad), "bad.jsonl line 1"),
        ((BUNDLE, "--server", "http://127.0.0.1:9", *asked), "cannot be reached"),
        ((BUNDLE, "--server", "http://h", "--api-key-env", "NO_SUCH_KEY", *asked), "NO_SUCH_KEY is not set"),
    ):
        assert _eval(*arguments) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert reason in line
    assert not (tmp_path / "out").exists()


def test_controls_of_a_bundle_are_measured(
    with_controls: Callable[..., Path], tiny_target: Path, tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"text": f"{n} plus 1 is", "choices": ["2", "3", "4"], "correct": n % 3} for n in range(6)]
    rows.append({"text": "the old man", "task": "neutral"})
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = with_controls(NAMES)
    assert _eval(path, "--target", tiny_target, "--data", data, "--output", tmp_path / "out", "--quiet") == 0
    report = read_report(tmp_path / "out" / "report.json")
    assert report.not_measured == {}
    assert {each.against for each in report.comparisons} == {"off", "prompt", "own", "untrained"}
    draws = {draw.name: draw.count for draw in report.draws}
    assert draws == {"random": 30, "permuted-labels": 11, "shuffled-pairs": 1}
    assert report.condition("own").strength == 0.25
    # The bundle's own prompt, as the recommended default.
    assert report.settings.prompt == "be careful"


def test_controls_become_bundles_that_load(with_controls: Callable[..., Path], tmp_path: Path) -> None:
    path = with_controls(NAMES)
    assert _eval(path, "--write-controls", tmp_path / "controls") == 0
    bundle = load_bundle(path)
    vectors = bundle_vectors(path, bundle, 30, seed=0)
    # Two additions at one layer are one.
    assert torch.equal(vectors.own.rows[0], bundle.rows["runtime.0.0.write"] + bundle.rows["runtime.0.1.write"])
    assert list(vectors.controls) == ["own", *NAMES[2:13], "shuffled-pairs-0", "untrained"]
    written = {load_bundle(each).manifest.name: load_bundle(each) for each in (tmp_path / "controls").iterdir()}
    assert len(written) == len(NAMES) + 30
    for name, vector in vectors.named().items():
        control = written[f"tiny.control.{name}"]
        assert control.manifest.description == control_description(name, bundle.digest)
        assert control.manifest.recommended_strength == vector.strength
        for layer, row in vector.rows.items():
            assert torch.equal(control.rows[f"runtime.{layer}.0.write"], row)
    random = written["tiny.control.random-7"].rows["runtime.2.0.write"]
    assert float(random.norm()) == pytest.approx(float(bundle.rows["runtime.2.0.write"].norm()), rel=1e-5)


def test_controls_without_a_strength_are_refused(with_controls: Callable[..., Path]) -> None:
    for strengths, reason in (({"other": {"strength": 1.0}}, "has strength None"), ({"own": {"strength": "1"}}, "'1'")):
        path = with_controls(("own",), strengths)
        with pytest.raises(BuildError, match=f"{reason} in the manifest's evaluation, which must be a number"):
            bundle_vectors(path, load_bundle(path), 30, 0)


def test_evidence_that_is_no_control_vector_is_refused(with_controls: Callable[..., Path], tmp_path: Path) -> None:
    manifest = load_bundle(with_controls(())).manifest
    runtime = {step.write: torch.ones(32) for step in manifest.interventions}
    for name, shape in (("control.own.3", 32), ("control.own.0", 31), ("control.own", 32), ("control.own.x", 32)):
        path = tmp_path / "damaged.safetensors"
        write_bundle(path, manifest, {**runtime, name: torch.ones(shape)})
        with pytest.raises(BuildError, match=f"'{name}' of shape .* is no control vector of 3 layers of 32"):
            bundle_vectors(path, load_bundle(path), 30, 0)


def test_names_too_long_for_a_profile_are_refused(with_controls: Callable[..., Path], tmp_path: Path) -> None:
    path = with_controls((), name="n" * 60)
    bundle = load_bundle(path)
    with pytest.raises(BuildError, match="64 are allowed"):
        write_controls(tmp_path / "controls", bundle, bundle_vectors(path, bundle, 30, 0))


def test_offline_steers_all_tokens_or_refuses(
    with_controls: Callable[..., Path], tiny_target: Path, data: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = with_controls((), scope=Scope.RESPONSE)
    assert _eval(path, "--target", tiny_target, "--data", data[0]) == 1
    assert "scope response" in capsys.readouterr().err
