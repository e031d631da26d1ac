"""`expertsteer lab`: exit status, where things go, and one clear line for every mistake."""

import argparse
import json
import shutil
from dataclasses import replace

import pytest

from artifacts.commands import lab
from artifacts.lab import gate, recipe
from artifacts.lab.checkpoint import SHIPPED_MODELS
from artifacts.lab.dataset import SHIPPED_DATA


def call(*argv: str) -> int:
    parser = argparse.ArgumentParser(prog="expertsteer lab")
    lab.add_arguments(parser)
    return lab.run(parser.parse_args(argv))


def train_target(out, *more: str) -> int:
    return call("train", "--out", str(out), "--only", "target", "--steps-target", "1", *more)


def test_data_writes_the_shipped_files(tmp_path, capsys):
    assert call("data", "--out", str(tmp_path / "new" / "data")) == 0
    printed = capsys.readouterr().out
    for path in SHIPPED_DATA.iterdir():
        assert path.read_bytes() == (tmp_path / "new" / "data" / path.name).read_bytes()
        assert path.name in printed


def test_data_into_a_file_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert call("data", "--out", str(tmp_path / "file")) == 1
    error = capsys.readouterr().err
    assert error.startswith("expertsteer lab data: ") and error.count("\n") == 1


def test_a_failed_gate_is_exit_status_1_with_the_figures(tmp_path, capsys, monkeypatch):
    def refuse(_target, expert):
        assert expert is None
        raise gate.GateError("the trained pair is not steerable: off 0.000, on 0.000")

    monkeypatch.setattr(gate, "check_pair", refuse)
    assert train_target(tmp_path, "--seed-target", "0") == 1
    output = capsys.readouterr()
    assert "off 0.000, on 0.000" in output.err
    assert "1361536 parameters" in output.out
    assert (tmp_path / "target" / "lab.json").is_file() and not (tmp_path / "expert").exists()


def test_a_passed_gate_prints_its_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gate, "check_pair", lambda _target, _expert: "off 0.1, on 0.8")
    assert train_target(tmp_path) == 0
    assert "gate passed: off 0.1, on 0.8" in capsys.readouterr().out


def test_an_expert_alone_is_not_judged(tmp_path, capsys):
    assert call("train", "--out", str(tmp_path), "--only", "expert", "--steps-expert", "1") == 0
    assert "gate: not run" in capsys.readouterr().out


def test_a_foreign_directory_is_refused_before_training(tmp_path, capsys):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "thesis.txt").write_text("mine")
    assert train_target(tmp_path) == 1
    assert "is no lab model" in capsys.readouterr().err
    assert (tmp_path / "target" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("world", "figure"), [("careful", "untrained experts (B) on at least 1 of 1"), ("two-sided", "RFM against")]
)
def test_table_prints_and_writes_what_it_finds(tmp_path, capsys, monkeypatch, world, figure):
    size = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48, "vocab_size": 400}
    tiny = {**size, "steps": 1, "batch_size": 2, "tokenizer_documents": 50}
    mixture = recipe.TWO_SIDED_TARGET.mixture
    monkeypatch.setattr(recipe, "TWO_SIDED_TARGET", replace(recipe.TARGET, **tiny, mixture=mixture))
    monkeypatch.setattr(recipe, "TARGET", replace(recipe.TARGET, **tiny))
    monkeypatch.setattr(recipe, "EXPERT", replace(recipe.EXPERT, **tiny))
    out = tmp_path / "table"
    argv = ("table", "--out", str(out), "--targets", "1", "--experts", "1", "--world", world, "--quick")
    assert call(*argv) == 0
    printed = capsys.readouterr().out
    assert figure in printed and "target-1" in printed
    record = json.loads((out / "table.json").read_text())
    assert any(figure in sentence for sentence in record["verdict"])
    assert (out / "table.svg").stat().st_size > 1000
    assert (out / "expert-101").is_dir() == (world == "careful")


def test_table_refuses_models_of_other_settings(tmp_path, capsys):
    shutil.copytree(SHIPPED_MODELS / "target", tmp_path / "target-1")
    assert call("table", "--out", str(tmp_path)) == 1
    assert "target-1 was trained with other settings (seed)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [("--steps-target", "0"), ("--seed-expert", "-1"), ("--steps-target", "many"), ("--only", "both")]
)
def test_wrong_usage_is_exit_status_2(tmp_path, capsys, wrong):
    with pytest.raises(SystemExit) as exit_:
        call("train", "--out", str(tmp_path), *wrong)
    assert exit_.value.code == 2
    assert wrong[1] in capsys.readouterr().err
