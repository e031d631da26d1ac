"""Principal coordinates of states, in which directions are fitted and from which they are mapped back."""

from dataclasses import dataclass

from torch import Tensor

from artifacts.aligner.axes import principal_axes


@dataclass(frozen=True)
class Coordinates:
    """Coordinates z = (x - mean) @ basis / scale of states x. Nothing is [width, width].

    Attributes:
        mean: [width], float64.
        basis: [width, rank], float64, orthonormal columns, largest variance first.
        scale: [rank], float64.
    """

    mean: Tensor
    basis: Tensor
    scale: Tensor

    def of(self, states: Tensor) -> Tensor:
        """Coordinates [num_rows, rank] of states [num_rows, width], float64."""
        return (states.double() - self.mean) @ self.basis / self.scale

    def covector(self, vector: Tensor) -> Tensor:
        """Gradient by x of a function whose gradient by z is `vector` [rank]; [width], float64.

        Its product with a centred state is that of `vector` with the coordinates.
        """
        return self.basis @ (vector / self.scale)

    def displacement(self, vector: Tensor) -> Tensor:
        """How states move when their coordinates move by `vector` [rank]; [width], float64."""
        return self.basis @ (vector * self.scale)


def whitened(states: Tensor, components: int, seed: int = 0) -> Coordinates:
    """At most `components` coordinates, each of unit variance over the rows of `states` [num_rows, width].

    Raises:
        ValueError: fewer than two rows, or all rows equal.
    """
    axes = principal_axes(states, components, seed)
    return Coordinates(axes.mean, axes.basis, axes.scales / (len(states) - 1) ** 0.5)


def rotated(states: Tensor, components: int, seed: int = 0) -> Coordinates:
    """At most `components` coordinates with one common scale that makes their mean variance 1.

    Angles between states stay as they are, so a ridge penalty means the same as in the states themselves.

    Raises:
        ValueError: fewer than two rows, or all rows equal.
    """
    axes = principal_axes(states, components, seed)
    common = (axes.scales.square().mean() / (len(states) - 1)).sqrt()
    return Coordinates(axes.mean, axes.basis, common.expand(axes.rank))
