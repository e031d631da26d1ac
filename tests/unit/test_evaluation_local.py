"""The local subject against Transformers itself, and forced answers against generated ones."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from artifacts.bundle import load_bundle
from artifacts.evaluation.controls import bundle_vectors
from artifacts.evaluation.local import LocalSubject, random_rows
from artifacts.evaluation.rows import EvaluationRow, read_questionnaire
from artifacts.evaluation.subject import UNSTEERED, Condition
from artifacts.jobs.errors import BuildError
from artifacts.jobs.model import CausalModel, load_model

LAB = Path(__file__).parents[2] / "artifacts" / "lab"


@pytest.fixture(scope="module")
def model(tiny_target: Path) -> CausalModel:
    return load_model("tiny", tiny_target, "float32", "cpu")


def _row(**keys: object) -> EvaluationRow:
    return EvaluationRow.model_validate(keys)


CHAT = _row(messages=[{"role": "user", "content": "what is 1 plus 2"}], answer="3 .")
PLAIN = _row(text="1 plus 2 is", answer="3 .")


def test_likelihoods_are_those_of_transformers(model: CausalModel) -> None:
    subject = LocalSubject(model, {})
    for row in (CHAT, PLAIN):
        (found,) = subject.log_likelihoods([row], ["3 ."], UNSTEERED)
        prompt = model.prompt_ids(row)
        answer = model.tokenizer("3 .", add_special_tokens=False)["input_ids"]
        scores = model.network(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
        expected = sum(float(scores[len(prompt) - 1 + place, token]) for place, token in enumerate(answer))
        assert found.total == pytest.approx(expected, abs=1e-4)
        assert found.num_tokens == 2


def test_neutral_text_is_read_after_its_first_token(model: CausalModel) -> None:
    text = _row(text="the old man sold a lamp .", task="neutral")
    (found,) = LocalSubject(model, {}).text_log_likelihoods([text], UNSTEERED)
    ids = torch.tensor([model.prompt_ids(text)])
    loss = float(model.network(ids, labels=ids).loss)
    assert found.num_tokens == ids.shape[1] - 1
    assert -found.total / found.num_tokens == pytest.approx(loss, abs=1e-4)


def test_conditions_name_vectors_and_scale_them(model: CausalModel) -> None:
    rows = {1: torch.randn(32, generator=torch.Generator().manual_seed(0))}
    subject = LocalSubject(model, {"one": rows, "double": {1: 2 * rows[1]}})
    ask = [CHAT, PLAIN], ["3 .", "3 ."]
    off, one = subject.log_likelihoods(*ask, UNSTEERED), subject.log_likelihoods(*ask, Condition("one", 1.0))
    assert off != one
    assert subject.log_likelihoods(*ask, Condition("one", 2.0)) == subject.log_likelihoods(*ask, Condition("double", 1))
    assert subject.log_likelihoods(*ask, Condition("one", 0.0)) == off
    # Nothing stays behind.
    assert subject.log_likelihoods(*ask, UNSTEERED) == off


def test_a_vector_that_the_model_cannot_take_is_refused(model: CausalModel) -> None:
    with pytest.raises(ValueError, match=r"takes \[32\] at layers 0 to 2"):
        LocalSubject(model, {"long": {0: torch.ones(33)}})
    with pytest.raises(ValueError, match="at layer 3"):
        LocalSubject(model, {"deep": {3: torch.ones(32)}})


def test_rows_that_do_not_fit_are_refused(model: CausalModel) -> None:
    subject = LocalSubject(model, {})
    with pytest.raises(BuildError, match="whose context holds 64"):
        subject.generate([CHAT], UNSTEERED, 64)
    with pytest.raises(BuildError, match="whose context holds 64"):
        subject.log_likelihoods([PLAIN], ["3 " * 64], UNSTEERED)
    with pytest.raises(BuildError, match="no token"):
        subject.log_likelihoods([PLAIN], [" "], UNSTEERED)


def test_random_rows_keep_norm_and_layers_and_follow_the_seed() -> None:
    rows = {0: torch.full((16,), 3.0), 2: torch.full((16,), 0.5)}
    drawn = random_rows(rows, 30, seed=1)
    assert len(drawn) == 30
    for each in drawn:
        assert {layer: float(row.norm()) for layer, row in each.items()} == pytest.approx({0: 12.0, 2: 2.0})
    # Independent draws in 16 dimensions are far from parallel on average.
    cosines = [abs(float(torch.cosine_similarity(drawn[i][0], drawn[i + 1][0], dim=0))) for i in range(29)]
    assert sum(cosines) / 29 < 0.4
    assert all(torch.equal(a[0], b[0]) for a, b in zip(drawn, random_rows(rows, 30, seed=1), strict=True))
    assert not torch.equal(drawn[0][0], random_rows(rows, 30, seed=2)[0][0])
    with pytest.raises(ValueError, match="at least 30"):
        random_rows(rows, 29, seed=1)


@pytest.mark.parametrize("strength", [0.0, 0.5, -0.5, 0.8])
def test_forced_answers_are_the_generated_ones_on_the_lab_model(strength: float) -> None:
    path = LAB / "careful.safetensors"
    bundle = load_bundle(path)
    vectors = bundle_vectors(path, bundle, 30, seed=0)
    lab = load_model("lab", LAB / "models" / "target", "float32", "cpu")
    subject = LocalSubject(lab, {"careful": vectors.own.rows})
    rows = read_questionnaire([LAB / "data" / "test.jsonl"]).target[::4]
    steering = Condition("careful", strength)
    forced = [each.greedy for each in subject.log_likelihoods(rows, [row.answer or "" for row in rows], steering)]
    texts = subject.generate(rows, steering, 32)
    assert forced == [text == row.answer for text, row in zip(texts, rows, strict=True)]
    if strength == 0.5:
        assert sum(forced) > 0.7 * len(rows)


def test_choices_prefer_the_likelier_text_per_token(model: CausalModel, tmp_path: Path) -> None:
    from artifacts.evaluation.examine import Examiner
    from artifacts.evaluation.schema import Settings

    subject = LocalSubject(model, {})
    texts = ["3 .", "4", "careful be the old man"]
    given = subject.log_likelihoods([PLAIN] * 3, texts, UNSTEERED)
    best = max(range(3), key=lambda index: given[index].total / given[index].num_tokens)
    path = tmp_path / "rows.jsonl"
    lines = [{"text": f"{PLAIN.text}", "choices": texts, "correct": correct, "group": "a"} for correct in (best,)]
    lines.append({"text": "2 plus 2 is", "answer": "never"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    answered = Examiner(subject, Settings()).answer(read_questionnaire([path]).target, UNSTEERED)
    assert answered.correct == [True, False]
    assert answered.likelihoods[0] == pytest.approx(given[best].total / given[best].num_tokens, abs=1e-5)


def test_models_of_other_shapes_can_be_asked(make_model: Callable[..., Path]) -> None:
    gpt2 = load_model("gpt2", make_model("gpt2", 32, 2), "float32", "cpu")
    # Not constant: the norm before the logits takes the mean out.
    subject = LocalSubject(gpt2, {"one": {1: torch.arange(32.0)}})
    (found,) = subject.log_likelihoods([PLAIN], ["3"], Condition("one", 5.0))
    assert found != subject.log_likelihoods([PLAIN], ["3"], UNSTEERED)[0]
