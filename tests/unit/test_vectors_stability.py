"""Stability of directions, sensitivity to flipped labels, and planted label errors."""

import pytest
import torch
from torch import Tensor

from artifacts.vectors.difference import difference_of_means
from artifacts.vectors.lda import fit_lda
from artifacts.vectors.pca import fit_pca
from artifacts.vectors.score import SignError
from artifacts.vectors.stability import flip_sensitivity, group_numbers, stability
from artifacts.vectors.suspects import suspected_labels

WIDTH = 60


def _diffmean(states: Tensor, labels: Tensor, _groups: Tensor) -> Tensor:
    return difference_of_means(states, labels)


def _pairs(num_pairs: int, gap: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of rows, one of each class, `gap` apart along the first axis."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(2 * num_pairs) % 2
    states = torch.randn(2 * num_pairs, WIDTH, generator=generator)
    states[:, 0] += gap * labels
    return states, labels, torch.arange(2 * num_pairs) // 2


def test_groups_are_numbered_by_appearance() -> None:
    assert group_numbers(["b", "a", "b", "c"]).tolist() == [0, 1, 0, 2]


def test_a_concept_is_stable_and_noise_is_not() -> None:
    concept = stability(_diffmean, *_pairs(150, 3.0), resamples=20, seed=0)
    noise = stability(_diffmean, *_pairs(150, 0.0), resamples=20, seed=0)
    assert concept.low > 0.9
    assert concept.low <= concept.mean <= 1
    assert concept.halves > 0.8
    # The bootstrap shares rows with the full fit, the halves share none.
    assert 0.6 < noise.mean < 0.8
    assert abs(noise.halves) < 0.15


def test_stability_serves_any_estimator_and_keeps_pairs_together() -> None:
    states, labels, groups = _pairs(60, 4.0)
    seen = []

    def fit(states: Tensor, labels: Tensor, groups: Tensor) -> Tensor:
        seen.append((len(groups.unique()), groups.bincount().tolist()))
        return fit_pca(states, labels, groups)

    assert stability(fit, states, labels, groups, resamples=3, seed=0).mean > 0.9
    assert stability(lambda *rows: fit_lda(rows[0], rows[1], 32).direction, states, labels, groups, 3, 0).mean > 0.9
    # A pair drawn twice is two groups of one pair each, and halves hold half of the pairs.
    assert seen[0] == seen[1] == (60, [2] * 60)
    assert seen[2] == seen[3] == (30, [2] * 30)


def test_stability_is_deterministic() -> None:
    data = _pairs(40, 1.0)
    assert stability(_diffmean, *data, 5, 7) == stability(_diffmean, *data, 5, 7)
    assert stability(_diffmean, *data, 5, 7) != stability(_diffmean, *data, 5, 8)


def test_a_resample_without_sign_counts_as_no_agreement() -> None:
    states, labels, groups = _pairs(40, 3.0)

    def fit(rows: Tensor, labels: Tensor, _groups: Tensor) -> Tensor:
        if rows is not states:
            raise SignError("no sign")
        return difference_of_means(rows, labels)

    assert stability(fit, states, labels, groups, 3, 0) == (0.0, 0.0, 0.0)


def test_stability_needs_groups_of_both_classes() -> None:
    states, labels, _ = _pairs(4, 1.0)
    with pytest.raises(ValueError, match=r"1 group\(s\)"):
        stability(_diffmean, states, labels, torch.zeros(8, dtype=torch.int64), 3, 0)
    with pytest.raises(ValueError, match="held one class only"):
        stability(_diffmean, states, labels, labels, 3, 0)


def test_flipped_labels_hurt_more_the_more_there_are() -> None:
    data = _pairs(100, 1.0)
    flips = flip_sensitivity(_diffmean, *data, resamples=20, seed=0)
    assert [flip.share for flip in flips] == [0.05, 0.1, 0.2]
    cosines = [flip.cosine for flip in flips]
    assert 1 > cosines[0] > cosines[1] > cosines[2] > 0.5
    half = flip_sensitivity(_diffmean, *data, resamples=20, seed=0, shares=[0.5])
    assert abs(half[0].cosine) < 0.2


def test_planted_label_errors_are_found() -> None:
    states, labels, groups = _pairs(200, 6.0)
    planted = torch.arange(5, 400, 19)
    given = labels.clone()
    given[planted] = 1 - given[planted]
    suspects = suspected_labels(states, given, groups, 40, 0)
    found = set(suspects.rows.tolist())
    assert len(found & set(planted.tolist())) > 0.7 * len(planted)
    assert len(found - set(planted.tolist())) <= 2
    # The rule is a cautious one; the order is right beyond it.
    doubtful = suspects.all_probabilities.argsort()[: len(planted)]
    assert len(set(doubtful.tolist()) & set(planted.tolist())) > 0.9 * len(planted)
    assert torch.equal(suspects.probability, suspects.probability.sort().values)
    assert torch.equal(suspects.all_probabilities[suspects.rows], suspects.probability)
    assert bool((suspects.probability < 0.5).all())


def test_a_threshold_replaces_the_rule() -> None:
    states, labels, groups = _pairs(100, 2.0)
    suspects = suspected_labels(states, labels, groups, 40, 0, threshold=0.3)
    assert torch.equal(suspects.rows.sort().values, torch.nonzero(suspects.all_probabilities < 0.3).flatten())
    assert 0 < len(suspects.rows) < 50


def test_the_probe_never_sees_the_group_that_it_judges() -> None:
    """Every text occurs four times with a random label: a probe that saw its copies would know it."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(50, WIDTH, generator=generator)
    labels = torch.randint(0, 2, (50,), generator=generator).repeat_interleave(4)
    states, groups = texts.repeat_interleave(4, dim=0), torch.arange(50).repeat_interleave(4)
    honest = suspected_labels(states, labels, groups, 60, 0).all_probabilities
    leaking = suspected_labels(states, labels, torch.arange(200), 60, 0).all_probabilities
    assert float((honest > 0.5).double().mean()) < 0.65
    assert float((leaking > 0.5).double().mean()) > 0.9


def test_cross_validation_needs_two_groups_of_each_class() -> None:
    states, labels, _ = _pairs(10, 1.0)
    with pytest.raises(ValueError, match="1 groups with label 1 and 1 with label 0"):
        suspected_labels(states, labels, labels, 5, 0)
    with pytest.raises(ValueError, match="NaN"):
        suspected_labels(states * float("nan"), labels, labels, 5, 0)
