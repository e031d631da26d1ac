"""The lab's table: models kept, every row measured the same way, intervals, verdict, files."""

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from artifacts.lab.checkpoint import SHIPPED_MODELS
from artifacts.lab.choice import HIGHEST_PERPLEXITY_RATIO, Bench, Candidate
from artifacts.lab.corpus import CLERK_PROMPTS, Split, facts
from artifacts.lab.directions import Reading, mapped_candidates, own_candidates
from artifacts.lab.model import LabModel
from artifacts.lab.recipe import EXPERT, TARGET
from artifacts.lab.table.measure import Draws
from artifacts.lab.table.models import recipes, train_missing
from artifacts.lab.table.output import rich_comparisons, rich_table, write_plot, write_record
from artifacts.lab.table.row import ROWS_PER_EXPERT, ROWS_PER_TARGET, Kind, Row
from artifacts.lab.table.run import measure_table
from artifacts.lab.table.verdict import compare, verdict
from artifacts.lab.training import one_thread

SIZE = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48, "vocab_size": 400}
SHORT = {"steps": 2, "batch_size": 2, "tokenizer_documents": 100}
TINY_TARGET, TINY_EXPERT = (replace(recipe, **SIZE, **SHORT) for recipe in (TARGET, EXPERT))
DRAWS = Draws(untrained=1, encoders=2, random=2)
NUM_TEST = len(facts(Split.TEST))


@pytest.fixture(scope="module")
def bench():
    with one_thread():
        yield Bench(LabModel.load(SHIPPED_MODELS / "target"), strengths=(0.5,))


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> tuple[Path, list[Row]]:
    out = tmp_path_factory.mktemp("table")
    targets, experts = recipes(TINY_TARGET, 1, 1), recipes(TINY_EXPERT, 1, 101)
    return out, measure_table(out, targets, experts, DRAWS, progress=False)


def made_row(kind: Kind, right: list[float], expert: str | None = "expert-1", target: str = "target-1") -> Row:
    """One draw per share of rightly answered test facts, the first ones."""
    answers = np.stack([np.arange(NUM_TEST) < share * NUM_TEST for share in right]).astype(float)
    return Row(kind, target, expert, answers)


def test_finished_models_are_kept_and_others_refused(tmp_path):
    (recipe,) = recipes(TINY_TARGET, 1, 7)
    (directory,) = train_missing(tmp_path, [recipe], progress=False)
    assert directory == tmp_path / "target-7"
    before = (directory / "model.safetensors").stat().st_mtime_ns
    assert list(train_missing(tmp_path, [recipe], progress=False)) == [directory]
    assert (directory / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match=r"target-7 was trained with other settings \(steps\)"):
        list(train_missing(tmp_path, [replace(recipe, steps=3)], progress=False))


def test_recipes_differ_in_their_seed_only():
    first, second = recipes(TARGET, 2, 1)
    assert (first.seed, second.seed) == (1, 2)
    assert replace(second, seed=1) == first


def test_every_row_is_there(table):
    _out, rows = table
    assert sorted({row.kind for row in rows}) == sorted(Kind)
    assert len(rows) == ROWS_PER_TARGET + ROWS_PER_EXPERT
    assert {row.target for row in rows} == {"target-1"}
    draws = {row.kind: row.num_draws for row in rows}
    assert (draws[Kind.EXPERT_B], draws[Kind.UNTRAINED_B]) == (1, 1)
    assert (draws[Kind.AUTOENCODER], draws[Kind.RANDOM], draws[Kind.RANDOM_CHOSEN]) == (2, 2, 2)
    assert all(row.answers.shape[1] == NUM_TEST for row in rows)


def test_random_has_layer_and_strength_of_the_expert(table):
    by_kind = {row.kind: row for row in table[1]}
    (expert,) = by_kind[Kind.EXPERT_B].choices
    for choice in by_kind[Kind.RANDOM].choices:
        assert (choice.candidate.layer, choice.strength) == (expert.candidate.layer, expert.strength)
        assert not torch.allclose(choice.candidate.direction, expert.candidate.direction)


