"""Estimators on the second world: planted states, a short run on the shipped target, and what the report says."""

from dataclasses import replace
from io import StringIO
from random import Random

import numpy as np
import pytest
import torch
from rich.console import Console

from artifacts.lab.checkpoint import SHIPPED_MODELS, is_checkpoint
from artifacts.lab.corpus import Split, facts
from artifacts.lab.model import LabModel
from artifacts.lab.nonlinear.contrast import draw_contrast
from artifacts.lab.nonlinear.layer import read_layer
from artifacts.lab.nonlinear.measure import LayerRecord, Measured, Way
from artifacts.lab.nonlinear.report import (
    advantages,
    layer_record,
    rich_advantages,
    rich_layers,
    sentences,
)
from artifacts.lab.nonlinear.run import measure_targets
from artifacts.lab.recipe import TARGET, TWO_SIDED_TARGET
from artifacts.lab.table.models import train_missing
from artifacts.lab.table.row import Row

NUM_TEST = len(facts(Split.TEST))


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A tiny target that was shown the second world for two steps, measured with a single random draw."""
    out = tmp_path_factory.mktemp("second")
    size = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48, "vocab_size": 400}
    recipe = replace(TARGET, **size, steps=2, batch_size=2, tokenizer_documents=100, mixture=TWO_SIDED_TARGET.mixture)
    return out, recipe, measure_targets(out, [recipe], 1, (0.5,), progress=False)


def made_row(way: Way, share: float, target: str = "target-1") -> Row:
    return Row(way, target, None, (np.arange(NUM_TEST) < share * NUM_TEST).astype(float)[None])


def planted(contrast, curvature: float, seed: int = 0):
    """States whose first coordinate is the evidence and whose second tells the label by `curvature`, plus noise."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(len(contrast.labels), 96, generator=generator)
    states[:, 0] += contrast.evidence
    states[:, 1] += curvature * contrast.labels
    return states


def read(curvature: float):
    contrast, held = draw_contrast(Random(0), 300), draw_contrast(Random(1), 100)
    return read_layer(planted(contrast, curvature), contrast, planted(held, curvature, 1), held, 0)


def test_rfm_finds_the_axis_that_linear_estimators_miss():
    directions, readability = read(curvature=0)
    assert readability.cosine_rfm > 0.9 > 0.4 > max(readability.cosine_difference, readability.cosine_logistic)
    assert readability.quadratic > 0.9 and abs(readability.logistic - 0.5) < 0.1 > abs(readability.difference - 0.5)
    assert readability.axis > 0.95
    assert directions.axis[0] > 0.9


def test_a_label_that_is_linear_too_draws_everything_off_the_axis():
    _directions, readability = read(curvature=8)
    assert readability.logistic > 0.99
    assert readability.cosine_rfm < 0.3 and readability.cosine_rfm_difference > 0.9


def test_a_short_run_has_every_way_and_layer(short):
    out, recipe, measured = short
    assert [row.kind for row in measured.rows] == list(Way)
    assert [each.layer for each in measured.layers] == list(range(recipe.num_layers))
    assert is_checkpoint(out / f"target-{recipe.seed}")
    assert all(0.4 < each.readability.difference < 0.6 for each in measured.layers[:1])
    random = measured.rows[-1]
    assert random.num_draws == 1 and random.interval.value <= 1


def test_the_second_world_goes_on_from_the_shipped_target(tmp_path):
    recipe = replace(TWO_SIDED_TARGET, steps=2, batch_size=2)
    (directory,) = train_missing(tmp_path, [recipe], progress=False)
    shipped, trained = (LabModel.load(each) for each in (SHIPPED_MODELS / "target", directory))
    assert trained.tokenizer.get_vocab() == shipped.tokenizer.get_vocab()
    name = "model.layers.0.mlp.up_proj.weight"
    one, other = (each.model.state_dict()[name] for each in (shipped, trained))
    assert 0 < (one - other).norm() < 0.1 * one.norm()


@pytest.mark.parametrize(("rfm", "verdict"), [(0.8, "beats"), (0.5, "cannot be told from"), (0.2, "loses to")])
def test_the_rfm_is_compared_with_every_rival(rfm, verdict):
    rows = [made_row(way, rfm if way is Way.RFM else 0.5) for way in Way]
    found = advantages(rows)
    assert [each.rival for each in found] == [Way.DIFFERENCE, Way.LOGISTIC, Way.RANDOM]
    assert {each.verdict for each in found} == {verdict}
    assert sentences(found, [])[0] == f"RFM against difference of means: {verdict} it on 1 of 1 targets."


def test_report_names_layers_and_keeps_every_figure(short):
    measured: Measured = short[2]
    found = advantages(measured.rows)
    console = Console(width=220, record=True, file=StringIO())
    console.print(rich_advantages(found), rich_layers(measured.layers))
    printed = console.export_text()
    assert all(word in printed for word in ("eigenvalue", "quadratic", Way.RANDOM.value))
    said = sentences(found, measured.layers)
    assert len(said) == 4 and "the axis steers best at layer" in said[-1]
    first: LayerRecord = measured.layers[0]
    record = layer_record(first)
    assert record["layer"] == 0
    assert record["readability"]["quadratic"] == round(first.readability.quadratic, 4)
    assert record["accuracy"]["axis"] == round(first.accuracy[Way.AXIS], 4)
