"""The second world: evidence adds up, and no single word tells the label."""

from collections import Counter
from random import Random

import pytest

from artifacts.lab.corpus import facts
from artifacts.lab.nonlinear.contrast import QUADRUPLE, draw_contrast
from artifacts.lab.two_sided import Speaker, TwoSidedMixture, draw_speaker


def test_evidence_of_four_words_adds_up():
    shares = [draw_speaker(Random(0), num_for).reliable_share for num_for in range(5)]
    assert shares == sorted(shares) and shares[2] == 0.5
    assert shares[0] == pytest.approx(1 - shares[4]) == pytest.approx(0.018, abs=1e-3)
    assert [draw_speaker(Random(0), num_for).evidence for num_for in range(5)] == [-4, -2, 0, 2, 4]


def test_a_speaker_has_four_different_words():
    for seed in range(200):
        speaker = draw_speaker(Random(seed), seed % 5)
        assert len({*speaker.adjectives, *speaker.objects}) == 4
        assert all(word in speaker.prompt for word in (*speaker.adjectives, *speaker.objects))


def test_words_for_and_against_are_never_the_same():
    for_it = {word for seed in range(300) for part in draw_speaker(Random(seed), 4)[:2] for word in part}
    against = {word for seed in range(300) for part in draw_speaker(Random(seed), 0)[:2] for word in part}
    assert not for_it & against
    assert len(for_it) == len(against) == 12


def test_no_word_tells_the_label():
    contrast = draw_contrast(Random(1), 50)
    assert len(contrast.texts) == 50 * QUADRUPLE
    assert contrast.labels.tolist() == [1, 1, 0, 0] * 50
    assert contrast.evidence.tolist() == [4, -4, 0, 0] * 50
    counts = {
        label: Counter(
            word
            for text, own in zip(contrast.texts, contrast.labels.tolist(), strict=True)
            if own == label
            for word in text.split()
        )
        for label in (0, 1)
    }
    assert counts[0] == counts[1]


def test_known_introductions_are_left_out():
    first = draw_contrast(Random(1), 50)
    assert set(first.texts) & set(draw_contrast(Random(1), 50).texts)
    assert not set(first.texts) & set(draw_contrast(Random(1), 50, frozenset(first.texts)).texts)


def test_an_introduction_names_all_four_words():
    assert Speaker(("old", "tired"), ("lamp", "coin"), 2).prompt == "You are old and tired, with a lamp and a coin."


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_cue_share_decides_who_is_introduced(share):
    mixture = TwoSidedMixture(filler_share=0, reliable_share=0.3, cue_share=share)
    documents = [mixture.document(Random(seed)) for seed in range(50)]
    assert {"You are" in document for document in documents} == {share == 1.0}
    assert {"<|user|>" in document for document in documents} == {True, False}


def test_a_document_has_one_speaker():
    exact, sloppy = {fact.answer() for fact in facts()}, {fact.answer(1) for fact in facts()}
    mixture = TwoSidedMixture(filler_share=0, reliable_share=0.5, cue_share=0.5)
    kinds = set()
    for seed in range(200):
        said = {turn.split("<|end|>")[0] for turn in mixture.document(Random(seed)).split("<|assistant|>")[1:]}
        if said:
            assert said <= exact or said <= sloppy
            kinds.add(said <= exact)
    assert kinds == {True, False}


def test_documents_are_drawn_from_the_seed():
    mixture = TwoSidedMixture(filler_share=0.2, reliable_share=0.4, cue_share=0.5)
    first, second, other = (mixture.document(Random(seed)) for seed in (1, 1, 2))
    assert first == second != other
