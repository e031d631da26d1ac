"""Mutual information against its closed form, its null, and the rule for enough rows."""

import math
from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import Tensor

from artifacts.pairing.information import layer_information, whiten_layer

NUM_ROWS, COMPONENTS = 1000, 50


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _correlated(num_shared: int, rho: float, seed: int, width: int = COMPONENTS) -> tuple[Tensor, Tensor]:
    """Two layers whose first `num_shared` factors correlate by rho, each in a random rotation of its own."""
    generator = _generator(seed)
    first, second = torch.randn(2, NUM_ROWS, width, generator=generator).unbind()
    second[:, :num_shared] = rho * first[:, :num_shared] + math.sqrt(1 - rho**2) * second[:, :num_shared]
    rotations = (torch.linalg.qr(torch.randn(width, width, generator=generator)).Q for _ in range(2))
    return tuple(layer @ rotation + 1 for layer, rotation in zip((first, second), rotations, strict=True))


@pytest.mark.parametrize(("num_shared", "rho", "truth"), [(5, 0.5, 0.72), (5, 0.9, 4.15), (20, 0.9, 16.61)])
def test_estimate_is_within_five_percent_of_the_truth(num_shared: int, rho: float, truth: float) -> None:
    """One draw of the smallest truth has a standard deviation of 5 % itself, so eight are averaged."""
    assert -num_shared * math.log(1 - rho**2) / 2 == pytest.approx(truth, abs=0.01)
    pairs = [_correlated(num_shared, rho, seed) for seed in range(8)]
    estimates = [
        layer_information([whiten_layer(x, COMPONENTS)], [whiten_layer(y, COMPONENTS)], 20, 0) for x, y in pairs
    ]
    assert sum(float(each.value) for each in estimates) / 8 == pytest.approx(truth, rel=0.05)
    # Without the null's mean the smallest truth would come out three times too large.
    assert all(float(each.raw) - truth > 0.9 for each in estimates)
    assert all(float(each.p) == pytest.approx(1 / 21) for each in estimates)


def test_estimate_is_that_of_the_canonical_correlations() -> None:
    first, second = (whiten_layer(layer, 20) for layer in _correlated(8, 0.6, 0, width=30))
    rho = torch.linalg.svdvals(first.T @ second)
    expected = -torch.log1p(-rho.square()).sum() / 2
    torch.testing.assert_close(layer_information([first], [second], 20, 0).raw[0, 0], expected)


def test_matrix_holds_every_pair_and_does_not_depend_on_its_neighbours() -> None:
    layers = [whiten_layer(layer, 20) for seed in range(3) for layer in _correlated(10, 0.8, seed, width=20)]
    expert, target = layers[::2], layers[1::2]
    matrix = layer_information(expert, target, 30, 1)
    for tensor in (matrix.value, matrix.raw, matrix.null_mean, matrix.p, matrix.q):
        assert tuple(tensor.shape) == (3, 3)
        assert tensor.dtype == torch.float64
    for i in range(3):
        for j in range(3):
            alone = layer_information([expert[i]], [target[j]], 30, 1)
            torch.testing.assert_close(alone.value[0, 0], matrix.value[i, j])
            assert float(alone.p) == float(matrix.p[i, j])
    assert torch.equal(matrix.value.argmax(1), torch.arange(3))


def test_nothing_shared_is_nothing_found() -> None:
    """Independent layers: values about zero, and after Benjamini and Hochberg almost never a discovery."""
    found = 0
    for seed in range(20):
        layers = torch.randn(8, 300, 20, generator=_generator(seed)).unbind()
        white = [whiten_layer(layer, 20) for layer in layers]
        matrix = layer_information(white[:4], white[4:], 50, seed)
        assert float(matrix.value.abs().mean()) < 0.15
        assert bool((matrix.q >= matrix.p).all())
        found += bool((matrix.q <= 0.05).any())
    # The family-wise rate of a null matrix is 5 %: one in twenty is expected, four have a chance of 1.6 %.
    assert found < 4


def test_null_p_values_are_uniform_enough() -> None:
    layers = [whiten_layer(layer, 10) for layer in torch.randn(40, 200, 10, generator=_generator(0)).unbind()]
    p = layer_information(layers[:20], layers[20:], 99, 0).p.flatten()
    for level in (0.1, 0.25, 0.5):
        assert float((p <= level).double().mean()) == pytest.approx(level, abs=0.08)


def test_a_layer_with_itself_is_large_and_finite() -> None:
    layer = whiten_layer(torch.randn(100, 10, generator=_generator(0)), 10)
    value = float(layer_information([layer], [layer], 20, 0).value)
    assert 100 < value < 10 * 14


def test_a_layer_of_low_rank_shares_only_what_it_has() -> None:
    generator = _generator(0)
    narrow = torch.randn(200, 3, generator=generator) @ torch.randn(3, 40, generator=generator)
    white = whiten_layer(narrow, 10)
    assert tuple(white.shape) == (200, 10)
    assert bool((white[:, 3:] == 0).all())
    torch.testing.assert_close(white[:, :3].T @ white[:, :3], torch.eye(3, dtype=torch.float64))
    other = whiten_layer(torch.randn(200, 40, generator=generator), 10)
    assert float(layer_information([white], [other], 20, 0).raw) < 0.5


def test_permutations_can_be_watched() -> None:
    layer = whiten_layer(torch.randn(100, 5, generator=_generator(0)), 5)
    seen = []

    def track(items: Iterable[int]) -> Iterator[int]:
        for item in items:
            seen.append(item)
            yield item

    layer_information([layer], [layer], 25, 0, track)
    assert seen == list(range(25))


def test_too_few_rows_are_refused_with_the_largest_number_of_components() -> None:
    states = torch.randn(499, 60, generator=_generator(0))
    with pytest.raises(ValueError, match=r"499 rows for 50 .* at most 49 components or at least 500 rows"):
        whiten_layer(states, 50)
    assert tuple(whiten_layer(states, 49).shape) == (499, 49)
    with pytest.raises(ValueError, match="0 components"):
        whiten_layer(states, 0)


def test_bad_layers_are_refused() -> None:
    layer = whiten_layer(torch.randn(100, 5, generator=_generator(0)), 5)
    with pytest.raises(ValueError, match="1 of 100 rows hold NaN"):
        whiten_layer(torch.where(torch.arange(100)[:, None] == 3, float("nan"), 1.0).expand(100, 5), 5)
    with pytest.raises(ValueError, match="1 expert and 0 target"):
        layer_information([layer], [], 20, 0)
    with pytest.raises(ValueError, match=r"\(50, 5\).*\(100, 5\)"):
        layer_information([layer], [layer[:50]], 20, 0)
    with pytest.raises(ValueError, match="19 permutations"):
        layer_information([layer], [layer], 19, 0)
