"""Is an aligner better than chance? Held-out R^2 against the same fit on permuted pairs."""

from typing import NamedTuple

import torch
from torch import Tensor

from artifacts.aligner.affine import AffineMap
from artifacts.aligner.axes import PrincipalAxes
from artifacts.aligner.ridge import fit_ridge, r_squared

# Wider outputs are sketched to this width for the permutations only. A Gaussian sketch keeps squared norms in
# expectation (Johnson and Lindenstrauss), so the ratio of sums in R^2 stays the same up to a few percent.
SKETCH_SIZE = 256


class AlignmentQuality(NamedTuple):
    """Held-out R^2 of an aligner and of the same aligner fitted on permuted pairs."""

    r2: float
    permuted_mean: float
    permuted_95: float

    @property
    def accepted(self) -> bool:
        """Whether the aligner knows more than permuted pairs teach: R^2 above their 95th percentile, and above 0."""
        return self.r2 > max(self.permuted_95, 0.0)


def alignment_quality(
    aligner: AffineMap,
    axes: PrincipalAxes,
    outputs: Tensor,
    held_inputs: Tensor,
    held_outputs: Tensor,
    regularisation: float,
    permutations: int,
    seed: int,
) -> AlignmentQuality:
    """Measure an aligner on held-out pairs, and the null where no row is paired with its own text.

    Args:
        aligner: fitted on `axes` and `outputs` with `regularisation`.
        axes: of the inputs that it was fitted on, num_rows rows.
        outputs: [num_rows, output_size], the outputs that it was fitted on.
        held_inputs, held_outputs: [num_held, input_size], [num_held, output_size].
        permutations: size of the null, >= 20 so that its 95th percentile is a value and not the maximum.
        seed: of the permutations.
    """
    generator = torch.Generator().manual_seed(seed)
    r2 = r_squared(aligner.states(held_inputs), held_outputs, aligner.output_mean)
    small_outputs, small_held = _sketch(outputs, held_outputs, generator)
    null = []
    for _ in range(permutations):
        shuffled = small_outputs[torch.randperm(len(outputs), generator=generator)]
        held = small_held[torch.randperm(len(held_outputs), generator=generator)]
        permuted = fit_ridge(axes, shuffled, regularisation)
        null.append(r_squared(permuted.states(held_inputs), held, permuted.output_mean))
    values = torch.tensor(null, dtype=torch.float64)
    return AlignmentQuality(r2, float(values.mean()), float(values.quantile(0.95)))


def _sketch(outputs: Tensor, held_outputs: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    width = outputs.shape[1]
    if width <= SKETCH_SIZE:
        return outputs.double(), held_outputs.double()
    projection = torch.randn(width, SKETCH_SIZE, generator=generator, dtype=torch.float64) / SKETCH_SIZE**0.5
    return outputs.double() @ projection, held_outputs.double() @ projection
