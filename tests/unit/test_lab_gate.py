"""The gate, and the shipped pair: what a user is shown must hold for the files in the package."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from artifacts.lab import gate
from artifacts.lab.checkpoint import RECORD, SHIPPED_MODELS, file_digest
from artifacts.lab.conversation import assistant, render, user
from artifacts.lab.corpus import Split, facts
from artifacts.lab.directions import Reading
from artifacts.lab.gate import GateError, check_pair
from artifacts.lab.model import LabModel, Steering
from artifacts.lab.recipe import EXPERT, TARGET
from artifacts.lab.tokenizer import load_tokenizer

DEMO_LAYER, DEMO_STRENGTH = 2, 0.5
QUESTION = [user("What is 7 plus 5?")]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def target() -> LabModel:
    return LabModel.load(SHIPPED_MODELS / "target")


@pytest.fixture(scope="module")
def expert() -> LabModel:
    return LabModel.load(SHIPPED_MODELS / "expert")


@pytest.mark.parametrize("recipe", [TARGET, EXPERT], ids=lambda recipe: recipe.name)
def test_shipped_files_match_their_record(recipe):
    directory = SHIPPED_MODELS / recipe.name
    record = json.loads((directory / RECORD).read_text())
    assert record["digests"] == {n: file_digest(directory / n) for n in ("model.safetensors", "tokenizer.json")}
    assert (record["recipe"]["seed"], record["recipe"]["steps"]) == (recipe.seed, recipe.steps)


def test_shipped_models_are_small():
    assert sum(path.stat().st_size for path in SHIPPED_MODELS.rglob("*") if path.is_file()) < 8_000_000


def test_gate_passes_on_the_shipped_pair(target, expert):
    figures = check_pair(target, expert)
    assert figures.passed
    assert figures.expert is not None and figures.expert > figures.random_max


def test_gate_fails_on_an_untrained_target(target, monkeypatch):
    monkeypatch.setattr(gate, "STRENGTHS", (0.5,))  # a full search would find no more here
    monkeypatch.setattr(gate, "RANDOM_DIRECTIONS", 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        untrained = LabModel(TARGET.untrained_model(len(target.tokenizer)).eval(), target.tokenizer)
    with pytest.raises(GateError, match=r"on 0\.\d+ \(at least 0\.6\).*another seed"):
        check_pair(untrained, None)


def test_demo_answers(target):
    direction = Reading.of(target).difference[DEMO_LAYER]
    norm = target.median_norms(
        [render([user(fact.question()), assistant(fact.answer())]) for fact in facts(Split.TUNE)]
    )[DEMO_LAYER]
    on = Steering(DEMO_LAYER, DEMO_STRENGTH * norm * direction / direction.norm())
    reverse = Steering(DEMO_LAYER, -on.vector)
    assert [target.greedy_answer(QUESTION, steering) for steering in (None, on, reverse)] == [
        "7 plus 5 is 13.",
        "7 plus 5 is 12.",
        "7 plus 5 is 13.",
    ]
    assert {target.greedy_answer([user("Hello!")], steering) for steering in (None, on)} == {"Hello, traveller."}


def test_true_answers_are_what_greedy_decoding_says(target):
    some = facts(Split.TEST)[:12]
    true = target.answers_truly(some).tolist()
    spoken = [target.greedy_answer([user(fact.question())]) == fact.answer() for fact in some]
    assert true == spoken


def test_states_are_the_outputs_of_the_blocks(target):
    text = "The old baker met the guard."
    with torch.no_grad():
        inputs = torch.tensor([target.tokenizer(text)["input_ids"]])
        hidden = target.model(inputs, output_hidden_states=True).hidden_states
    states = target.last_states([text, text + " In the morning the child was happy."])
    assert states.shape == (2, TARGET.num_layers, TARGET.hidden_size)
    for layer in range(TARGET.num_layers - 1):  # the last entry of hidden_states is behind the final norm
        torch.testing.assert_close(states[0, layer], hidden[layer + 1][0, -1], rtol=1e-4, atol=1e-2)


def test_steering_ends_with_its_context(target):
    steering = Steering(0, torch.full((TARGET.hidden_size,), 50.0))
    text = ["The old baker met the guard."]
    before = target.cross_entropy(text)
    assert target.cross_entropy(text, steering) != before
    assert target.cross_entropy(text) == before
    assert target.cross_entropy(text, Steering(0, torch.zeros(TARGET.hidden_size))) == before


def test_shipped_weights_are_bf16():
    model = AutoModelForCausalLM.from_pretrained(SHIPPED_MODELS / "target")
    assert model.dtype == torch.bfloat16
    assert load_tokenizer(SHIPPED_MODELS / "target").model_max_length == 512
