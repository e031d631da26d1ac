"""Two models that look at one latent world through mixings of their own: which aligner carries a concept across."""

from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

import pytest
import torch
from scipy.stats import ttest_1samp
from torch import Tensor

from artifacts.aligner.autoencoder import fit_autoencoder
from artifacts.aligner.axes import PrincipalAxes, principal_axes
from artifacts.aligner.fit import ALIGNERS, choose_regularisation, fit_aligner
from artifacts.aligner.quality import alignment_quality
from artifacts.aligner.ridge import r_squared

NUM_FACTORS, NUM_CONTRAST, NUM_HELD, NOISE = 24, 600, 200, 0.3
GRID = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
PAIRED = [name for name, each in ALIGNERS.items() if each.paired]
AUTOENCODER_SEEDS = range(16)


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.cosine_similarity(one.double(), other.double(), dim=0))


@dataclass(frozen=True)
class World:
    """Paired states of mapping texts, the expert's concept as it would be measured, and where it is in the target.

    Attributes:
        expert, target: [num_rows, size].
        held_expert, held_target: the same of other texts.
        measured: [expert_size], difference of the expert's means on texts that no aligner has seen.
        own: [target_size], the target's difference of means on yet other texts.
        truth: [target_size], the planted direction.
    """

    expert: Tensor
    target: Tensor
    held_expert: Tensor
    held_target: Tensor
    measured: Tensor
    own: Tensor
    truth: Tensor

    @cached_property
    def axes(self) -> PrincipalAxes:
        return principal_axes(self.expert, 1000)

    def cosine(self, method: str, target: Tensor | None = None) -> float:
        """Of the mapped concept with the planted one, pairs as they are or with other target rows."""
        paired = self.target if target is None else target
        value = choose_regularisation(method, self.axes, paired, self.held_expert, self.held_target, GRID)
        return _cosine(fit_aligner(method, self.axes, paired, value).direction(self.measured), self.truth)


