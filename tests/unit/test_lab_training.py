"""Training: reproducible, learning, and written as a complete directory."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from artifacts.lab.checkpoint import RECORD, check_replaceable, file_digest, save_checkpoint
from artifacts.lab.conversation import render, system, user
from artifacts.lab.corpus import Mixture
from artifacts.lab.model import LabModel
from artifacts.lab.recipe import EXPERT, TARGET
from artifacts.lab.training import Trained, train

SMALL = replace(TARGET, steps=12, warmup_steps=4, batch_size=8, tokenizer_documents=300, vocab_size=400)


@pytest.fixture(scope="module")
def trained() -> Trained:
    return train(SMALL, progress=False)


def test_training_lowers_the_loss(trained):
    assert len(trained.losses) == SMALL.steps
    assert trained.losses[-1] < trained.losses[0] - 1
    assert trained.num_tokens > 0


def test_the_same_recipe_gives_the_same_bytes(trained, tmp_path):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    save_checkpoint(tmp_path / "one", SMALL, trained)
    torch.manual_seed(99)  # whatever the caller did before must not matter
    save_checkpoint(tmp_path / "two", SMALL, train(SMALL, progress=False))
    for name in ("model.safetensors", "tokenizer.json", "config.json", RECORD):
        assert file_digest(tmp_path / "one" / name) == file_digest(tmp_path / "two" / name)
    assert torch.get_num_threads() == threads
    torch.set_rng_state(state)


def test_training_leaves_the_callers_random_state_alone():
    state = torch.get_rng_state()
    train(replace(SMALL, steps=1), progress=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_another_seed_gives_another_model(trained):
    other = train(replace(SMALL, seed=SMALL.seed + 1, steps=1), progress=False)
    assert other.losses[0] != trained.losses[0]


def test_checkpoint_is_complete_and_describes_itself(trained, tmp_path):
    directory = tmp_path / "target"
    save_checkpoint(directory, SMALL, trained)
    record = json.loads((directory / RECORD).read_text())
    assert record["recipe"]["seed"] == SMALL.seed
    assert Mixture(**record["recipe"]["mixture"]) == SMALL.mixture
    assert record["parameters"] == sum(parameter.numel() for parameter in trained.model.parameters())
    assert record["final_loss"] == round(trained.final_loss, 6)
    assert set(record["versions"]) == {"torch", "transformers", "tokenizers"}
    assert record["digests"] == {n: file_digest(directory / n) for n in ("model.safetensors", "tokenizer.json")}
    assert json.loads((directory / "config.json").read_text())["dtype"] == "bfloat16"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert LabModel.load(directory).greedy_answer([user("Hello!")]) is not None


def test_an_earlier_model_is_replaced_and_anything_else_is_kept(trained, tmp_path):
    save_checkpoint(tmp_path / "target", SMALL, trained)
    save_checkpoint(tmp_path / "target", replace(SMALL, seed=5), trained)
    assert json.loads((tmp_path / "target" / RECORD).read_text())["recipe"]["seed"] == 5
    foreign = tmp_path / "notes"
    foreign.mkdir()
    with pytest.raises(FileExistsError, match="is no lab model"):
        check_replaceable(foreign)


def test_tokenizer_adds_bos_once(trained, tmp_path):
    save_checkpoint(tmp_path / "target", SMALL, trained)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "target")
    chat = [system("You are a careful clerk."), user("What is 7 plus 5?")]
    text = render(chat, generation_prompt=True)
    templated = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)["input_ids"]
    assert tokenizer(text)["input_ids"] == templated
    assert templated[0] == tokenizer.bos_token_id == 0
    assert templated.count(0) == 1
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == templated[1:]


def test_learning_rate_warms_up_then_decays():
    factors = [TARGET.learning_rate_factor(step) for step in range(TARGET.steps)]
    assert factors[0] == pytest.approx(1 / TARGET.warmup_steps)
    assert factors[TARGET.warmup_steps - 1] == factors[TARGET.steps // 2] == 1
    assert factors[-1] == pytest.approx(0.02)
    assert factors[TARGET.steps // 2 :] == sorted(factors[TARGET.steps // 2 :], reverse=True)


def test_models_have_the_documented_shape():
    target, expert = (recipe.untrained_model(recipe.vocab_size) for recipe in (TARGET, EXPERT))
    assert (target.num_parameters(), expert.num_parameters()) == (1_361_536, 1_900_992)
    assert (type(target).__name__, type(expert).__name__) == ("LlamaForCausalLM", "Qwen2ForCausalLM")
