"""Recursive Feature Machine: a direction that also finds concepts that are not linear in the states.

Kernel regression on the labels and the average gradient outer product (AGOP) of its fit, iterated (Radhakrishnan,
Beaglehole, Pandit and Belkin, Science 2024), through the authors' package `xrfm`. States are PCA-whitened first: in a
low-rank residual stream the raw method needs 15 rows per dimension and otherwise finds noise.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from artifacts.vectors.coordinates import whitened
from artifacts.vectors.difference import unit
from artifacts.vectors.refusal import require_classes, require_finite
from artifacts.vectors.score import direction_sign

MIN_COMPONENTS = 32
MAX_COMPONENTS = 128
# Kernel bandwidth relative to the median distance between two rows, and ridge on the kernel matrix.
RELATIVE_BANDWIDTH = 1.0
REGULARISATION = 1e-3


@dataclass(frozen=True)
class RfmVectors:
    """The top AGOP direction, mapped back from the whitened space both ways.

    With states x = mean + basis (s * z) and a top direction v of z:

    Attributes:
        covector: [width], unit, float32: basis (v / s), the direction in which the fitted function grows fastest.
        displacement: [width], unit, float32: basis (s * v), the way the states move when the concept changes.
        eigenvalues: [num_components], float32, of the AGOP, largest first, sum 1.
    """

    covector: Tensor
    displacement: Tensor
    eigenvalues: Tensor


def fit_rfm(
    states: Tensor,
    labels: Tensor,
    validation_states: Tensor,
    validation_labels: Tensor,
    components: int,
    iterations: int,
    seed: int,
    sign: int | None = None,
) -> RfmVectors:
    """Fit a Recursive Feature Machine and take its top direction.

    Args:
        states: [num_rows, width]; labels: [num_rows], 0 or 1.
        validation_states: [num_validation, width]; validation_labels: choose the best iteration.
        components: whitened dimensions, 32 to 128; fewer when the states have a lower rank.
        iterations: of the machine, >= 1.
        seed: of the package's row sampling.
        sign: of the correlation with the labels, used when the data show none.

    Raises:
        SignError: the direction has no sign and none is given.
        ValueError: the number of components is out of bounds, the states are not finite or have no variance, or a
            class has no row.
    """
    if not MIN_COMPONENTS <= components <= MAX_COMPONENTS:
        raise ValueError(f"{components} whitened components; must be {MIN_COMPONENTS} to {MAX_COMPONENTS}")
    for name, rows, classes in (("states", states, labels), ("validation", validation_states, validation_labels)):
        require_finite(rows, name)
        require_classes(classes)
    coordinates = whitened(states, components, seed)
    inputs, held = coordinates.of(states), coordinates.of(validation_states)
    agop = best_agop(inputs, labels, held, validation_labels, iterations, seed)
    top = power_iteration(agop)
    top = top * direction_sign(inputs @ top, labels, sign)
    eigenvalues = torch.linalg.eigvalsh(agop).flip(0).clamp_min(0)
    return RfmVectors(
        covector=unit(coordinates.covector(top)),
        displacement=unit(coordinates.displacement(top)),
        eigenvalues=(eigenvalues / eigenvalues.sum()).float(),
    )


def power_iteration(matrix: Tensor, steps: int = 10_000, tolerance: float = 1e-12) -> Tensor:
    """Top eigenvector of a symmetric positive semi-definite matrix [n, n], unit norm, dtype of the matrix.

    Raises:
        ValueError: the matrix is zero or not finite.
    """
    norms = matrix.norm(dim=0)
    if not bool(torch.isfinite(norms).all()) or float(norms.max()) == 0:
        raise ValueError("the gradient outer product is zero or not finite: the machine learnt no direction")
    # The longest column is a deterministic start that cannot be orthogonal to the top eigenvector of an AGOP.
    vector: Tensor = matrix[:, int(norms.argmax())]
    vector = vector / vector.norm()
    for _ in range(steps):
        following: Tensor = matrix @ vector
        following = following / following.norm()
        moved = float((following - vector).norm())
        vector = following
        if moved < tolerance:
            break
    return vector


def best_agop(
    states: Tensor, labels: Tensor, validation_states: Tensor, validation_labels: Tensor, iterations: int, seed: int
) -> Tensor:
    """Average gradient outer product of the iteration with the least validation error, [width, width], float64.

    Args:
        states: [num_rows, width], whitened: the kernel takes every direction for equally wide at first.
        labels: [num_rows], 0 or 1.
        validation_states: [num_validation, width]; validation_labels: choose the iteration.
        iterations: >= 1.
        seed: of the package's row sampling.
    """
    with warnings.catch_warnings():
        # The package's docstrings hold invalid escapes, which Python reports when it first compiles them.
        warnings.simplefilter("ignore")
        from xrfm import RFM

    centre = labels.double().mean()
    model = RFM(
        # `l2_high_dim` works on M itself, the other kernels take a matrix square root every iteration.
        kernel="l2_high_dim",
        iters=iterations,
        bandwidth=RELATIVE_BANDWIDTH,
        bandwidth_mode="adaptive",
        device=str(states.device),
        verbose=False,
        # `auc` fails on a single label column.
        tuning_metric="mse",
        # The regularised kernel matrix is positive definite: half the work of the package's default, LU.
        solver="cholesky",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.fit(
            (states, (labels.double() - centre)[:, None]),
            (validation_states, (validation_labels.double() - centre)[:, None]),
            reg=REGULARISATION,
            # `model.M` is the matrix *before* the best iteration, the identity when that is the first one.
            get_agop_best_model=True,
        )
    agop: Tensor = model.agop_best_model.double()
    return (agop + agop.T) / 2
