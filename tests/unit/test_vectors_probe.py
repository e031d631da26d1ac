"""Linear probes: closed forms, ridge tuning, and the data that are refused."""

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from artifacts.vectors.coordinates import rotated, whitened
from artifacts.vectors.lda import fit_lda
from artifacts.vectors.logistic import fit_logistic, fixed_ridge_probe
from artifacts.vectors.pca import fit_pca, paired_differences
from artifacts.vectors.refusal import (
    NoSignalError,
    area_interval,
    require_classes,
    require_finite,
    require_signal,
)
from artifacts.vectors.rfm import fit_rfm


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _classes(num_rows: int, width: int, gap: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two Gaussian classes in turn, `gap` apart along the first axis, away from the origin."""
    labels = torch.arange(num_rows) % 2
    states = _random(num_rows, width, seed=seed) + 3
    states[:, 0] += gap * labels
    return states, labels


def test_coordinates_have_unit_variance_and_map_back() -> None:
    states = _random(80, 12) @ _random(12, 30, seed=1) + 5
    white, plain = whitened(states, 100), rotated(states, 100)
    torch.testing.assert_close(white.of(states).var(0), torch.ones(12, dtype=torch.float64))
    assert float(plain.of(states).var(0).mean()) == pytest.approx(1.0)
    difference, inner = plain.of(states[:1]) - plain.of(states[1:2]), (states[0] - states[1]).double()
    # One common scale keeps lengths in proportion.
    assert float(difference.norm() * plain.scale[0]) == pytest.approx(float(inner.norm()))
    vector = _random(12, seed=2).double()
    for coordinates in (white, plain):
        centred = states.double() - states.double().mean(0)
        torch.testing.assert_close(centred @ coordinates.covector(vector), coordinates.of(states) @ vector)
        moved = states.double() + coordinates.displacement(vector)
        torch.testing.assert_close(coordinates.of(moved), coordinates.of(states) + vector)


def test_logistic_in_coordinates_is_the_ridge_regression_of_the_states() -> None:
    states, labels = _classes(60, 20, 1.5)
    probe = fixed_ridge_probe(states, labels, 0.1, 100)
    scale = float(rotated(states, 100).scale[0])
    reference = LogisticRegression(C=1 / (0.1 * 60), tol=1e-9, max_iter=5000)
    reference.fit(states.double().numpy() / scale, labels.numpy())
    np.testing.assert_allclose(probe.weight.numpy(), reference.coef_[0] / scale, atol=2e-4)
    expected = reference.predict_proba(states.double().numpy() / scale)[:, 1]
    np.testing.assert_allclose(probe.probabilities(states).numpy(), expected, atol=1e-3)
    torch.testing.assert_close(probe.direction, (probe.weight / probe.weight.norm()).float())


def test_logistic_takes_more_rows_than_dimensions_and_fewer() -> None:
    states, labels = _classes(40, 300, 6.0)
    probe = fixed_ridge_probe(states, labels, 1e-2, 64)
    assert float(((probe.log_odds(states) > 0) == labels.bool()).double().mean()) == 1.0


def test_ridge_follows_the_noise() -> None:
    """Few noisy rows want a strong ridge, a clean concept with many rows a weak one."""
    noisy, held = _classes(60, 50, 0.8), _classes(400, 50, 0.8, seed=1)
    clean, clean_held = _classes(2000, 5, 6.0), _classes(400, 5, 6.0, seed=1)
    strong = fit_logistic(*noisy, *held, 50)
    weak = fit_logistic(*clean, *clean_held, 50)
    assert strong.ridge >= 1e-1 > 1e-2 >= weak.ridge
    assert strong.log_losses[strong.ridge] == min(strong.log_losses.values())


def test_discriminant_is_that_of_the_states() -> None:
    """With many rows next to nothing is shrunk, and the classical closed form results."""
    mixing = torch.linalg.qr(_random(6, 6, seed=5)).Q * torch.tensor([3.0, 2, 1, 1, 0.5, 0.5])
    labels = torch.arange(4000) % 2
    states = _random(4000, 6) @ mixing + labels[:, None] * torch.tensor([0.0, 0, 1, 0, 0, 1])
    probe = fit_lda(states, labels, 6)
    reference = LinearDiscriminantAnalysis(solver="lsqr").fit(states.numpy(), labels.numpy())
    expected = torch.from_numpy(reference.coef_[0]).double()
    assert float(probe.direction.double() @ expected / expected.norm()) > 0.999
    agreement = (probe.log_odds(states) > 0).numpy() == reference.predict(states.numpy()).astype(bool)
    assert agreement.mean() > 0.99


def test_discriminant_does_not_follow_axes_of_next_to_no_variance() -> None:
    states, labels = _classes(200, 20, 2.0)
    wide = torch.cat([states, 1e-3 * _random(200, 60, seed=4)], dim=1)
    assert float(fit_lda(wide, labels, 64).direction[0]) > 0.8


def test_paired_differences_are_means_within_groups() -> None:
    states = torch.tensor([[1.0, 0], [3, 0], [0, 1], [5, 5], [0, 7]])
    labels, groups = torch.tensor([1, 1, 0, 1, 0]), torch.tensor([4, 4, 4, 2, 9])
    assert paired_differences(states, labels, groups).tolist() == [[2.0, -1.0]]


def test_states_that_do_not_depend_on_the_label_have_no_component() -> None:
    states = _random(4, 3).repeat_interleave(2, dim=0)
    with pytest.raises(ValueError, match="do not depend on the label"):
        fit_pca(states, torch.tensor([0, 1] * 4), torch.arange(8) // 2)


def test_states_that_are_not_finite_are_refused_by_every_estimator() -> None:
    states, labels = _classes(60, 40, 1.0)
    broken = states.clone()
    broken[17, 3] = float("nan")
    broken[40, 0] = float("inf")
    groups = torch.arange(60)
    with pytest.raises(ValueError, match=r"2 of 60 rows hold NaN or infinity, the first is row 17"):
        require_finite(broken)
    for fit in (
        lambda: fit_rfm(states, labels, broken, labels, 32, 1, 0),
        lambda: fit_logistic(broken, labels, states, labels, 32),
        lambda: fixed_ridge_probe(broken, labels, 1.0, 32),
        lambda: fit_lda(broken, labels, 32),
        lambda: fit_pca(broken, labels, groups),
    ):
        with pytest.raises(ValueError, match="rows hold NaN"):
            fit()


def test_one_class_is_refused_by_every_estimator() -> None:
    states, labels = _classes(60, 40, 1.0)
    ones = torch.ones(60, dtype=torch.int64)
    for fit in (
        lambda: fit_rfm(states, ones, states, labels, 32, 1, 0),
        lambda: fit_logistic(states, labels, states, ones, 32),
        lambda: fit_lda(states, ones, 32),
        lambda: fit_pca(states, ones, torch.arange(60)),
    ):
        with pytest.raises(ValueError, match="60 rows with label 1 and 0 with label 0"):
            fit()
    with pytest.raises(ValueError, match="1 of 3 labels are neither"):
        require_classes(torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="at least 2"):
        require_classes(torch.tensor([0, 1, 1]), least=2)


def test_area_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Normal classes one standard deviation apart: area = Phi(1 / sqrt 2) = 0.7602."""
    covered = 0
    for seed in range(300):
        states, labels = _classes(60, 1, 1.0, seed=seed)
        area = area_interval(states[:, 0], labels)
        assert 0 <= area.low < area.value < area.high <= 1
        covered += area.low <= 0.7602 <= area.high
    assert 0.92 < covered / 300 < 0.98


def test_more_confidence_is_a_wider_interval() -> None:
    states, labels = _classes(60, 1, 1.0)
    usual, strict = area_interval(states[:, 0], labels), area_interval(states[:, 0], labels, 1 - 0.05 / 32)
    assert strict.low < usual.low < usual.value < usual.high < strict.high
    assert strict.value == usual.value


def test_perfect_separation_of_few_rows_is_not_certainty() -> None:
    few = area_interval(torch.tensor([0.0, 1, 2, 3]), torch.tensor([0, 0, 1, 1]))
    assert (few.value, few.high) == (1.0, 1.0)
    assert few.low < 0.5
    many = area_interval(torch.arange(40.0), (torch.arange(40) >= 20).long())
    assert many.low > 0.8
    mirrored = area_interval(-torch.arange(40.0), (torch.arange(40) >= 20).long())
    assert (mirrored.low, mirrored.high) == (0.0, pytest.approx(1 - many.low))


def test_an_expert_without_signal_is_refused_with_the_figure() -> None:
    states, labels = _classes(200, 10, 0.0)
    with pytest.raises(NoSignalError, match=r"expert layer 3: .* of 0\.\d{3}, 95 % interval .* not above chance"):
        require_signal(states[:, 0], labels, "expert layer 3")
    reversed_states, reversed_labels = _classes(200, 10, 2.0)
    with pytest.raises(NoSignalError):
        require_signal(-reversed_states[:, 0], reversed_labels, "expert layer 3")
    assert require_signal(reversed_states[:, 0], reversed_labels, "expert layer 3").above_chance
