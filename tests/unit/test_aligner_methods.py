"""Aligner methods against closed forms, other libraries and general-purpose optimisers."""

import math
from dataclasses import replace

import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from scipy.optimize import approx_fprime, minimize
from torch import Tensor

from artifacts.aligner import autoencoder as autoencoder_module
from artifacts.aligner import quality as quality_module
from artifacts.aligner.autoencoder import fit_autoencoder
from artifacts.aligner.axes import principal_axes
from artifacts.aligner.cca import fit_cca
from artifacts.aligner.fit import ALIGNERS, choose_regularisation, fit_aligner, fit_decoder
from artifacts.aligner.joint import fit_joint, fit_joint_encoder
from artifacts.aligner.procrustes import fit_procrustes
from artifacts.aligner.quality import alignment_quality
from artifacts.aligner.ridge import fit_ridge, r_squared, ridge_penalty

GRID = (1e-6, 1e-2, 1.0)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _orthogonal(size: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(_random(size, size, seed=seed)).Q


# Every method.


@pytest.mark.parametrize("method", ALIGNERS)
def test_directions_take_no_bias(method: str) -> None:
    inputs, outputs = _random(60, 12) + 5, _random(60, 6, seed=1) - 7
    fitted = fit_aligner(method, principal_axes(inputs, 1000), outputs, 1e-3)
    difference = fitted.states(inputs[0]) - fitted.states(inputs[1])
    torch.testing.assert_close(fitted.direction(inputs[0] - inputs[1]), difference)
    assert not fitted.direction(torch.zeros(12)).any()
    torch.testing.assert_close(fitted.states(inputs).mean(0), outputs.mean(0))


@pytest.mark.parametrize("method", ALIGNERS)
@pytest.mark.parametrize(("num_rows", "expert_size", "target_size"), [(40, 12, 6), (40, 6, 12), (8, 12, 20)])
def test_maps_have_the_shapes_of_their_models(method: str, num_rows: int, expert_size: int, target_size: int) -> None:
    inputs, outputs = _random(num_rows, expert_size), _random(num_rows, target_size, seed=1)
    axes = principal_axes(inputs, 1000)
    fitted = fit_aligner(method, axes, outputs, 1e-3)
    assert fitted.weight().shape == (target_size, expert_size)
    assert fitted.bias().shape == (target_size,)
    if ALIGNERS[method].decoder:
        decoder = fit_decoder(method, axes, outputs, 1e-3)
        assert decoder.weight().shape == (expert_size, target_size)
        basis = decoder.basis
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64))
        torch.testing.assert_close(decoder.states(outputs.mean(0)), inputs.mean(0))


@pytest.mark.parametrize("method", ALIGNERS)
def test_results_follow_the_seed_alone(method: str) -> None:
    inputs, outputs = _random(40, 8), _random(40, 5, seed=1)
    axes = principal_axes(inputs, 1000)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        fitted = fit_aligner(method, axes, outputs, 0.1, seed=7)
        quality = alignment_quality(fitted, method, axes, outputs, inputs[:9], outputs[:9], 0.1, 20, seed=3)
        assert torch.equal(before, torch.random.get_rng_state())
        results.append((fitted.coefficients, quality))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    other = fit_aligner(method, axes, outputs, 0.1, seed=8).coefficients
    assert torch.equal(other, results[0][0]) == (method != "autoencoder")


