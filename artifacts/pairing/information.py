"""Gaussian mutual information between the layers of two models, with a permutation null.

For jointly Gaussian states with canonical correlations rho the mutual information is -1/2 sum log(1 - rho^2) (Gelfand
and Yaglom, 1957; Cover and Thomas, Elements of Information Theory, chapter 8). Rows that are not paired still correlate
by chance, by about r^2 / (2 n) nats, so the mean over permuted rows is taken off. Invertible maps leave the value as it
is, so it says how much two layers share and nothing about how well an aligner maps one to the other.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from scipy.stats import false_discovery_control
from torch import Tensor

from artifacts.aligner.axes import principal_axes
from artifacts.vectors.refusal import require_finite

ROWS_PER_COMPONENT = 10
MIN_PERMUTATIONS = 20
# A canonical correlation of 1 carries endless information; rho^2 is held this far below it (13.8 nats per component).
_GAP = 1e-12

# Wraps the permutations to show progress: takes them and gives them back one by one.
Track = Callable[[Iterable[int]], Iterable[int]]


@dataclass(frozen=True)
class LayerInformation:
    """Mutual information of every expert layer with every target layer; all tensors [num_expert, num_target], float64.

    Attributes:
        value: nats, the estimate minus the mean of its null; may fall below 0 by chance.
        raw: nats, the estimate, never negative.
        null_mean: nats, mean over permuted rows.
        p: one-sided permutation p-value, (1 + permuted estimates not below raw) / (1 + permutations).
        q: p after Benjamini and Hochberg over the whole matrix.
        permutations: size of the null.
    """

    value: Tensor
    raw: Tensor
    null_mean: Tensor
    p: Tensor
    q: Tensor
    permutations: int


def whiten_layer(states: Tensor, components: int, seed: int = 0) -> Tensor:
    """First principal components of one layer's states, centred and scaled to unit length over the rows.

    Args:
        states: [num_rows, width].
        components: r; a layer of lower rank gets zero columns, which share no information.
        seed: of the decomposition where it is found at random.

    Returns:
        [num_rows, components], float64, orthonormal columns but for the zero ones.

    Raises:
        ValueError: fewer than 10 rows per component, states that are not finite, or all rows equal.
    """
    require_enough_rows(len(states), components)
    require_finite(states)
    left = principal_axes(states, components, seed).left
    whitened = left.new_zeros(len(states), components)
    whitened[:, : left.shape[1]] = left
    return whitened


def require_enough_rows(num_rows: int, components: int) -> None:
    """Refuse more components than num_rows / 10: canonical correlations of few rows are large by chance alone.

    Raises:
        ValueError: with the largest number of components that the rows allow.
    """
    if components < 1:
        raise ValueError(f"{components} components; mutual information needs at least 1")
    if num_rows < ROWS_PER_COMPONENT * components:
        raise ValueError(
            f"{num_rows} rows for {components} whitened components; mutual information needs {ROWS_PER_COMPONENT} rows "
            f"per component, so use at most {num_rows // ROWS_PER_COMPONENT} components or at least "
            f"{ROWS_PER_COMPONENT * components} rows"
        )


def layer_information(
    expert: Sequence[Tensor], target: Sequence[Tensor], permutations: int, seed: int, track: Track = iter
) -> LayerInformation:
    """Estimate the whole matrix and test it against permuted rows.

    One permutation of the target's rows serves every pair. Determinants come from batched Cholesky factors of
    I - M M^T in float64, where M holds the correlations between two layers' whitened components.

    Args:
        expert, target: one tensor [num_rows, components] per layer, from `whiten_layer`, row k of all on the same text.
        permutations: size of the null, at least 20; 100 to 200 are usual. The least p is 1 / (1 + permutations).
        seed: of the permutations.
        track: shows progress over the permutations.

    Raises:
        ValueError: no layers, layers of unequal shape, or too few permutations.
    """
    shapes = {tuple(layer.shape) for layer in (*expert, *target)}
    if not expert or not target or len(shapes) != 1:
        raise ValueError(
            f"{len(expert)} expert and {len(target)} target layers of shapes {sorted(shapes)}; one is needed"
        )
    if permutations < MIN_PERMUTATIONS:
        raise ValueError(f"{permutations} permutations; a null needs at least {MIN_PERMUTATIONS}")
    targets = torch.cat(list(target), dim=1)
    raw = _information(expert, targets)
    total, exceeding = torch.zeros_like(raw), torch.zeros_like(raw)
    generator = torch.Generator().manual_seed(seed)
    for _ in track(range(permutations)):
        order = torch.randperm(len(targets), generator=generator).to(targets.device)
        null = _information(expert, targets[order])
        total += null
        exceeding += null >= raw
    null_mean = total / permutations
    p = (1 + exceeding) / (1 + permutations)
    q = torch.from_numpy(false_discovery_control(p.cpu().numpy(), axis=None, method="bh")).reshape(p.shape)
    return LayerInformation(raw - null_mean, raw, null_mean, p, q.to(p), permutations)


def _information(expert: Sequence[Tensor], targets: Tensor) -> Tensor:
    """Nats, [num_expert, num_target], for targets [num_rows, num_target * components]."""
    components = expert[0].shape[1]
    ceiling = (1 + _GAP) * torch.eye(components, dtype=torch.float64, device=targets.device)
    rows = []
    for layer in expert:
        # [components, num_target * components] -> one matrix per target layer.
        correlations = (layer.T @ targets).reshape(components, -1, components).transpose(0, 1)
        factors = torch.linalg.cholesky(ceiling - correlations @ correlations.mT)
        # log det = 2 sum log diag, and the information is minus half of it.
        rows.append(-factors.diagonal(dim1=-2, dim2=-1).log().sum(-1))
    return torch.stack(rows)
