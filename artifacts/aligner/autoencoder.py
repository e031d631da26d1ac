"""The paper's aligner: an auto-encoder of the expert's states whose code has the target's width."""

from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from artifacts.aligner.affine import AffineMap
from artifacts.aligner.axes import PrincipalAxes

Matrix = NDArray[np.float64]

# Share of the expert's variance below which one more iteration no longer changes what is reconstructed.
_TOLERANCE: Final = 1e-6
_MAX_ITERATIONS: Final = 500
# Pairs of steps that L-BFGS remembers; each is as large as both maps.
_MEMORY: Final = 5


class AutoEncoder(NamedTuple):
    """Both halves of an affine auto-encoder.

    Attributes:
        encoder: expert to target, the aligner.
        decoder: target to expert.
    """

    encoder: AffineMap
    decoder: AffineMap


def fit_autoencoder(axes: PrincipalAxes, output_mean: Tensor, seed: int) -> AutoEncoder:
    """Minimise mean ||h - g(f(h))||^2 over affine f and g on the expert's states h alone (arXiv 2505.12313).

    In principal coordinates, with S the diagonal of the scales, the loss is ||S (I - A B)||^2 / num_rows: it needs
    second moments only, and its cost does not grow with the rows. Encoder A and decoder B start from normal weights of
    variance 1 / fan-in and are followed downhill by L-BFGS.

    Nothing in the loss sees the target. It is the same for A R and R^-1 B with any invertible R, so where a concept
    ends up in the target's space is decided by the initial weights: the reconstruction is all but perfect, and the
    cosine between the mapped concept and the target's own is that of a random direction. Take it to compare with the
    paper, not to steer; what makes it an aligner are pairs (`fit_joint`).

    Args:
        axes: of the expert's states.
        output_mean: [output_size]. The loss leaves the encoder's bias free. Mapped states get the target's mean, or R^2
            against the target would tell the distance of two means only. No direction carries it.
        seed: of the initial weights.
    """
    width, rank, size = axes.mean.numel(), axes.rank, output_mean.numel()
    generator = torch.Generator().manual_seed(seed)
    # Of weights that the loss never reaches, those off the principal axes, none is kept.
    encoder = torch.randn(rank, size, generator=generator, dtype=torch.float64) / width**0.5
    decoder = torch.randn(size, rank, generator=generator, dtype=torch.float64) / size**0.5
    scales = axes.scales / axes.scales.norm()
    # Steps in the encoder of unit-variance coordinates, S A: ten times fewer than in A where the scales differ much.
    result = minimize(
        _loss,
        torch.cat(((scales[:, None] * encoder).flatten(), decoder.flatten())).numpy(),
        args=(scales.numpy(),),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": _MAX_ITERATIONS, "maxcor": _MEMORY, "ftol": _TOLERANCE, "gtol": 0.0},
    )
    fitted = torch.from_numpy(result.x)
    encoder, decoder = fitted[: rank * size].view(rank, size), fitted[rank * size :].view(size, rank)
    encoder = encoder / scales[:, None]
    return AutoEncoder(
        AffineMap(axes.mean, output_mean.double(), axes.basis, encoder), decoder_map(axes, output_mean, decoder)
    )


def decoder_map(axes: PrincipalAxes, output_mean: Tensor, weights: Tensor) -> AffineMap:
    """The map back to the expert's states from weights [output_size, rank] to its principal coordinates."""
    basis, triangle = torch.linalg.qr(weights)
    return AffineMap(output_mean.double(), axes.mean, basis, triangle @ axes.basis.T)


def _loss(weights: Matrix, scales: Matrix) -> tuple[float, Matrix]:
    """Share of variance that is not reconstructed, ||S - (S A) B||^2 for ||S|| = 1, and its gradient in (S A, B)."""
    rank = len(scales)
    encoder, decoder = weights[: weights.size // 2].reshape(rank, -1), weights[weights.size // 2 :].reshape(-1, rank)
    error = encoder @ decoder
    error[np.diag_indices(rank)] -= scales
    gradient = np.concatenate(((2 * error @ decoder.T).ravel(), (2 * encoder.T @ error).ravel()))
    return float((error * error).sum()), gradient
