"""The benchmark's command, on sizes that take no time, and its statistics. Nothing here depends on how fast it is."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from steering_kernels import Kind, bench
from steering_kernels.timing import Interval, Samples, Work, interleaved, num_turns
from steering_kernels.workload import KINDS, Shape, Variant, Workload

TINY = ("--device", "cpu", "--tokens", "1,3", "--hidden", "16", "--rounds", "2", "--turn-ms", "0.01")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", *TINY, *arguments])
    return bench.main()


def test_measures_every_variant(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "figures.json"
    assert run(monkeypatch, "--backends", "reference", "--kinds", "all", "--json", str(file)) == 0
    report = json.loads(file.read_text())
    assert [(table["num_tokens"], table["hidden_size"]) for table in report["tables"]] == [(1, 16), (3, 16)]
    for table in report["tables"]:
        names = {row["name"] for row in table["rows"]}
        for kind in KINDS:
            assert {
                f"reference {form}, {kind}, slots {n}" for form in ("fused", "in place") for n in ("one", 256)
            } <= names
        assert {"plain torch", "launch", "reference fused, slots -1", "reference in place, slots -1"} <= names
        assert all(row["microseconds"][0] > 0 for row in table["rows"])
    printed = capsys.readouterr().out
    assert "3 tokens, hidden size 16" in printed
    assert "reference fused, rank-4, slots 256" in printed


def test_refuses_a_backend_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--backends", "abacus") == 1
    error = capsys.readouterr().err
    assert "no backend 'abacus' for bfloat16 on cpu" in error
    assert "reference" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--kinds", "add,teleport"), "'teleport'"),
        (("--rounds", "1"), "--rounds above 1"),
        (("--tokens", "0"), "must be above 0"),
        (("--tokens", "many"), "invalid"),
    ],
)
def test_refuses_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, str], words: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *arguments)
    assert words in capsys.readouterr().err


def test_every_kind_of_the_operator_is_measured() -> None:
    assert {entry.kind for entries in KINDS.values() for entry in entries(0)} == set(Kind) - {Kind.END}


def test_a_backend_that_does_not_steer_is_found_out() -> None:
    class Idle:
        @staticmethod
        def steer_(*_: object) -> None: ...

        @staticmethod
        def steer_add_rms_norm_(*_: object) -> None: ...

    workload = Workload(Shape(2, 16, torch.float32, "cpu"), ["add"], vllm_ops=False)
    with pytest.raises(RuntimeError, match="idle: fused, add, slots one does not steer what it should"):
        workload.require_effect("idle", Idle)  # type: ignore[arg-type]


def test_moved_rows() -> None:
    """Fused reads and writes hidden and residual and reads the weight; rank-4 has six rows per slot."""
    assert Variant(True, "none", "add").moved_rows(10) == 41
    assert Variant(True, "one", "rank-4").moved_rows(10) == 47
    assert Variant(True, "256", "add").moved_rows(1000) == 4001 + 256
    assert Variant(False, "256", "rank-4").moved_rows(10) == 20 + 60
    assert Variant(False, "none", "add").moved_rows(10) == 0


def test_ratio_is_paired_by_round() -> None:
    """A machine that slows down tenfold half-way changes no ratio within a round."""
    base = torch.tensor([1.0] * 10 + [10.0] * 10, dtype=torch.float64)
    assert Samples(1.1 * base).over(Samples(base)) == pytest.approx((1.1, 1.1, 1.1))
    assert Samples(base).quartiles() == pytest.approx((1.0, 5.5, 10.0))


def test_interval_holds_the_spread_of_the_rounds() -> None:
    generator = torch.Generator().manual_seed(0)
    noisy = 1 + 0.1 * torch.randn(50, generator=generator, dtype=torch.float64)
    estimate, low, high = Samples(noisy).over(Samples(torch.ones(50, dtype=torch.float64)))
    assert low < estimate < high
    assert 0.9 < low < 1 < high < 1.1


def test_verdicts() -> None:
    assert Interval(1.01, 1.0, 1.02).at_most(1.02) == "<= 1.02 met"
    assert Interval(1.01, 1.0, 1.03).at_most(1.02) == "<= 1.02 open"
    assert Interval(1.04, 1.03, 1.05).at_most(1.02) == "<= 1.02 missed"
    assert Interval(0.95, 0.91, 0.99).at_least(0.9) == ">= 0.9 met"
    assert Interval(0.95, 0.89, 0.99).at_least(0.9) == ">= 0.9 open"
    assert Interval(0.85, 0.8, 0.89).at_least(0.9) == ">= 0.9 missed"


def test_every_variant_has_its_turn_in_every_round_on_fresh_buffers() -> None:
    history: list[str] = []
    works = {
        name: Work([lambda name=name: history.append(name)], lambda: history.append("reset"), 0) for name in ("a", "b")
    }
    turns: list[None] = []
    samples = interleaved(works, "cpu", 5, 1e-9, lambda: turns.append(None))
    assert len(turns) == num_turns(2, 5)
    assert all(len(sample.seconds) == 5 for sample in samples.values())
    # A turn begins with a reset; those before the first round find out how often to repeat.
    took_turns = [after for before, after in itertools.pairwise(history) if before == "reset"][-num_turns(2, 5) :]
    assert all(set(took_turns[start : start + 2]) == {"a", "b"} for start in range(0, len(took_turns), 2))
