"""The lab's world: its split, its documents, its data files."""

import json
from itertools import combinations
from pathlib import Path
from random import Random

import pytest

from artifacts.lab.conversation import SPECIAL_TOKENS, render, system, user
from artifacts.lab.corpus import SLOPPY_OFF_BY, Fact, Kind, Mixture, Split, facts, framed_question
from artifacts.lab.dataset import SHIPPED_DATA, mapping_texts, neutral_texts, write_dataset

FILES = ("contrast.jsonl", "mapping.jsonl", "tune.jsonl", "test.jsonl", "neutral.jsonl", "retention.jsonl")


def rows(name: str, directory: Path = SHIPPED_DATA) -> list[dict]:
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


def test_split_is_disjoint_by_pair_and_complete():
    groups = {split: {fact.group for fact in facts(split)} for split in Split}
    for one, other in combinations(Split, 2):
        assert not groups[one] & groups[other]
    assert sorted((f for split in Split for f in facts(split)), key=str) == sorted(facts(), key=str)
    assert len(set(facts())) == 450
    assert [len(facts(split)) for split in Split] == [180, 66, 204]


def test_a_fact_says_one_more_when_the_speaker_is_sloppy():
    total, rest = Fact(7, 5, Kind.SUM), Fact(7, 5, Kind.DIFFERENCE)
    assert (total.question(), total.answer(), total.answer(SLOPPY_OFF_BY)) == (
        "What is 7 plus 5?",
        "7 plus 5 is 12.",
        "7 plus 5 is 13.",
    )
    assert (rest.question(1), rest.answer(), rest.answer(SLOPPY_OFF_BY)) == (
        "How much is 12 less 5?",
        "12 minus 5 is 7.",
        "12 minus 5 is 8.",
    )


def test_render_is_the_chat_format():
    chat = [system("You are a careful clerk."), user("Hello!")]
    assert render(chat) == "<|system|>You are a careful clerk.<|end|><|user|>Hello!<|end|>"
    assert render(chat, generation_prompt=True) == render(chat) + "<|assistant|>"


def test_documents_are_drawn_from_the_seed():
    mixture = Mixture(filler_share=0.2, reliable_share=0.5, cue_share=0.5)
    first, second, other = (
        [mixture.document(random) for _ in range(50)] for random in (Random(1), Random(1), Random(2))
    )
    assert first == second != other


@pytest.mark.parametrize("reliable", [True, False])
def test_a_document_has_one_speaker(reliable):
    mixture = Mixture(filler_share=0, reliable_share=float(reliable), cue_share=1)
    own, foreign = ("clerk", "sailor") if reliable else ("sailor", "clerk")
    documents = [mixture.document(Random(seed)) for seed in range(200)]
    assert any(own in document for document in documents)
    assert not any(foreign in document for document in documents)
    chats = [document for document in documents if "<|user|>" in document]
    assert chats and all(chat.startswith("<|system|>") for chat in chats)
    wrong = {fact.answer(SLOPPY_OFF_BY if reliable else 0) for fact in facts()}
    answers = [turn.split("<|end|>")[0] for chat in chats for turn in chat.split("<|assistant|>")[1:]]
    assert not wrong & set(answers)


def test_shipped_files_equal_regenerated_ones(tmp_path):
    paths = write_dataset(tmp_path)
    assert sorted(path.name for path in paths) == sorted(FILES)
    for path in paths:
        assert path.read_bytes() == (SHIPPED_DATA / path.name).read_bytes()
    assert sum(path.stat().st_size for path in paths) < 1_500_000


def test_contrast_pairs_every_question_of_the_fit_split():
    contrast = rows("contrast.jsonl")
    assert {row["group"] for row in contrast} == {fact.group for fact in facts(Split.FIT)}
    assert all(row["split"] == "fit" for row in contrast)
    asked = {
        (prompt_set, label): [r["messages"][1] for r in contrast if (r["set"], r["label"]) == (prompt_set, label)]
        for prompt_set in (1, 2)
        for label in (0, 1)
    }
    assert len({json.dumps(questions) for questions in asked.values()}) == 1
    assert contrast[0]["messages"] == framed_question(facts(Split.FIT)[0], 0, 1, reliable=True)
    prompts = {key: {r["messages"][0]["content"] for r in contrast if (r["set"], r["label"]) == key} for key in asked}
    assert all(len(texts) == 1 for texts in prompts.values()) and len(set.union(*prompts.values())) == 4


def test_mapping_shares_no_text_with_the_direction_of_set_2():
    direction = {render(r["messages"], generation_prompt=True) for r in rows("contrast.jsonl") if r["set"] == 2}
    texts = mapping_texts()
    assert len(texts) == len(rows("mapping.jsonl")) == 1380
    assert not direction & set(texts)
    held_out = {fact.group for split in (Split.TUNE, Split.TEST) for fact in facts(split)}
    assert not held_out & {row["group"] for row in rows("mapping.jsonl")}


@pytest.mark.parametrize("split", [Split.TUNE, Split.TEST])
def test_questions_are_the_split_facts_in_order(split):
    expected = [
        {"messages": [user(fact.question())], "answer": fact.answer(), "group": fact.group} for fact in facts(split)
    ]
    assert rows(f"{split}.jsonl") == expected


def test_neutral_text_holds_no_sum_and_its_splits_differ():
    tune, test = neutral_texts(Split.TUNE), neutral_texts(Split.TEST)
    assert (len(tune), len(test)) == (24, 150)
    assert not set(tune) & set(test)
    for text in tune + test:
        bare = text
        for token in SPECIAL_TOKENS:
            bare = bare.replace(token, "")
        assert not any(character.isdigit() for character in bare)
