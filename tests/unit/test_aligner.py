"""Ridge aligners against closed forms, and the refusal of aligners that know nothing."""

import pytest
import torch
from torch import Tensor

from artifacts.aligner import axes as axes_module
from artifacts.aligner import quality as quality_module
from artifacts.aligner.axes import principal_axes
from artifacts.aligner.quality import alignment_quality
from artifacts.aligner.ridge import choose_ridge, fit_ridge, r_squared


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("num_rows", "width"), [(60, 20), (20, 60), (20, 20)])
def test_axes_are_the_singular_value_decomposition(num_rows: int, width: int) -> None:
    states = _random(num_rows, width) + 3
    axes = principal_axes(states, 1000)
    centred = states - states.mean(0)
    torch.testing.assert_close(axes.left * axes.scales @ axes.basis.T, centred)
    torch.testing.assert_close(axes.scales, torch.linalg.svdvals(centred)[: axes.rank])
    torch.testing.assert_close(axes.basis.T @ axes.basis, torch.eye(axes.rank, dtype=torch.float64))
    assert axes.rank == min(num_rows - 1, width)


def test_axes_keep_the_largest(num_kept: int = 5) -> None:
    states = _random(60, 20)
    axes = principal_axes(states, num_kept)
    torch.testing.assert_close(axes.scales, torch.linalg.svdvals(states - states.mean(0))[:num_kept])


def test_randomised_axes_find_a_low_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(axes_module, "EXACT_SIDE", 8)
    states = _random(50, 4) @ _random(4, 40, seed=1)
    before = torch.random.get_rng_state()
    axes = principal_axes(states, 10, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert axes.rank == 4
    torch.testing.assert_close(axes.left * axes.scales @ axes.basis.T, states - states.mean(0))


def test_axes_need_variance() -> None:
    with pytest.raises(ValueError, match="rows are equal"):
        principal_axes(torch.ones(5, 3), 10)
    with pytest.raises(ValueError, match="at least 2"):
        principal_axes(torch.ones(1, 3), 10)


@pytest.mark.parametrize("num_rows", [15, 200])
def test_ridge_is_the_normal_equations(num_rows: int) -> None:
    inputs, outputs = _random(num_rows, 30) + 2, _random(num_rows, 8, seed=1) - 1
    fitted = fit_ridge(principal_axes(inputs, 1000), outputs, 0.1)
    x, y = inputs - inputs.mean(0), outputs - outputs.mean(0)
    gram = x.T @ x
    penalty = 0.1 * gram.diagonal().mean() * torch.eye(30, dtype=torch.float64)
    torch.testing.assert_close(fitted.weight(), torch.linalg.solve(gram + penalty, x.T @ y).T)


def test_directions_take_no_bias() -> None:
    inputs, outputs = _random(100, 12) + 5, _random(100, 6, seed=1) - 7
    fitted = fit_ridge(principal_axes(inputs, 1000), outputs, 1e-3)
    difference = fitted.states(inputs[0]) - fitted.states(inputs[1])
    torch.testing.assert_close(fitted.direction(inputs[0] - inputs[1]), difference)
    torch.testing.assert_close(fitted.direction(torch.zeros(12)), torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(inputs @ fitted.weight().T + fitted.bias(), fitted.states(inputs))


def test_regularisation_follows_the_noise() -> None:
    grid = (1e-6, 1e-2, 10.0)
    truth = _random(20, 5)
    inputs, held = _random(40, 20, seed=1), _random(200, 20, seed=2)
    clean = choose_ridge(principal_axes(inputs, 100), inputs @ truth, held, held @ truth, grid)
    noise = 30 * _random(40, 5, seed=3)
    noisy = choose_ridge(principal_axes(inputs, 100), inputs @ truth + noise, held, held @ truth, grid)
    assert clean == 1e-6
    assert noisy == 10.0


def test_r_squared_has_its_landmarks() -> None:
    actual = _random(50, 3)
    mean = actual.mean(0)
    assert r_squared(actual, actual, mean) == 1.0
    assert r_squared(mean.expand(50, 3), actual, mean) == pytest.approx(0.0)
    assert r_squared(-actual, actual, mean) < 0


@pytest.mark.parametrize("sketch_size", [256, 4])
def test_paired_texts_are_accepted_and_shuffled_ones_refused(sketch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_module, "SKETCH_SIZE", sketch_size)
    truth = _random(10, 16)
    inputs, held = _random(200, 10, seed=1), _random(80, 10, seed=2)
    outputs, held_outputs = (
        rows @ truth + 0.5 * _random(len(rows), 16, seed=3 + i) for i, rows in enumerate((inputs, held))
    )
    axes = principal_axes(inputs, 100)
    shuffled = outputs[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    verdicts = []
    for paired in (outputs, shuffled):
        fitted = fit_ridge(axes, paired, 1e-3)
        verdicts.append(alignment_quality(fitted, "ridge", axes, paired, held, held_outputs, 1e-3, 40, 0))
    assert verdicts[0].accepted
    assert verdicts[0].r2 > 0.9 > verdicts[0].permuted_95
    assert not verdicts[1].accepted


def test_quality_does_not_depend_on_the_global_seed() -> None:
    inputs, outputs = _random(30, 4), _random(30, 4, seed=1)
    axes = principal_axes(inputs, 10)
    fitted = fit_ridge(axes, outputs, 0.1)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(alignment_quality(fitted, "ridge", axes, outputs, inputs, outputs, 0.1, 20, 5))
    assert results[0] == results[1]