def test_intervals_cover_facts_and_draws():
    single = made_row(Kind.EXPERT_B, [0.5]).interval
    assert single.value == pytest.approx(0.5) and 0.05 < single.value - single.low < 0.12
    alike, spread = made_row(Kind.RANDOM, [0.5] * 30).interval, made_row(Kind.RANDOM, [0.1, 0.9] * 15).interval
    assert (alike.value, spread.value) == pytest.approx((0.5, 0.5), abs=0.01)
    assert alike.high - alike.low == pytest.approx(single.high - single.low, abs=0.02)
    assert spread.high - spread.low > 1.3 * (alike.high - alike.low)


@pytest.mark.parametrize(("untrained", "wins"), [([0.3, 0.4], True), ([0.69, 0.69], False), ([0.9], False)])
def test_the_expert_has_to_beat_untrained_ones(untrained, wins):
    rows = [made_row(Kind.EXPERT_B, [0.7]), made_row(Kind.UNTRAINED_B, untrained)]
    (comparison,) = compare(rows)
    assert comparison.beats is wins
    assert comparison.difference.value == pytest.approx(0.7 - np.mean(untrained), abs=0.01)
    test = comparison.against_best
    assert test.first_only - test.second_only == round(204 * 0.7) - round(204 * max(untrained))


def test_the_verdict_counts_targets():
    rows = []
    for target, untrained in (("target-1", 0.3), ("target-2", 0.3), ("target-3", 0.9)):
        rows += [made_row(Kind.EXPERT_B, [0.7], target=target), made_row(Kind.UNTRAINED_B, [untrained], target=target)]
    assert verdict(compare(rows)) == [
        "expert-1 (B) beats untrained experts (B) on at least 2 of 3 targets: "
        "on 2 the 95 % interval of the difference lies above 0."
    ]
    assert "DOES NOT beat" in verdict(compare(rows[2:]))[0]


def test_files_hold_every_row(table, tmp_path):
    rows = table[1]
    comparisons = compare(rows)
    write_record(tmp_path / "table.json", rows, {"verdict": verdict(comparisons)})
    record = json.loads((tmp_path / "table.json").read_text())
    assert [row["kind"] for row in record["rows"]] == [row.kind.name.lower() for row in rows]
    assert all(row["accuracy"]["low"] <= row["accuracy"]["value"] <= row["accuracy"]["high"] for row in record["rows"])
    assert len(record["verdict"]) == 1
    for name in ("one.svg", "two.svg"):
        write_plot(tmp_path / name, rows)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert ElementTree.parse(tmp_path / "one.svg").getroot().tag.endswith("svg")
    assert "http" not in "".join(
        line for line in (tmp_path / "one.svg").read_text().splitlines() if "<image" in line or "<script" in line
    )


def test_printed_table_names_every_way(table):
    console = Console(width=200, record=True, file=StringIO())
    console.print(rich_table(table[1]), rich_comparisons(compare(table[1])))
    printed = console.export_text()
    assert all(kind.value in printed for kind in Kind)


def test_nothing_within_the_budget_is_no_choice(bench):
    candidates = own_candidates(torch.eye(128)[: bench.num_layers])
    assert Bench(bench.target, strengths=(100.0,)).choose(candidates) is None


def test_the_choice_is_the_best_on_the_tune_facts(bench):
    reading = Reading.of(bench.target)
    own, chance = own_candidates(reading.difference)[2], Candidate(2, bench.random_directions(1, 0)[0])
    choice = bench.choose([chance, own])
    assert choice is not None and choice.candidate is own
    assert bench.perplexity_ratio(choice, Split.TUNE) <= HIGHEST_PERPLEXITY_RATIO
    assert bench.accuracy(choice) > 0.6
    # A model mapped onto itself keeps its own direction.
    mapped = [each for each in mapped_candidates(reading, reading, same_texts=True) if each.expert_layer == each.layer]
    cosines = [each.direction @ own.direction for each in mapped if each.layer == 2]
    assert cosines[0] > 0.9


def test_a_system_prompt_makes_the_target_answer_truly(bench):
    some = facts(Split.TEST)[:40]
    prompted = bench.target.answers_truly(some, system_prompt=CLERK_PROMPTS[0]).double().mean()
    assert prompted > 0.9 > 0.5 > bench.target.accuracy(some)