def _world(expert_size: int, target_size: int, num_rows: int, noise: float = NOISE, seed: int = 0) -> World:
    """Factors are mixed at random, and each model weighs them in its own way (up to x1.5), as no rotation can undo."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def mixing(size: int) -> Tensor:
        weights = 1 + 0.5 * torch.rand(NUM_FACTORS, 1, generator=generator, dtype=torch.float64)
        return weights * normal(NUM_FACTORS, size) / size**0.5

    into_expert, into_target = mixing(expert_size), mixing(target_size)

    def seen(factors: Tensor, into: Tensor, offset: float) -> Tensor:
        return offset + factors @ into + noise * normal(len(factors), into.shape[1]) / into.shape[1] ** 0.5

    concept = normal(NUM_FACTORS)
    concept /= concept.norm()
    labels = torch.arange(NUM_CONTRAST) % 2

    def difference(into: Tensor) -> Tensor:
        states = seen(normal(NUM_CONTRAST, NUM_FACTORS) + 1.5 * labels[:, None] * concept, into, 2)
        return states[labels == 1].mean(0) - states[labels == 0].mean(0)

    fit, held = normal(num_rows, NUM_FACTORS), normal(NUM_HELD, NUM_FACTORS)
    return World(
        *(seen(fit, into_expert, 2), seen(fit, into_target, -3)),
        *(seen(held, into_expert, 2), seen(held, into_target, -3)),
        *(difference(into_expert), difference(into_target), concept @ into_target),
    )


@pytest.fixture(scope="module")
def world() -> World:
    """An expert wider than the target, and more rows than either is wide."""
    return _world(96, 64, 700)


def test_paired_methods_carry_the_concept(world: World) -> None:
    cosines = {method: world.cosine(method) for method in PAIRED}
    ceiling = _cosine(world.own, world.truth)
    assert 0.94 < ceiling < 0.99
    for method in ("ridge", "joint", "cca"):
        assert cosines[method] == pytest.approx(ceiling, abs=0.02)
    # A rotation cannot give the factors other weights.
    assert 0.85 < cosines["procrustes"] < cosines["ridge"] - 0.02


@pytest.mark.parametrize("method", PAIRED)
def test_permuted_pairs_carry_nothing(world: World, method: str) -> None:
    cosines = []
    for seed in range(12):
        order = torch.randperm(len(world.target), generator=torch.Generator().manual_seed(seed))
        fitted = fit_aligner(method, world.axes, world.target[order], 1e-2)
        cosines.append(_cosine(fitted.direction(world.measured), world.truth))
    assert abs(fmean(cosines)) < 0.2
    assert ttest_1samp(cosines, 0).pvalue > 0.05


def test_reconstruction_alone_is_no_better_than_a_random_direction(world: World) -> None:
    fitted = [fit_autoencoder(world.axes, world.target.mean(0), seed) for seed in AUTOENCODER_SEEDS]
    for each in fitted:
        rebuilt = each.decoder.states(each.encoder.states(world.held_expert))
        assert r_squared(rebuilt, world.held_expert, world.axes.mean) > 0.99
    cosines = torch.tensor([_cosine(each.encoder.direction(world.measured), world.truth) for each in fitted])
    assert ttest_1samp(cosines, 0).pvalue > 0.05
    # As wide as random directions of this size are: standard deviation 1 / sqrt(64).
    assert 0.07 < float(cosines.std()) < 0.2


@pytest.mark.parametrize("method", PAIRED)
@pytest.mark.parametrize(
    ("expert_size", "target_size", "num_rows", "noise"),
    [(64, 96, 500, NOISE), (96, 64, 60, NOISE), (64, 96, 50, NOISE), (64, 96, 300, 0.0), (96, 64, 300, 0.0)],
    ids=["wider-target", "few-rows", "wider-target-few-rows", "rank-deficient", "rank-deficient-narrower-target"],
)
def test_every_shape_carries_the_concept(
    method: str, expert_size: int, target_size: int, num_rows: int, noise: float
) -> None:
    world = _world(expert_size, target_size, num_rows, noise, seed=1)
    if not noise:
        assert world.axes.rank == NUM_FACTORS
    assert world.cosine(method) > (0.75 if method == "procrustes" else 0.93)


@pytest.mark.parametrize("method", ALIGNERS)
def test_half_precision_states_are_taken(world: World, method: str) -> None:
    half = world.expert.bfloat16(), world.target.bfloat16()
    coarse = fit_aligner(method, principal_axes(half[0], 1000), half[1], 1e-2)
    fine = fit_aligner(method, principal_axes(half[0].double(), 1000), half[1].double(), 1e-2)
    mapped = coarse.states(world.held_expert.bfloat16())
    assert mapped.dtype == torch.float64
    torch.testing.assert_close(coarse.coefficients, fine.coefficients)
    if method in PAIRED:
        assert _cosine(coarse.direction(world.measured.bfloat16()), world.truth) > 0.85


@pytest.mark.parametrize("method", PAIRED)
def test_paired_texts_are_accepted_and_shuffled_ones_refused(world: World, method: str) -> None:
    order = torch.randperm(len(world.target), generator=torch.Generator().manual_seed(1))
    verdicts = []
    for paired in (world.target, world.target[order]):
        fitted = fit_aligner(method, world.axes, paired, 1e-2)
        verdicts.append(
            alignment_quality(
                fitted, method, world.axes, paired, world.held_expert, world.held_target, 1e-2, permutations=20, seed=0
            )
        )
    assert verdicts[0].accepted
    assert verdicts[0].paired
    assert verdicts[0].r2 > 0.7
    assert verdicts[0].permuted_95 < 0.05
    # A refit on shuffled pairs predicts little; the fitted map on shuffled texts would miss by twice the variance.
    assert -0.5 < verdicts[0].permuted_mean < 0
    assert not verdicts[1].accepted


def test_autoencoder_is_not_accepted_and_says_why(world: World) -> None:
    fitted = fit_aligner("autoencoder", world.axes, world.target, seed=3)
    quality = alignment_quality(
        fitted, "autoencoder", world.axes, world.target, world.held_expert, world.held_target, 0.0, 40, seed=0
    )
    assert not quality.paired
    assert not quality.accepted
    assert quality.r2 < 0
    # Chance whichever way the held-out texts are paired.
    assert quality.r2 == pytest.approx(quality.permuted_mean, rel=0.1)
