"""Models of any architecture: layers found by structure, steering, states and answers independent of padding."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from artifacts.jobs.data import NeutralRow, Question, Text
from artifacts.jobs.errors import BuildError
from artifacts.jobs.measure import Examination, greedy
from artifacts.jobs.model import CausalModel, batches, find_layers, load_model, pad
from artifacts.jobs.states import StateStore, capture_states, last_token_states, median_norms
from artifacts.pairing.held_out import Trial

CHAT = Text.model_validate({"messages": [{"role": "user", "content": "what is 1 plus 2"}]})
TEXTS = ["the old man sold a lamp .", "a lamp", "the man is 1 plus 2 plus 3 plus 4 .", "4"]


def _load(directory: Path) -> CausalModel:
    return load_model("tiny", directory, "float32", "cpu")


@pytest.fixture(scope="module", params=[("llama", 32, 3), ("qwen2", 48, 2), ("gpt2", 32, 4)], ids=lambda p: p[0])
def model(request: pytest.FixtureRequest, make_model: Callable[..., Path]) -> CausalModel:
    return _load(make_model(*request.param))


@pytest.fixture
def prompts(model: CausalModel) -> list[list[int]]:
    return [model.prompt_ids(Text(text=text)) for text in TEXTS]


def test_layers_are_found_by_structure(model: CausalModel) -> None:
    assert model.num_layers == model.network.config.num_hidden_layers
    assert model.hidden_size == model.network.config.hidden_size


def test_layers_must_be_unambiguous() -> None:
    class Twin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision = nn.ModuleList([nn.Identity(), nn.Identity()])
            self.text = nn.ModuleDict({"blocks": nn.ModuleList([nn.Identity(), nn.Identity()])})

    with pytest.raises(BuildError, match=r"2 module lists of its 2 layers \(text.blocks, vision\)"):
        find_layers(Twin(), 2)
    with pytest.raises(BuildError, match="0 module lists"):
        find_layers(Twin(), 3)
    decided = Twin()
    decided.get_decoder = lambda: decided.text  # type: ignore[assignment]
    assert find_layers(decided, 2) is decided.text["blocks"]


def test_rows_begin_as_the_model_was_trained(model: CausalModel) -> None:
    chat = model.prompt_ids(CHAT)
    assert chat[0] == 0
    assert model.tokenizer.decode(chat).endswith("<assistant>")
    assert model.prompt_ids(Text(text="a lamp"))[0] == 0
    assert model.answer_ids(Question(text="a", answer="is 3")) == model.tokenizer.convert_tokens_to_ids(["is", "3"])


def test_chats_need_a_template(make_model: Callable[..., Path]) -> None:
    bare = _load(make_model("gpt2", 16, 2, chat=False))
    with pytest.raises(BuildError, match="no chat template"):
        bare.prompt_ids(CHAT)
    bare.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BuildError, match=r"refuses a chat with roles user: roles must alternate"):
        bare.prompt_ids(CHAT)


def test_generic_tokenizer_keeps_its_own_splitting_rule(model: CausalModel) -> None:
    # Transformers would give Qwen2 its own rule, and every number would fall into single digits.
    assert model.tokenizer.tokenize("10 plus 11") == ["10", "plus", "11"]


def test_states_do_not_depend_on_batching(model: CausalModel, prompts: list[list[int]]) -> None:
    layers = range(model.num_layers)
    together = last_token_states(model, prompts, layers, batch_tokens=10_000)
    alone = last_token_states(model, prompts, layers, batch_tokens=1)
    hidden = model.network(torch.tensor([prompts[2]]), output_hidden_states=True).hidden_states
    for layer in layers:
        torch.testing.assert_close(together[layer], alone[layer], atol=1e-5, rtol=1e-4)
        if layer + 1 < model.num_layers:  # Transformers reports the last one after the final norm.
            torch.testing.assert_close(together[layer][2], hidden[layer + 1][0, -1], atol=1e-5, rtol=1e-4)


def test_median_norm_leaves_out_first_tokens_and_padding(model: CausalModel, prompts: list[list[int]]) -> None:
    norms = median_norms(model, prompts, [0], batch_tokens=10_000)
    rows = [model.network(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0, 1:] for ids in prompts]
    assert norms[0] == pytest.approx(float(torch.cat(rows).norm(dim=-1).median()), rel=1e-4)


def test_steering_adds_to_every_token_and_ends_with_the_block(model: CausalModel, prompts: list[list[int]]) -> None:
    ids = torch.tensor([prompts[2]])
    vector = torch.randn(model.hidden_size, generator=torch.Generator().manual_seed(0))
    entering: list[torch.Tensor] = []
    handle = model.layers[1].register_forward_pre_hook(lambda _module, inputs: entering.append(inputs[0]))
    plain = model.network(ids).logits
    with model.steered({0: vector}):
        steered = model.network(ids).logits
    with model.steered({0: torch.zeros(model.hidden_size)}):
        zero = model.network(ids).logits
    handle.remove()
    torch.testing.assert_close(entering[1], entering[0] + vector)
    assert torch.equal(zero, plain)
    assert torch.equal(model.network(ids).logits, plain)
    assert not torch.allclose(steered, plain)


def test_greedy_answers_do_not_depend_on_batching(model: CausalModel, prompts: list[list[int]]) -> None:
    vector = {0: torch.ones(model.hidden_size)}
    together = greedy(model, prompts, 4, 10_000, vector)
    assert together == [greedy(model, [ids], 4, 10_000, vector)[0] for ids in prompts]
    ids = list(prompts[2])
    with model.steered(vector):
        for _ in range(4):
            ids.append(int(model.network(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in model.stop_ids:
                break
    assert together[2] == model.tokenizer.decode(ids[len(prompts[2]) :], skip_special_tokens=True).strip()


def test_examination_counts_exact_answers_and_perplexity(model: CausalModel) -> None:
    asked = [Question(text=text, answer="?") for text in TEXTS]
    neutral = [NeutralRow(text=text, split="tune") for text in TEXTS]
    first = Examination(model, asked, neutral, 64, max_new_tokens=3)
    given = first.answers()
    answers = [given[0], given[1] + " ", "wrong", "wrong"]
    known = [Question(text=text, answer=answer) for text, answer in zip(TEXTS, answers, strict=True)]
    exam = Examination(model, known, neutral, 64, max_new_tokens=3)
    assert exam.unsteered_accuracy == 0.5
    assert exam.perplexity_ratio({}) == 1.0
    vector = {0: torch.full((model.hidden_size,), 2.0)}
    assert exam.trial(0.0, vector) == Trial(0.0, 0.5, 1.0)
    losses, count = [0.0, 0.0], 0
    for text in TEXTS:
        ids = torch.tensor([model.prompt_ids(Text(text=text))])
        count += ids.shape[1] - 1
        losses[0] += float(model.network(ids, labels=ids).loss) * (ids.shape[1] - 1)
        with model.steered(vector):
            losses[1] += float(model.network(ids, labels=ids).loss) * (ids.shape[1] - 1)
    expected = torch.tensor((losses[1] - losses[0]) / count).exp()
    assert exam.perplexity_ratio(vector) == pytest.approx(float(expected), rel=1e-4)
    assert exam.perplexity_ratio({0: torch.full((model.hidden_size,), float("nan"))}) > 1e20
    with pytest.raises(BuildError, match="no neutral text"):
        Examination(model, known, [], 64)


def test_batches_bound_the_padded_tokens() -> None:
    rows = [[0] * length for length in (5, 1, 9, 3, 3, 40)]
    found = batches(rows, 12)
    assert sorted(index for batch in found for index in batch) == list(range(6))
    assert all(len(batch) * max(len(rows[index]) for index in batch) <= 12 or len(batch) == 1 for batch in found)


def test_padding_goes_to_the_asked_side(model: CausalModel) -> None:
    assert pad(model, [[5], [6, 7]], left=True).mask.tolist() == [[0, 1], [1, 1]]
    assert pad(model, [[5], [6, 7]], left=False).ids.tolist() == [[5, model.pad_id], [6, 7]]


def test_capture_resumes_at_the_missing_shard(
    model: CausalModel, prompts: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("artifacts.jobs.states.SHARD_ROWS", 2)
    rows = prompts + prompts[:1]

    def capture(digest: str) -> bool:
        return capture_states(model, rows, [0, 1], tmp_path / "store", digest, 64, "capture", quiet=True)

    assert capture("a")
    store = StateStore(tmp_path / "store")
    whole = store.layer(1)
    assert whole.shape == (5, model.hidden_size)
    torch.testing.assert_close(whole, last_token_states(model, rows, [1], 64)[1], atol=1e-5, rtol=1e-4)
    assert not capture("a")
    # As an interruption leaves it: no marker, one shard missing.
    (tmp_path / "store" / "done.json").unlink()
    (tmp_path / "store" / "shard-00001.safetensors").unlink()
    kept = (tmp_path / "store" / "shard-00000.safetensors").stat().st_mtime_ns
    assert capture("a")
    assert torch.equal(store.layer(1), whole)
    assert (tmp_path / "store" / "shard-00000.safetensors").stat().st_mtime_ns == kept
    assert capture("b")
    assert (tmp_path / "store" / "shard-00000.safetensors").stat().st_mtime_ns != kept


def test_random_weights_are_those_of_the_seed(tiny_expert: Path) -> None:
    first, again, other = (load_model("tiny", tiny_expert, "float32", "cpu", random_seed=seed) for seed in (1, 1, 2))
    weights = [each.network.get_input_embeddings().weight for each in (first, again, other, _load(tiny_expert))]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="cannot load tiny"):
        _load(tmp_path)
