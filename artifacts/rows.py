"""Values of a bundle's rows: finite, of sane size, and unit or orthonormal vectors where a formula needs them."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from artifacts.errors import BundleError, BundleErrorCode
from artifacts.intervention import Intervention

MIN_NORM = 1e-6
MAX_NORM = 1e6
# Of norm 1, and of the dot product of two rows of a plane; bf16 rounds a unit vector by a tenth of it.
UNIT_TOLERANCE = 1e-3


class NormRange(NamedTuple):
    """Smallest and largest 2-norm of some rows."""

    smallest: float
    largest: float


def row_norms(tensor: Tensor) -> list[float]:
    """2-norm of each row of [hidden_size] or [num_rows, hidden_size]; summed in fp64, where it cannot overflow."""
    norms: list[float] = torch.linalg.vector_norm(
        tensor.reshape(-1, tensor.shape[-1]), dim=1, dtype=torch.float64
    ).tolist()
    return norms


def check_rows(interventions: tuple[Intervention, ...], rows: Mapping[str, Tensor]) -> NormRange:
    """Hold the rows against what their interventions ask of them.

    Args:
        interventions: that name exactly `rows`.
        rows: by name, [hidden_size] or [2, hidden_size], fp32.

    Raises:
        BundleError: NaN or infinity, a norm out of bounds, or a plane that is not orthogonal.
    """
    for name, row in rows.items():
        num_bad = int((~torch.isfinite(row)).sum())
        if num_bad:
            raise BundleError(
                BundleErrorCode.NON_FINITE,
                f"{name} holds NaN or infinity in {num_bad} of {row.numel()} values; build the bundle again.",
            )
    norms = {name: row_norms(row) for name, row in rows.items()}
    for step in interventions:
        for name in step.tensors:
            for norm in norms[name]:
                _check_norm(step, name, norm)
        if step.kind == "affine" and not any(norms[name][0] for name in step.tensors):
            raise BundleError(
                BundleErrorCode.BAD_NORM,
                f"{' and '.join(step.tensors)} hold zeros only, so nothing happens; leave the intervention out.",
            )
        if step.kind == "rotate" and step.read is not None:
            _check_orthogonal(step.read, rows[step.read])
    every = [norm for each in norms.values() for norm in each]
    return NormRange(min(every), max(every))


def _check_norm(step: Intervention, name: str, norm: float) -> None:
    if step.has_unit_read and name == step.read:
        if abs(norm - 1) > UNIT_TOLERANCE:
            raise BundleError(
                BundleErrorCode.BAD_NORM,
                f"{name} has norm {norm:.6g} and kind '{step.kind}' reads along a unit vector, whose norm is 1 within "
                f"{UNIT_TOLERANCE:g}; divide it by its norm.",
            )
    elif not (MIN_NORM <= norm <= MAX_NORM or (step.kind == "affine" and norm == 0)):
        raise BundleError(
            BundleErrorCode.BAD_NORM,
            f"{name} has norm {norm:.6g}, outside [{MIN_NORM:g}, {MAX_NORM:g}]; rescale it and the strengths.",
        )


def _check_orthogonal(name: str, plane: Tensor) -> None:
    first, second = plane.double()
    product = float(first @ second)
    if abs(product) > UNIT_TOLERANCE:
        raise BundleError(
            BundleErrorCode.NOT_ORTHOGONAL,
            f"The rows of {name} have dot product {product:.6g} and those of a plane have 0 within "
            f"{UNIT_TOLERANCE:g}; orthogonalise them.",
        )
