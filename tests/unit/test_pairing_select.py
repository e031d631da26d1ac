"""Which layer pairs are chosen, and in which order."""

import pytest
import torch

from artifacts.pairing.information import LayerInformation
from artifacts.pairing.select import first_of_each, pairs_by_depth, pairs_by_information

EXPERT, TARGET = (1, 3), (0, 2, 4)


def _information(value: list[list[float]], q: list[list[float]], p: float = 0.02) -> LayerInformation:
    values = torch.tensor(value, dtype=torch.float64)
    return LayerInformation(
        values,
        values + 1,
        torch.ones_like(values),
        torch.full_like(values, p),
        torch.tensor(q, dtype=torch.float64),
        100,
    )


INFORMATION = _information([[0.01, 3.0, 2.0], [1.0, 5.0, 9.0]], [[0.6, 0.01, 0.05], [0.02, 0.01, 0.06]])


def test_low_comes_first_among_significant_pairs_only() -> None:
    assert pairs_by_information(INFORMATION, EXPERT, TARGET, "low-mi") == [(3, 0), (1, 4), (1, 2), (3, 2)]


def test_high_is_the_reverse() -> None:
    assert pairs_by_information(INFORMATION, EXPERT, TARGET, "high-mi") == [(3, 2), (1, 2), (1, 4), (3, 0)]


def test_level_decides_what_counts() -> None:
    assert pairs_by_information(INFORMATION, EXPERT, TARGET, "low-mi", level=0.01) == [(1, 2), (3, 2)]
    assert len(pairs_by_information(INFORMATION, EXPERT, TARGET, "low-mi", level=0.99)) == 6


def test_one_to_one_takes_every_layer_once() -> None:
    chosen = pairs_by_information(INFORMATION, EXPERT, TARGET, "low-mi", one_to_one=True)
    assert chosen == [(3, 0), (1, 4)]
    assert first_of_each(chosen) == chosen


def test_no_significant_pair_is_an_error_with_the_smallest_q() -> None:
    nothing = _information([[1.0, 1.0]], [[0.4, 0.213]])
    with pytest.raises(ValueError, match=r"none of 2 layer pairs .* smallest q is 0\.213, the bound 0\.05"):
        pairs_by_information(nothing, (0,), (0, 1), "high-mi")
    coarse = _information([[1.0, 1.0]], [[0.4, 0.213]], p=1 / 101)
    with pytest.raises(ValueError, match="more than 100 permutations"):
        pairs_by_information(coarse, (0,), (0, 1), "low-mi")


def test_layers_must_fit_the_matrix() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) for 3 expert and 3 target"):
        pairs_by_information(INFORMATION, (0, 1, 2), TARGET, "low-mi")


def test_same_depth_starts_in_the_middle_and_meets_at_the_ends() -> None:
    pairs = pairs_by_depth(range(4), range(7), 4, 7)
    # Relative depths: expert 0, 1/3, 2/3, 1; target layer / 6.
    assert pairs == [(1, 3), (1, 2), (2, 4), (0, 1), (2, 5), (0, 0), (3, 6)]
    assert pairs_by_depth(range(4), range(7), 4, 7, one_to_one=True) == [(1, 3), (2, 4), (0, 1), (3, 6)]


def test_same_depth_uses_only_the_given_layers() -> None:
    assert pairs_by_depth([0, 31], [5, 6], 32, 12) == [(0, 5), (31, 6)]
    assert pairs_by_depth([0], [0], 1, 1) == [(0, 0)]
