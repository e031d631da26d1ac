"""The target's side of the pairs, checked once for every method that reads it."""

import torch
from torch import Tensor

from artifacts.aligner.axes import PrincipalAxes
from artifacts.vectors.refusal import require_finite

# Rows that differ by less than this share of their largest entry differ by rounding of the mean only.
_ROUNDING = 1e-12


def centred_targets(axes: PrincipalAxes, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Target states less their mean, and the mean.

    Args:
        axes: of the expert's states, num_rows rows.
        outputs: [num_rows, output_size], any float dtype, row i of the same text as the expert's row i.

    Returns:
        [num_rows, output_size] and [output_size], float64.

    Raises:
        ValueError: another number of rows than the expert has, rows that are not finite, or all rows equal.
    """
    num_rows = len(axes.left)
    if len(outputs) != num_rows:
        raise ValueError(f"{len(outputs)} target rows for {num_rows} expert rows; a pair is one row of each")
    require_finite(outputs, "target states")
    targets = outputs.double()
    mean = targets.mean(0)
    centred = targets - mean
    if centred.abs().max() <= _ROUNDING * targets.abs().max().clamp_min(torch.finfo(torch.float64).tiny):
        raise ValueError(f"all {num_rows} target rows are equal, so there is nothing to map to; leave that layer out")
    return centred, mean
