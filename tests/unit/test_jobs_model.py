"""Models of any architecture: layers found by structure, steering, norms and answers independent of padding."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from artifacts.jobs.data import NeutralRow, Question, Text
from artifacts.jobs.errors import BuildError
from artifacts.jobs.measure import Examination, answer_likelihoods, greedy
from artifacts.jobs.model import CausalModel, batches, find_layers, load_model, pad
from artifacts.jobs.residual import median_norms

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


def test_answers_are_greedy_if_each_token_is_the_most_likely(model: CausalModel, prompts: list[list[int]]) -> None:
    vector = {0: torch.full((model.hidden_size,), 0.5)}
    answers: list[list[int]] = []
    stops = [False, False, True, False]
    with model.steered(vector):
        for prompt in prompts:
            answers.append([])
            for _ in range(3):
                answers[-1].append(int(model.network(torch.tensor([[*prompt, *answers[-1]]])).logits[0, -1].argmax()))
        answers[3][1] = (answers[3][1] + 1) % 7
        whole = [torch.tensor([prompt + answer]) for prompt, answer in zip(prompts, answers, strict=True)]
        scores = [model.network(ids).logits[0, -4:].log_softmax(-1) for ids in whole]
    found = answer_likelihoods(model, prompts, answers, stops, 10_000, vector)
    assert [each.greedy for each in found] == [True, True, int(scores[2][-1].argmax()) in model.stop_ids, False]
    for each, answer, expected in zip(found, answers, scores, strict=True):
        assert each.num_tokens == 3
        assert each.total == pytest.approx(float(expected[:3].gather(1, torch.tensor(answer)[:, None]).sum()), rel=1e-4)


def test_examination_measures_accuracy_and_perplexity(model: CausalModel) -> None:
    neutral = [NeutralRow(text=text, split="tune") for text in TEXTS]
    asked = [Question(text=text, answer="plus") for text in TEXTS]
    exam = Examination(model, asked, neutral, 64)
    assert exam.perplexity_ratio({}) == 1.0
    vector = {0: torch.full((model.hidden_size,), 2.0)}
    ids = [model.answered_ids(row) for row in asked]
    right = [int(model.network(torch.tensor([each[:-1]])).logits[0, -1].argmax()) == each[-1] for each in ids]
    assert exam.unsteered.accuracy == exam.trial(0.0, vector).accuracy == sum(right) / 4
    losses, count = [0.0, 0.0], 0
    for text in TEXTS:
        tokens = torch.tensor([model.prompt_ids(Text(text=text))])
        count += tokens.shape[1] - 1
        losses[0] += float(model.network(tokens, labels=tokens).loss) * (tokens.shape[1] - 1)
        with model.steered(vector):
            losses[1] += float(model.network(tokens, labels=tokens).loss) * (tokens.shape[1] - 1)
    expected = torch.tensor((losses[1] - losses[0]) / count).exp()
    assert exam.perplexity_ratio(vector) == pytest.approx(float(expected), rel=1e-4)
    assert exam.perplexity_ratio({0: torch.full((model.hidden_size,), float("nan"))}) > 1e20
    with pytest.raises(BuildError, match="no neutral text"):
        Examination(model, asked, [], 64)


def test_batches_bound_the_padded_tokens() -> None:
    rows = [[0] * length for length in (5, 1, 9, 3, 3, 40)]
    found = batches(rows, 12)
    assert sorted(index for batch in found for index in batch) == list(range(6))
    assert all(len(batch) * max(len(rows[index]) for index in batch) <= 12 or len(batch) == 1 for batch in found)


def test_padding_goes_to_the_asked_side(model: CausalModel) -> None:
    assert pad(model, [[5], [6, 7]], left=True).mask.tolist() == [[0, 1], [1, 1]]
    assert pad(model, [[5], [6, 7]], left=False).ids.tolist() == [[5, model.pad_id], [6, 7]]


def test_random_weights_are_those_of_the_seed(tiny_expert: Path) -> None:
    first, again, other = (load_model("tiny", tiny_expert, "float32", "cpu", random_seed=seed) for seed in (1, 1, 2))
    weights = [each.network.get_input_embeddings().weight for each in (first, again, other, _load(tiny_expert))]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="cannot load tiny"):
        _load(tmp_path)
