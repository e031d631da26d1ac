"""The one form that every aligner has: an affine map between the residual streams of two models, in factors."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AffineMap:
    """Affine map y = (x - input_mean) @ basis @ coefficients + output_mean, kept in factors.

    Attributes:
        input_mean: [input_size].
        output_mean: [output_size].
        basis: [input_size, rank], orthonormal columns.
        coefficients: [rank, output_size].
    """

    input_mean: Tensor
    output_mean: Tensor
    basis: Tensor
    coefficients: Tensor

    def states(self, states: Tensor) -> Tensor:
        """Map states [..., input_size] to [..., output_size]."""
        return (states.to(self.basis.dtype) - self.input_mean) @ self.basis @ self.coefficients + self.output_mean

    def direction(self, direction: Tensor) -> Tensor:
        """Map a direction [..., input_size]. The means play no part: a difference of states has no bias."""
        return direction.to(self.basis.dtype) @ self.basis @ self.coefficients

    def weight(self) -> Tensor:
        """The map as a linear layer's weight, [output_size, input_size]."""
        return (self.basis @ self.coefficients).T.contiguous()

    def bias(self) -> Tensor:
        """The map as a linear layer's bias, [output_size]."""
        return self.output_mean - self.direction(self.input_mean)
