"""Joint aligner: the paper's auto-encoder held to the target by pairs."""

import torch
from torch import Tensor

from artifacts.aligner.affine import AffineMap
from artifacts.aligner.autoencoder import AutoEncoder, decoder_map
from artifacts.aligner.axes import PrincipalAxes
from artifacts.aligner.ridge import fit_ridge, ridge_penalty
from artifacts.aligner.targets import centred_targets

# Singular values of the code below this share of the largest are not decoded: their inverse would be noise.
_RELATIVE_FLOOR = 1e-8


def fit_joint_encoder(axes: PrincipalAxes, outputs: Tensor, regularisation: float, weight: float) -> AffineMap:
    """Minimise ||h - g(f(h))||^2 / ||h||^2 + weight * ||f(h) - t||^2 / ||t||^2 over pairs (h, t), in closed form.

    Norms are of centred states, so `weight` compares two shares of variance and means the same for every pair of
    models. Tikhonov regularisation: both terms see the expert's states with isotropic noise of ridge's penalty added.
    In principal coordinates, with D the diagonal of the scales of those, F = D A the code and F0 = D A0 that of ridge,
    the loss is ||D - F B||^2 / ||D||^2 + weight * ||F - F0||^2 / ||t||^2 up to a constant. For a given column space U
    of F the best B leaves ||D - U U^T D||^2 and the best F is U U^T F0, so U holds the leading output_size eigenvectors
    of

        D^2 / ||D||^2 + weight * F0 F0^T / ||t||^2.

    It is the global minimum, and needs no initial weights. So a joint aligner is ridge regression seen through a
    bottleneck: where the target is at least as wide as the expert has axes, nothing is squeezed and it is ridge
    exactly; where it is narrower, it gives up those axes that neither reconstruct the expert nor predict the target.

    Args:
        axes: of the expert's states, num_rows rows.
        outputs: [num_rows, output_size], the target's states of the same texts.
        regularisation: > 0, as in `fit_ridge`.
        weight: > 0, of the pairs against the reconstruction.

    Raises:
        ValueError: a weight that is not positive; target rows that do not pair, are not finite or are all equal.
    """
    if not weight > 0:
        raise ValueError(
            f"weight {weight:g} of the pairs; it must be above 0 (autoencoder is the aligner without pairs)"
        )
    centred, output_mean = centred_targets(axes, outputs)
    scales = _noisy_scales(axes, regularisation)
    code = scales[:, None] * fit_ridge(axes, outputs, regularisation).coefficients
    if len(output_mean) < axes.rank:
        worth = weight / centred.square().sum() * (code @ code.T)
        worth.diagonal().add_(scales.square() / scales.square().sum())
        kept = torch.linalg.eigh(worth).eigenvectors[:, -len(output_mean) :]
        code = kept @ (kept.T @ code)
    return AffineMap(axes.mean, output_mean, axes.basis, code / scales[:, None])


def fit_joint(axes: PrincipalAxes, outputs: Tensor, regularisation: float, weight: float) -> AutoEncoder:
    """The encoder of `fit_joint_encoder` with the decoder that reconstructs best from it.

    The decoder reads codes of expert states. States of the target hold more than codes do, and it was not fitted to
    them.

    Args, Raises: as `fit_joint_encoder`.
    """
    encoder = fit_joint_encoder(axes, outputs, regularisation, weight)
    scales = _noisy_scales(axes, regularisation)
    weights = torch.linalg.pinv(scales[:, None] * encoder.coefficients, rtol=_RELATIVE_FLOOR) * scales
    return AutoEncoder(encoder, decoder_map(axes, encoder.output_mean, weights))


def _noisy_scales(axes: PrincipalAxes, regularisation: float) -> Tensor:
    return (axes.scales.square() + ridge_penalty(axes, regularisation)).sqrt()
