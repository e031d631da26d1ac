"""When does an expert pay? The study on the shipped pair, cut down to seconds, and its statistics on made-up data."""

import argparse
import json
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch

from artifacts.lab.checkpoint import SHIPPED_MODELS
from artifacts.lab.corpus import Split, facts
from artifacts.lab.dataset import neutral_texts
from artifacts.lab.model import LabModel, Steering
from artifacts.lab.study import command
from artifacts.lab.study.comparison import RANDOM, accuracies, chosen_estimator, compare, sign_flip_p_value
from artifacts.lab.study.effect import SteeredBlock
from artifacts.lab.study.efficiency import Condition, TargetRecord, measure
from artifacts.lab.study.estimator import Estimator
from artifacts.lab.study.layers import fixed_sources, labellers_of, target_bench
from artifacts.lab.study.reading import Reading, untrained
from artifacts.lab.study.record import load_record, record_path, save_record
from artifacts.lab.study.regime import CONTENTS, REGIMES, texts
from artifacts.lab.study.source import CONTROLS, Source
from artifacts.lab.study.strength import choose_strength
from artifacts.lab.study.verdict import points, verdict

DRAWS = 6


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def target() -> LabModel:
    return LabModel.load(SHIPPED_MODELS / "target")


def regime(name):
    return next(each for each in REGIMES if each.name == name)


def test_a_steered_block_gives_what_the_whole_model_gives(target):
    some, neutral = facts(Split.TUNE)[:20], neutral_texts(Split.TUNE)[:3]
    block = SteeredBlock(target, 2, some, neutral)
    for seed in range(3):
        vector = 12 * torch.nn.functional.normalize(
            torch.randn(128, generator=torch.Generator().manual_seed(seed)), dim=0
        )
        steering = Steering(2, vector)
        assert torch.equal(block.answers_truly(vector), target.answers_truly(some, steering))
        ratio = np.exp(target.cross_entropy(neutral, steering) - target.cross_entropy(neutral))
        assert block.perplexity_ratio(vector) == pytest.approx(ratio, rel=1e-4)
    assert torch.equal(block.answers_truly(None), target.answers_truly(some))
    assert block.perplexity_ratio(None) == 1


