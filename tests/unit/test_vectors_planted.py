"""Planted concepts: which estimator finds a linear one, and which a quadratic one in low-rank states."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from artifacts.vectors.difference import difference_of_means
from artifacts.vectors.lda import fit_lda
from artifacts.vectors.logistic import fit_logistic
from artifacts.vectors.pca import fit_pca
from artifacts.vectors.rfm import best_agop, fit_rfm, power_iteration
from artifacts.vectors.score import SignError

WIDTH, RANK, NUM_FIT, NUM_HELD = 1024, 40, 800, 250
CONCEPT = 7
COMPONENTS = 64


@dataclass(frozen=True)
class Planted:
    """States of a low-rank residual stream with isotropic noise, and the axis of the factor that sets the labels.

    The noise is weak in each dimension and strong in their sum, as in a wide model: a kernel on raw states sees little
    else.
    """

    states: Tensor
    labels: Tensor
    axis: Tensor

    def cosine(self, direction: Tensor) -> float:
        """Signed where the concept has a sign."""
        assert direction.dtype == torch.float32
        assert float(direction.norm()) == pytest.approx(1.0, abs=1e-5)
        return float(direction @ self.axis)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.states[:NUM_FIT], self.labels[:NUM_FIT], self.states[NUM_FIT:], self.labels[NUM_FIT:]


def _planted(kind: str, seed: int) -> Planted:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(WIDTH, RANK, generator=generator)).Q
    factors = torch.randn(NUM_FIT + NUM_HELD, RANK, generator=generator)
    noise = 0.25 * torch.randn(NUM_FIT + NUM_HELD, WIDTH, generator=generator)
    states = 2 + factors * torch.linspace(2, 1, RANK) @ basis.T + noise
    factor = factors[:, CONCEPT]
    # 0.4549 is the median of a squared standard normal: both classes are equally large.
    labels = (factor > 0 if kind == "linear" else factor.square() > 0.4549).long()
    return Planted(states, labels, basis[:, CONCEPT])


@pytest.fixture(scope="module")
def linear() -> Planted:
    return _planted("linear", 0)


@pytest.fixture(scope="module")
def quadratic() -> Planted:
    return _planted("quadratic", 1)


def test_every_estimator_finds_a_linear_concept(linear: Planted) -> None:
    states, labels, _, _ = linear.parts
    machine = fit_rfm(*linear.parts, COMPONENTS, 5, 0)
    assert linear.cosine(machine.displacement) > 0.95
    assert linear.cosine(machine.covector) > 0.8
    assert linear.cosine(difference_of_means(states, labels)) > 0.95
    assert linear.cosine(fit_logistic(*linear.parts, COMPONENTS).probe.direction) > 0.9
    assert linear.cosine(fit_lda(states, labels, COMPONENTS).direction) > 0.9


def test_paired_differences_give_their_principal_component(linear: Planted) -> None:
    """Each group once with and once without the concept, with more variance of its own than the concept adds."""
    generator = torch.Generator().manual_seed(2)
    content = linear.states[:200]
    shift = 1.5 + 0.3 * torch.randn(200, 1, generator=generator)
    jitter = 0.1 * torch.randn(200, WIDTH, generator=generator)
    states = torch.cat([content, content + shift * linear.axis + jitter])
    labels = torch.arange(400) // 200
    paired, own = torch.arange(400) % 200, torch.arange(400)
    assert linear.cosine(fit_pca(states, labels, paired)) > 0.95
    # Without pairs the content's own variance wins.
    assert abs(linear.cosine(fit_pca(states, labels, own, sign=1))) < 0.9


def test_unpaired_component_is_about_the_midpoint_of_the_classes() -> None:
    """A class nine times as large moves the mean, and may not move the axis."""
    generator = torch.Generator().manual_seed(3)
    labels = (torch.arange(1000) >= 900).long()
    states = 0.5 * torch.randn(1000, 30, generator=generator)
    states[:, 0] += 4.0 * labels - 2
    states[:, 1] += 10
    direction = fit_pca(states, labels, torch.arange(1000))
    assert float(direction[0]) > 0.99


def test_only_the_machine_finds_a_quadratic_concept(quadratic: Planted) -> None:
    states, labels, _, _ = quadratic.parts
    machine = fit_rfm(*quadratic.parts, COMPONENTS, 5, 0, sign=1)
    assert abs(quadratic.cosine(machine.displacement)) > 0.95
    assert float(machine.eigenvalues[0]) > 0.8
    others = {
        "difference of means": difference_of_means(states, labels),
        "logistic": fit_logistic(*quadratic.parts, COMPONENTS, sign=1).probe.direction,
        "lda": fit_lda(states, labels, COMPONENTS, sign=1).direction,
        "pca": fit_pca(states, labels, torch.arange(NUM_FIT), sign=1),
    }
    for name, direction in others.items():
        assert abs(quadratic.cosine(direction)) < 0.3, name


def test_the_machine_fails_on_raw_states(quadratic: Planted) -> None:
    """The reason for whitening: 800 rows are far from 15 per dimension."""
    states, labels, held, held_labels = quadratic.parts
    raw = power_iteration(best_agop(states.double(), labels, held.double(), held_labels, 5, 0))
    assert abs(float(raw @ quadratic.axis.double())) < 0.3


def test_a_quadratic_concept_has_no_sign(quadratic: Planted) -> None:
    with pytest.raises(SignError, match="covers 0"):
        fit_rfm(*quadratic.parts, COMPONENTS, 5, 0)
    with pytest.raises(SignError, match="covers 0"):
        fit_logistic(*quadratic.parts, COMPONENTS)


def test_a_given_sign_counts_from_the_correlation(quadratic: Planted) -> None:
    up, down = (fit_rfm(*quadratic.parts, COMPONENTS, 5, 0, sign=sign) for sign in (1, -1))
    assert torch.equal(up.displacement, -down.displacement)
    states, labels, _, _ = quadratic.parts
    projection = (states - states.mean(0)) @ up.covector
    assert float(projection @ (labels - labels.double().mean()).float()) > 0
