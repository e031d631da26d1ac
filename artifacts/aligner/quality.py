"""Is an aligner better than chance? Held-out R^2 against the same method fitted on permuted pairs."""

from typing import NamedTuple

import torch
from torch import Tensor

from artifacts.aligner.affine import AffineMap
from artifacts.aligner.axes import PrincipalAxes
from artifacts.aligner.fit import ALIGNERS, JOINT_WEIGHT, fit_aligner
from artifacts.aligner.ridge import r_squared
from artifacts.vectors.refusal import require_finite

# Wider outputs are sketched to this width for the permutations of ridge only, which commutes with it. A Gaussian sketch
# keeps squared norms in expectation (Johnson and Lindenstrauss), so the ratio of sums in R^2 stays the same up to a few
# percent.
SKETCH_SIZE = 256


class AlignmentQuality(NamedTuple):
    """Held-out R^2 of an aligner and of the same method without the pairing of the texts.

    Attributes:
        r2: of the aligner.
        permuted_mean, permuted_95: mean and 95th percentile of the null.
        paired: whether pairs played a part in the fit. Where they did not (the paper's auto-encoder) the null permutes
            the held-out pairs alone, `r2` is about chance whatever the models share, and `accepted` is False: to use it
            all the same is the user's decision.
    """

    r2: float
    permuted_mean: float
    permuted_95: float
    paired: bool = True

    @property
    def accepted(self) -> bool:
        """Whether the aligner knows more than permuted pairs teach: R^2 above their 95th percentile, and above 0."""
        return self.r2 > max(self.permuted_95, 0.0)


def alignment_quality(
    aligner: AffineMap,
    method: str,
    axes: PrincipalAxes,
    outputs: Tensor,
    held_inputs: Tensor,
    held_outputs: Tensor,
    regularisation: float,
    permutations: int,
    seed: int,
    joint_weight: float = JOINT_WEIGHT,
) -> AlignmentQuality:
    """Measure an aligner on held-out pairs, and the null where no row is paired with its own text.

    Args:
        aligner: `fit_aligner` of this method on `axes` and `outputs` with `regularisation` and `joint_weight`.
        method: a key of ALIGNERS.
        axes: of the inputs that it was fitted on, num_rows rows.
        outputs: [num_rows, output_size], the outputs that it was fitted on.
        held_inputs, held_outputs: [num_held, input_size], [num_held, output_size].
        regularisation, joint_weight: of the method, for the refits.
        permutations: size of the null, >= 20 so that its 95th percentile is a value and not the maximum.
        seed: of the permutations.

    Raises:
        ValueError: as `fit_aligner`, or held-out rows that are not finite.
    """
    require_finite(held_inputs, "held-out expert states")
    require_finite(held_outputs, "held-out target states")
    generator = torch.Generator().manual_seed(seed)
    r2 = r_squared(aligner.states(held_inputs), held_outputs, aligner.output_mean)
    paired, rows, held = ALIGNERS[method].paired, outputs.double(), held_outputs.double()
    if method == "joint" and outputs.shape[1] >= axes.rank:
        method = "ridge"  # Nothing is squeezed, so they are the same map (see `fit_joint_encoder`).
    if method == "ridge":
        rows, held = _sketch(rows, held, generator)
    permuted, null = aligner, []
    for _ in range(permutations):
        if paired:
            shuffled = rows[torch.randperm(len(rows), generator=generator)]
            permuted = fit_aligner(method, axes, shuffled, regularisation, joint_weight=joint_weight)
        held_shuffled = held[torch.randperm(len(held), generator=generator)]
        null.append(r_squared(permuted.states(held_inputs), held_shuffled, permuted.output_mean))
    values = torch.tensor(null, dtype=torch.float64)
    return AlignmentQuality(r2, float(values.mean()), float(values.quantile(0.95)), paired)


def _sketch(outputs: Tensor, held_outputs: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    width = outputs.shape[1]
    if width <= SKETCH_SIZE:
        return outputs, held_outputs
    projection = torch.randn(width, SKETCH_SIZE, generator=generator, dtype=torch.float64) / SKETCH_SIZE**0.5
    return outputs @ projection, held_outputs @ projection
