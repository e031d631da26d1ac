"""Directions: closed forms, the sign rule, and a concept that only the Recursive Feature Machine finds."""

import pytest
import torch
from torch import Tensor

from artifacts.vectors.difference import difference_of_means, unit
from artifacts.vectors.rfm import fit_rfm, power_iteration
from artifacts.vectors.score import SignError, area_under_curve, direction_sign, signed_correlation

WIDTH = 384
RANK = 40


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _low_rank(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """States of low rank in a wide space, the factors behind them, and the axis of the factor that is the concept."""
    generator = _generator(seed)
    basis = torch.linalg.qr(torch.randn(WIDTH, RANK, generator=generator)).Q
    factors = torch.randn(900, RANK, generator=generator)
    states = factors * torch.linspace(3, 0.5, RANK) @ basis.T + 0.01 * torch.randn(900, WIDTH, generator=generator)
    return states + 2, factors[:, 7], basis[:, 7]


def test_difference_of_means_is_a_unit_vector_towards_label_one() -> None:
    states = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    direction = difference_of_means(states, torch.tensor([1, 1, 0]))
    torch.testing.assert_close(direction, torch.tensor([2.0, -4.0]) / 20**0.5)
    assert direction.dtype == torch.float32


def test_difference_of_means_needs_both_labels_and_a_difference() -> None:
    with pytest.raises(ValueError, match="0 with label 0"):
        difference_of_means(torch.ones(2, 3), torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="norm 0"):
        difference_of_means(torch.ones(2, 3), torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="norm nan"):
        unit(torch.tensor([float("nan")]))


def test_area_under_curve_counts_ordered_pairs() -> None:
    projection = torch.randint(0, 6, (60,), generator=_generator(0)).float()
    labels = torch.randint(0, 2, (60,), generator=_generator(1))
    positive, negative = projection[labels == 1], projection[labels == 0]
    wins = (positive[:, None] > negative).double() + 0.5 * (positive[:, None] == negative).double()
    assert area_under_curve(projection, labels) == pytest.approx(float(wins.mean()))
    with pytest.raises(ValueError, match="at least one"):
        area_under_curve(projection, torch.ones(60))


def test_sign_follows_the_correlation() -> None:
    labels = torch.tensor([0, 1] * 50)
    projection = labels + torch.randn(100, generator=_generator(0))
    assert direction_sign(projection, labels) == 1
    assert direction_sign(-projection, labels) == -1
    # Data that show a sign outweigh one that is given.
    assert direction_sign(-projection, labels, given=1) == -1
    correlation = signed_correlation(projection, labels)
    assert correlation.low < correlation.value < correlation.high
    assert correlation.value == pytest.approx(float(torch.corrcoef(torch.stack([projection, labels.float()]))[0, 1]))


def test_a_direction_without_sign_is_refused_unless_given() -> None:
    labels = torch.tensor([0, 1] * 50)
    projection = torch.randn(100, generator=_generator(1))
    projection = projection - projection[labels == 1].mean() * labels - projection[labels == 0].mean() * (1 - labels)
    with pytest.raises(SignError, match="covers 0"):
        direction_sign(projection, labels)
    assert {direction_sign(projection, labels, given=sign) for sign in (1, -1)} == {1, -1}


def test_constant_projection_has_no_sign() -> None:
    with pytest.raises(SignError):
        direction_sign(torch.ones(10), torch.tensor([0, 1] * 5))


def test_power_iteration_finds_the_top_eigenvector() -> None:
    factor = torch.randn(30, 30, generator=_generator(0), dtype=torch.float64)
    matrix = factor @ factor.T
    expected = torch.linalg.eigh(matrix).eigenvectors[:, -1]
    assert abs(float(power_iteration(matrix) @ expected)) == pytest.approx(1.0, abs=1e-9)
    with pytest.raises(ValueError, match="no direction"):
        power_iteration(torch.zeros(3, 3))


@pytest.mark.parametrize("kind", ["linear", "quadratic"])
def test_machine_finds_the_concept(kind: str) -> None:
    states, factor, axis = _low_rank(0)
    labels = (factor > 0 if kind == "linear" else factor.square() > 1).long()
    vectors = fit_rfm(states[:750], labels[:750], states[750:], labels[750:], 64, 5, 0, sign=1)
    assert abs(float(vectors.displacement @ axis)) > 0.95
    if kind == "linear":
        assert float(vectors.displacement @ axis) > 0
    else:
        # The reason for the machine: means do not differ along this axis.
        assert abs(float(difference_of_means(states, labels) @ axis)) < 0.5
    for direction in (vectors.covector, vectors.displacement):
        assert float(direction.norm()) == pytest.approx(1.0, abs=1e-5)
        assert direction.dtype == torch.float32
    assert float(vectors.eigenvalues.sum()) == pytest.approx(1.0, abs=1e-5)
    assert float(vectors.eigenvalues[0]) > 0.8
    assert torch.equal(vectors.eigenvalues, vectors.eigenvalues.sort(descending=True).values)


def test_machine_uses_what_the_best_iteration_learnt() -> None:
    """With one iteration the best is the first, whose own matrix is still the identity and points nowhere."""
    states, factor, axis = _low_rank(1)
    labels = (factor > 0).long()
    vectors = fit_rfm(states[:750], labels[:750], states[750:], labels[750:], 64, 1, 0)
    assert float(vectors.displacement @ axis) > 0.9


def test_machine_is_deterministic_and_leaves_the_global_generator_alone() -> None:
    states, factor, _ = _low_rank(2)
    labels = (factor > 0).long()
    before = torch.random.get_rng_state()
    first, second = (fit_rfm(states[:300], labels[:300], states[300:], labels[300:], 32, 3, 0) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first.covector, second.covector)
    assert torch.equal(first.displacement, second.displacement)


def test_machine_refuses_an_unsigned_concept_and_wrong_bounds() -> None:
    states, factor, _ = _low_rank(3)
    labels = (factor.square() > 1).long()
    with pytest.raises(SignError):
        fit_rfm(states[:750], labels[:750], states[750:], labels[750:], 64, 3, 0)
    with pytest.raises(ValueError, match="32 to 128"):
        fit_rfm(states, labels, states, labels, 16, 3, 0)