def test_draws_are_balanced_seeded_and_of_their_kind():
    for each in REGIMES:
        for count in each.counts:
            draw = each.draw(count, 3)
            assert len(draw.rows) == len(draw.groups) == count
            assert int(draw.labels.sum()) == count // 2
            assert torch.equal(draw.rows, each.draw(count, 3).rows)
            flipped = int((draw.labels != 1 - draw.rows % 2).sum())
            assert flipped == 2 * round(each.flipped_share * (count // 2))
    assert not torch.equal(regime("matched").draw(16, 0).rows, regime("matched").draw(16, 1).rows)


def test_matched_draws_hold_pairs_and_confounded_ones_a_subject():
    matched = regime("matched").draw(16, 0).rows
    assert torch.equal(matched[:8] // 2, matched[8:] // 2)
    unmatched = regime("unmatched").draw(16, 0).rows
    assert not torch.equal(unmatched[:8] // 2, unmatched[8:] // 2)
    kinds = [CONTENTS[row // 2].fact.kind.value for row in regime("confounded").draw(32, 0).rows.tolist()]
    assert (kinds[:16].count("sum"), kinds[16:].count("sum")) == (13, 3)


def test_texts_name_the_speaker_in_their_own_wording():
    first = {wording: texts(wording)[:2] for wording in ("prompt", "unfamiliar", "header")}
    assert "You check every sum." in first["prompt"][0] and "You count in a hurry." in first["prompt"][1]
    assert "You are a teacher." in first["unfamiliar"][0]
    assert first["header"][0].startswith("The clerk checks the accounts.<|user|>")
    for pair in first.values():
        assert pair[0].split("<|user|>")[1] == pair[1].split("<|user|>")[1]


def test_strength_keeps_to_the_budget_and_may_be_zero(target):
    block = SteeredBlock(target, 2, facts(Split.TUNE)[:20], neutral_texts(Split.TUNE)[:3])
    harmful = torch.nn.functional.normalize(torch.ones(128), dim=0)
    assert choose_strength(block, [harmful], 1e4).strength == 0
    assert choose_strength(block, [harmful], 1e-6).perplexity_ratio == pytest.approx(1, abs=1e-3)


@pytest.fixture(scope="module")
def record(target) -> TargetRecord:
    expert = SHIPPED_MODELS / "expert"
    reading = Reading.of(target)
    models = {Source.MAPPED: Reading.of(LabModel.load(expert)), Source.UNTRAINED: Reading.of(untrained(expert, 0))}
    labellers = {
        Source.LABELS: labellers_of(models[Source.MAPPED])[2:3],
        Source.UNTRAINED_LABELS: labellers_of(models[Source.UNTRAINED])[:1],
        Source.SELF_LABELS: labellers_of(reading)[2:3],
    }
    bench = target_bench(target, reading)
    sources = fixed_sources(bench, reading, models, labellers)
    few = (replace(regime("matched"), counts=(32,)),)
    return measure(("target", "expert"), bench, sources, few, draws=4, random_directions=4, progress=False)


def test_the_study_finds_what_is_known_of_the_shipped_pair(record):
    found = {(each.source, each.estimator): each for each in record.conditions}
    assert {source for source, _estimator in found} == set(map(str, Source))
    assert record.own_all > 0.6 > record.unsteered
    own = found[Source.OWN, Estimator.DIFFERENCE]
    assert own.cosine > 0.8 and own.auc > 0.7 and np.mean(own.accuracies) > record.unsteered + 0.2
    assert np.mean(found[Source.LABELS, Estimator.MATCHED].accuracies) > record.unsteered + 0.2
    control = found[Source.UNTRAINED, Estimator.DIFFERENCE]
    assert np.mean(control.accuracies) < np.mean(found[Source.MAPPED, Estimator.DIFFERENCE].accuracies)
    assert all(each.perplexity_ratio <= 1.25 for each in record.conditions)


def test_a_record_is_read_back_and_belongs_to_its_models(record, tmp_path):
    path = record_path(tmp_path, SHIPPED_MODELS / "target", SHIPPED_MODELS / "expert", 4)
    assert load_record(path) is None
    save_record(path, record)
    assert load_record(path) == record
    assert path != record_path(tmp_path, SHIPPED_MODELS / "expert", SHIPPED_MODELS / "target", 4)
    assert path != record_path(tmp_path, SHIPPED_MODELS / "target", SHIPPED_MODELS / "expert", 5)
    path.write_text(path.read_text()[:-40])
    assert load_record(path) is None


def made_up(levels: dict[Source, float], target: str = "a", spread: float = 0.02) -> TargetRecord:
    """A record in which every condition of a source has the same level, give or take."""
    random = Random(target)
    conditions = [
        Condition(
            each.name, labels, str(source), str(Estimator.DIFFERENCE), 0.5, level, 1.1,
            [level + random.uniform(-spread, spread) for _ in range(20)], 0.5, 0.8, 0.0,
        )
        for each in REGIMES
        for labels in each.counts
        for source, level in levels.items()
    ]  # fmt: skip
    return TargetRecord(target, "expert", {"target": 2}, 0.2, 0.8, 0.8, [0.3, 0.4], conditions)


LEVELS = {
    Source.OWN: 0.5, Source.MAPPED: 0.7, Source.UNTRAINED: 0.3,
    Source.LABELS: 0.4, Source.SELF_LABELS: 0.5, Source.UNTRAINED_LABELS: 0.3,
}  # fmt: skip


def test_the_verdict_follows_the_figures():
    pays = [made_up(LEVELS, name) for name in "ab"]
    judged = points(compare(pays))
    assert {point.route for point in judged if point.pays} == {Source.MAPPED}
    assert {point.route for point in judged if point.against_own.worse} == {Source.LABELS}
    assert verdict(pays, compare(pays)).startswith(
        f"An expert pays in {len(judged) // 2} of {len(judged)} points (a, b;"
    )
    # A control that does as well takes the credit away.
    as_good = [made_up(LEVELS | {Source.UNTRAINED: 0.7}, name) for name in "ab"]
    judged = points(compare(as_good))
    assert not any(point.pays for point in judged)
    assert all(point.not_the_expert for point in judged if point.route is Source.MAPPED)
    assert verdict(as_good, compare(as_good)).startswith("An expert pays in 0 of")


def test_one_estimator_serves_all_numbers_of_labels():
    record = made_up({Source.OWN: 0.5})
    tuned = {8: (0.6, 0.7), 16: (0.6, 0.3), 32: (0.6, 0.5), 64: (0.6, 0.5)}
    conditions = [
        replace(each, estimator=str(estimator), tune_accuracy=tuned[each.labels][which], accuracies=[float(which)] * 4)
        for each in record.conditions
        if each.regime == "matched" and each.labels in tuned
        for which, estimator in enumerate((Estimator.DIFFERENCE, Estimator.RFM))
    ]
    # The machine is lucky at 8 labels and worse on the whole.
    found = [replace(record, conditions=conditions)]
    assert {chosen_estimator(found, "matched", labels, Source.OWN) for labels in tuned} == {Estimator.DIFFERENCE}
    assert accuracies(found, "matched", 8, Source.OWN).tolist() == [[0.0] * 4]
    assert chosen_estimator(found, "matched", 8, Source.LABELS) is None


def test_targets_that_disagree_are_counted():
    records = [made_up(LEVELS, "a"), made_up(LEVELS | {Source.MAPPED: 0.45}, "b")]
    found = {each.targets_ahead for each in compare(records) if (each.route, each.rival) == (Source.MAPPED, Source.OWN)}
    assert found == {1}
    said = verdict(records, compare(records))
    assert "\na alone: the expert pays in 20 of 40 points: matched pairs" in said
    assert "\nb alone: the expert pays in 0 of 40 points: nowhere." in said


def test_every_way_meets_its_controls():
    rivals = {(each.route, each.rival) for each in compare([made_up(LEVELS)])}
    assert rivals == {
        (route, rival) for route, controls in CONTROLS.items() for rival in (Source.OWN, *controls, RANDOM)
    }


def test_the_sign_flip_test():
    assert sign_flip_p_value(np.full(12, 0.1)) < 0.005
    assert sign_flip_p_value(np.array([0.1, -0.1] * 6)) == 1
    assert sign_flip_p_value(np.array([0.3, -0.1, 0.1, -0.2, 0.2])) > 0.3


def test_the_command_reports_what_was_measured(tmp_path, capsys):
    path = record_path(tmp_path, SHIPPED_MODELS / "target", SHIPPED_MODELS / "expert", 20)
    save_record(path, made_up(LEVELS))
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["labels", "--out", str(tmp_path), "--draws", "20", "--quiet"])
    assert command.run(args) == 0
    assert "An expert pays in" in capsys.readouterr().out
    result = json.loads((tmp_path / "labels.json").read_text())
    assert result["verdict"].startswith("An expert pays in") and result["targets"][0]["unsteered"] == 0.2
    plot = (tmp_path / "labels.svg").read_text()
    assert plot.startswith("<?xml") and 'href="http' not in plot


@pytest.mark.parametrize("wrong", ["3", "-1", "many"])
def test_too_few_draws_are_a_usage_error(wrong, capsys):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    with pytest.raises(SystemExit):
        parser.parse_args(["labels", "--draws", wrong])
    assert "is not a whole number >= 4" in capsys.readouterr().err