@pytest.mark.parametrize("method", ALIGNERS)
def test_states_that_are_not_numbers_are_refused(method: str) -> None:
    inputs, outputs = _random(30, 8), _random(30, 5, seed=1)
    broken_inputs, broken_outputs = inputs.clone(), outputs.clone()
    broken_inputs[[3, 4]] = math.nan
    broken_outputs[7, 2] = math.inf
    axes = principal_axes(inputs, 1000)
    with pytest.raises(ValueError, match="expert layer 2: 2 of 30 rows hold NaN or infinity, the first is row 3"):
        principal_axes(broken_inputs, 1000, name="expert layer 2")
    with pytest.raises(ValueError, match="target states: 1 of 30 rows"):
        fit_aligner(method, axes, broken_outputs, 0.1)
    fitted = fit_aligner(method, axes, outputs, 0.1)
    for held, message in (
        ((broken_inputs, outputs), "held-out expert states: 2 of 30 rows"),
        ((inputs, broken_outputs), "held-out target states: 1 of 30 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            alignment_quality(fitted, method, axes, outputs, *held, 0.1, 20, 0)
        if ALIGNERS[method].regularised:
            with pytest.raises(ValueError, match=message):
                choose_regularisation(method, axes, outputs, *held, GRID)


@pytest.mark.parametrize("method", ALIGNERS)
def test_rows_that_make_no_pairs_are_refused(method: str) -> None:
    axes = principal_axes(_random(30, 8), 1000)
    with pytest.raises(ValueError, match="29 target rows for 30 expert rows"):
        fit_aligner(method, axes, _random(29, 5), 0.1)
    with pytest.raises(ValueError, match="all 30 target rows are equal"):
        fit_aligner(method, axes, torch.full((30, 5), 0.1), 0.1)


def test_hyper_parameters_out_of_range_are_refused() -> None:
    axes, outputs = principal_axes(_random(30, 8), 1000), _random(30, 5, seed=1)
    with pytest.raises(ValueError, match="no aligner 'lasso'; choose one of ridge, procrustes"):
        fit_aligner("lasso", axes, outputs)
    for method in ("ridge", "cca", "joint"):
        with pytest.raises(ValueError, match=f"regularisation 0 of {method}; it must be above 0"):
            fit_aligner(method, axes, outputs)
    with pytest.raises(ValueError, match="weight 0 of the pairs"):
        fit_aligner("joint", axes, outputs, 0.1, joint_weight=0)
    with pytest.raises(ValueError, match=r"ridge has no decoder \(joint, autoencoder have\)"):
        fit_decoder("ridge", axes, outputs, 0.1)


@pytest.mark.parametrize("method", ALIGNERS)
def test_held_out_pairs_choose_the_regularisation(method: str) -> None:
    truth = _random(20, 5)
    inputs, held = _random(40, 20, seed=1), _random(200, 20, seed=2)
    outputs = inputs @ truth + 6 * _random(40, 5, seed=3)
    axes = principal_axes(inputs, 100)
    chosen = choose_regularisation(method, axes, outputs, held, held @ truth, GRID)
    if not ALIGNERS[method].regularised:
        assert chosen == 0
        return
    scores = {}
    for value in GRID:
        fitted = fit_aligner(method, axes, outputs, value)
        scores[value] = r_squared(fitted.states(held), held @ truth, fitted.output_mean)
    assert chosen == max(scores, key=scores.__getitem__)
    assert len(set(scores.values())) == len(GRID)


# Procrustes.


def test_procrustes_finds_a_rotation_and_a_scale() -> None:
    inputs, rotation = _random(50, 10) * torch.linspace(3, 0.5, 10), _orthogonal(10, seed=1)
    fitted = fit_procrustes(principal_axes(inputs + 4, 1000), 2.5 * inputs @ rotation - 3)
    torch.testing.assert_close(fitted.weight().T, 2.5 * rotation)


def test_procrustes_is_that_of_scipy() -> None:
    inputs, outputs = _random(50, 10), _random(50, 10, seed=1)
    x, y = inputs - inputs.mean(0), outputs - outputs.mean(0)
    rotation, strength = orthogonal_procrustes(x.numpy(), y.numpy())
    fitted = fit_procrustes(principal_axes(inputs, 1000), outputs)
    torch.testing.assert_close(fitted.weight().T, torch.from_numpy(rotation) * strength / x.square().sum())


@pytest.mark.parametrize(("expert_size", "target_size"), [(6, 10), (10, 6)])
def test_procrustes_between_sizes_is_a_partial_isometry(expert_size: int, target_size: int) -> None:
    inputs, outputs = _random(50, expert_size), _random(50, target_size, seed=1)
    weight = fit_procrustes(principal_axes(inputs, 1000), outputs).weight()
    lengths = torch.linalg.svdvals(weight)
    torch.testing.assert_close(lengths, lengths[:1].expand(6))
    x, y = inputs - inputs.mean(0), outputs - outputs.mean(0)
    # The scale is that of least squares: the residual is orthogonal to the prediction.
    assert float(((y - x @ weight.T) * (x @ weight.T)).sum()) == pytest.approx(0, abs=1e-9)


# Canonical correlations.


def test_cca_finds_an_exact_map_and_does_not_depend_on_the_experts_units() -> None:
    inputs, truth = _random(300, 10), _random(10, 16, seed=1)
    exact = fit_cca(principal_axes(inputs, 1000), inputs @ truth, 1e-9)
    torch.testing.assert_close(exact.weight().T, truth, rtol=1e-6, atol=1e-6)
    outputs = inputs @ truth + _random(300, 16, seed=2)
    stretched = inputs * torch.logspace(-1, 1, 10)
    predicted = [fit_cca(principal_axes(each, 1000), outputs, 1e-9).states(each) for each in (inputs, stretched)]
    torch.testing.assert_close(*predicted, rtol=1e-4, atol=1e-4)


def test_cca_drops_what_chance_explains() -> None:
    inputs, outputs = _random(200, 40), _random(200, 30, seed=1)
    axes = principal_axes(inputs, 1000)
    by_chance = {
        "ridge": fit_ridge(axes, outputs, 1e-6).states(inputs),
        "cca": fit_cca(axes, outputs, 1e-6).states(inputs),
    }
    spread = {name: float((each - outputs.mean(0)).square().sum()) for name, each in by_chance.items()}
    assert spread["cca"] < 0.5 * spread["ridge"]
    # One shared factor among thirty: least squares follows the noise of the others, the canonical lift does not.
    shared = _random(200, 1, seed=2)
    told = outputs + 3 * shared @ _random(1, 30, seed=3)
    told_axes = principal_axes(inputs + shared @ _random(1, 40, seed=4), 1000)
    held = _random(400, 1, seed=5)
    held_inputs = _random(400, 40, seed=6) + held @ _random(1, 40, seed=4)
    held_outputs = 3 * held @ _random(1, 30, seed=3)
    scores = [
        r_squared(fit(told_axes, told, 1e-6).states(held_inputs), held_outputs, told.mean(0))
        for fit in (fit_ridge, fit_cca)
    ]
    assert scores[1] > scores[0]


# Joint.


def _joint_loss(axes_scales: Tensor, start: Tensor, weight: float, spread: Tensor, flat: Tensor) -> Tensor:
    """The loss itself, over the encoder and the decoder at once."""
    encoder, decoder = flat[: start.numel()].view(start.shape), flat[start.numel() :].view(start.T.shape)
    scaled = axes_scales[:, None]
    missed = torch.diag(axes_scales) - scaled * encoder @ decoder
    return (
        missed.square().sum() / axes_scales.square().sum()
        + weight / spread * (scaled * (encoder - start)).square().sum()
    )


@pytest.mark.parametrize("weight", [0.1, 1.0, 10.0])
def test_joint_is_the_minimum_that_no_optimiser_gets_under(weight: float) -> None:
    inputs = _random(120, 12) * torch.logspace(0, -1, 12)
    outputs = inputs @ _random(12, 5, seed=1) + _random(120, 5, seed=2)
    axes = principal_axes(inputs, 1000)
    ridge = fit_ridge(axes, outputs, 1e-2).coefficients
    scales = (axes.scales.square() + ridge_penalty(axes, 1e-2)).sqrt()
    spread = (outputs - outputs.mean(0)).square().sum()
    fitted = fit_joint(axes, outputs, 1e-2, weight)
    decoded = fitted.decoder.basis @ fitted.decoder.coefficients @ axes.basis

    def loss(flat: Tensor) -> Tensor:
        return _joint_loss(scales, ridge, weight, spread, flat)

    def value_and_gradient(flat: object) -> tuple[float, object]:
        leaf = torch.tensor(flat, dtype=torch.float64, requires_grad=True)
        value = loss(leaf)
        value.backward()
        assert leaf.grad is not None
        return value.item(), leaf.grad.numpy()

    closed = torch.cat((fitted.encoder.coefficients.flatten(), decoded.flatten()))
    lowest = float(loss(closed))
    starts = [closed, torch.cat((ridge.flatten(), _random(ridge.numel(), seed=3)))]
    starts += [_random(len(closed), seed=4 + seed) for seed in range(3)]
    options = {"maxiter": 500, "ftol": 1e-15, "gtol": 1e-10}
    for start in starts:
        reached = minimize(value_and_gradient, start.numpy(), jac=True, method="L-BFGS-B", options=options).fun
        assert reached > lowest - 1e-9
        if start is closed:
            assert reached == pytest.approx(lowest, abs=1e-9)


def test_joint_is_ridge_where_nothing_is_squeezed_and_where_pairs_are_all() -> None:
    inputs, outputs = _random(80, 10), _random(80, 14, seed=1)
    axes = principal_axes(inputs, 1000)
    wide = fit_joint(axes, outputs, 1e-2, 0.5)
    torch.testing.assert_close(wide.encoder.coefficients, fit_ridge(axes, outputs, 1e-2).coefficients)
    torch.testing.assert_close(wide.decoder.states(wide.encoder.states(inputs)), inputs)
    narrow = outputs[:, :4]
    heavy = fit_joint_encoder(axes, narrow, 1e-2, 1e9).coefficients
    torch.testing.assert_close(heavy, fit_ridge(axes, narrow, 1e-2).coefficients, rtol=1e-5, atol=1e-7)


def test_joint_has_the_null_of_ridge_where_nothing_is_squeezed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_module, "SKETCH_SIZE", 4)
    inputs, outputs = _random(80, 10), _random(80, 14, seed=1)
    axes = principal_axes(inputs, 1000)
    measured = [
        alignment_quality(fit_aligner(each, axes, outputs, 0.1), each, axes, outputs, inputs, outputs, 0.1, 20, 0)
        for each in ("ridge", "joint")
    ]
    assert measured[0] == pytest.approx(measured[1])


def test_joint_trades_the_target_for_reconstruction() -> None:
    inputs, outputs = _random(400, 12) * torch.logspace(0, -1, 12), _random(400, 4, seed=2)
    outputs = outputs + inputs[:, 4:8] * 10
    axes = principal_axes(inputs, 1000)
    rebuilt, predicted = [], []
    for weight in (1e-4, 1e-1, 1e3):
        fitted = fit_joint(axes, outputs, 1e-6, weight)
        codes = fitted.encoder.states(inputs)
        rebuilt.append(r_squared(fitted.decoder.states(codes), inputs, axes.mean))
        predicted.append(r_squared(codes, outputs, outputs.mean(0)))
    assert rebuilt == sorted(rebuilt, reverse=True)
    assert predicted == sorted(predicted)
    best = float(axes.scales[:4].square().sum() / axes.scales.square().sum())
    assert rebuilt[0] == pytest.approx(best, abs=1e-3)
    assert rebuilt[-1] < best - 0.1
    assert predicted[-1] > predicted[0] + 0.1


# Auto-encoder.


def test_autoencoder_descends_the_gradient_of_its_loss() -> None:
    weights = _random(2 * 6 * 4).numpy()
    scales = torch.logspace(0, -2, 6, dtype=torch.float64)
    value, gradient = autoencoder_module._loss(weights, scales.numpy())
    numeric = approx_fprime(weights, lambda each: autoencoder_module._loss(each, scales.numpy())[0], 1e-7)
    torch.testing.assert_close(torch.from_numpy(gradient), torch.from_numpy(numeric), rtol=1e-5, atol=1e-6)
    encoder, decoder = torch.from_numpy(weights).view(2, 24)
    missed = torch.diag(scales) - encoder.view(6, 4) @ decoder.view(4, 6)
    assert value == pytest.approx(float(missed.square().sum()))


def test_autoencoder_never_sees_the_target() -> None:
    inputs, outputs = _random(50, 10), _random(50, 6, seed=1)
    axes = principal_axes(inputs, 1000)
    own = fit_aligner("autoencoder", axes, outputs, seed=2)
    permuted = fit_aligner("autoencoder", axes, outputs.flip(0), seed=2)
    unrelated = fit_aligner("autoencoder", axes, 9 * _random(50, 6, seed=5) + 4, seed=2)
    assert torch.equal(own.coefficients, permuted.coefficients)
    assert torch.equal(own.coefficients, unrelated.coefficients)


def test_autoencoder_reads_second_moments_only() -> None:
    axes = principal_axes(_random(50, 10), 1000)
    without_rows = replace(axes, left=axes.left[:0])
    fitted = [fit_autoencoder(each, torch.zeros(6), seed=0) for each in (axes, without_rows)]
    assert torch.equal(fitted[0].encoder.coefficients, fitted[1].encoder.coefficients)


@pytest.mark.parametrize("target_size", [3, 6, 20])
def test_autoencoder_reconstructs_as_well_as_principal_components(target_size: int) -> None:
    inputs = _random(200, 12) * torch.logspace(0, -1, 12) + 3
    axes = principal_axes(inputs, 1000)
    fitted = fit_autoencoder(axes, torch.zeros(target_size), seed=1)
    rebuilt = r_squared(fitted.decoder.states(fitted.encoder.states(inputs)), inputs, axes.mean)
    # Baldi and Hornik (1989): no linear auto-encoder does better than the leading axes.
    best = float(axes.scales[:target_size].square().sum() / axes.scales.square().sum())
    assert best - 2e-3 < rebuilt <= best + 1e-9
