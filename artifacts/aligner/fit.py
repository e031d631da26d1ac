"""Every aligner method by name, fitted through one entry."""

from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from torch import Tensor

from artifacts.aligner.affine import AffineMap
from artifacts.aligner.autoencoder import fit_autoencoder
from artifacts.aligner.axes import PrincipalAxes
from artifacts.aligner.cca import fit_cca
from artifacts.aligner.joint import fit_joint, fit_joint_encoder
from artifacts.aligner.procrustes import fit_procrustes
from artifacts.aligner.ridge import choose_ridge, fit_ridge, r_squared
from artifacts.aligner.targets import centred_targets
from artifacts.vectors.refusal import require_finite

# Pairs and reconstruction count alike.
JOINT_WEIGHT: Final = 1.0

# (axes, outputs, regularisation, seed, joint_weight), each method reading what it has.
Fit = Callable[[PrincipalAxes, Tensor, float, int, float], AffineMap]


class Aligner(NamedTuple):
    """One method.

    Attributes:
        fit: yields the map from the expert to the target.
        regularised: whether it has a hyper-parameter that held-out pairs choose.
        paired: whether the pairs teach it anything. Without them R^2 against the target is about chance.
        decoder: yields the method's own map back, None where it has none.
    """

    fit: Fit
    regularised: bool
    paired: bool = True
    decoder: Fit | None = None


def _output_mean(axes: PrincipalAxes, outputs: Tensor) -> Tensor:
    return centred_targets(axes, outputs)[1]


ALIGNERS: Final[Mapping[str, Aligner]] = {
    "ridge": Aligner(lambda axes, outputs, value, seed, weight: fit_ridge(axes, outputs, value), regularised=True),
    "procrustes": Aligner(lambda axes, outputs, value, seed, weight: fit_procrustes(axes, outputs), regularised=False),
    "cca": Aligner(lambda axes, outputs, value, seed, weight: fit_cca(axes, outputs, value), regularised=True),
    "joint": Aligner(
        lambda axes, outputs, value, seed, weight: fit_joint_encoder(axes, outputs, value, weight),
        regularised=True,
        decoder=lambda axes, outputs, value, seed, weight: fit_joint(axes, outputs, value, weight).decoder,
    ),
    "autoencoder": Aligner(
        lambda axes, outputs, value, seed, weight: fit_autoencoder(axes, _output_mean(axes, outputs), seed).encoder,
        regularised=False,
        paired=False,
        decoder=lambda axes, outputs, value, seed, weight: (
            fit_autoencoder(axes, _output_mean(axes, outputs), seed).decoder
        ),
    ),
}


def fit_aligner(
    method: str,
    axes: PrincipalAxes,
    outputs: Tensor,
    regularisation: float = 0.0,
    seed: int = 0,
    joint_weight: float = JOINT_WEIGHT,
) -> AffineMap:
    """Fit one method on pairs.

    Args:
        method: a key of ALIGNERS.
        axes: of the expert's states, num_rows rows.
        outputs: [num_rows, output_size], the target's states of the same texts, any float dtype.
        regularisation: from `choose_regularisation`; methods that are `regularised` read it and need it above
            0.
        seed: of the initial weights of `autoencoder`; the others have none.
        joint_weight: of the pairs against the reconstruction in `joint`.

    Raises:
        ValueError: an unknown method, a hyper-parameter out of its range, or target rows that do not pair, are not
            finite or are all equal.
    """
    return _aligner(method, regularisation).fit(axes, outputs, regularisation, seed, joint_weight)


def fit_decoder(
    method: str,
    axes: PrincipalAxes,
    outputs: Tensor,
    regularisation: float = 0.0,
    seed: int = 0,
    joint_weight: float = JOINT_WEIGHT,
) -> AffineMap:
    """The method's own map from the target's size to the expert's; arguments as in `fit_aligner`.

    Raises:
        ValueError: as `fit_aligner`, or a method without a decoder.
    """
    decoder = _aligner(method, regularisation).decoder
    if decoder is None:
        owners = ", ".join(name for name, each in ALIGNERS.items() if each.decoder)
        raise ValueError(
            f"{method} has no decoder ({owners} have); fit it from the target's axes to the expert's states"
        )
    return decoder(axes, outputs, regularisation, seed, joint_weight)


def choose_regularisation(
    method: str,
    axes: PrincipalAxes,
    outputs: Tensor,
    held_inputs: Tensor,
    held_outputs: Tensor,
    grid: Sequence[float],
    joint_weight: float = JOINT_WEIGHT,
) -> float:
    """The value of `grid` with the best R^2 on held-out pairs, the larger one of equals; 0 for a method that has none.

    Args:
        method, axes, outputs, joint_weight: as in `fit_aligner`.
        held_inputs, held_outputs: [num_held, input_size], [num_held, output_size], rows that `axes` does not hold.
        grid: all > 0.

    Raises:
        ValueError: as `fit_aligner`, or held-out rows that are not finite.
    """
    if not _aligner(method, min(grid)).regularised:
        return 0.0
    if method == "ridge":
        return choose_ridge(axes, outputs, held_inputs, held_outputs, grid)
    require_finite(held_inputs, "held-out expert states")
    require_finite(held_outputs, "held-out target states")

    def score(value: float) -> tuple[float, float]:
        fitted = fit_aligner(method, axes, outputs, value, joint_weight=joint_weight)
        return r_squared(fitted.states(held_inputs), held_outputs, fitted.output_mean), value

    return max(map(score, grid))[1]


def _aligner(method: str, regularisation: float) -> Aligner:
    if method not in ALIGNERS:
        raise ValueError(f"no aligner {method!r}; choose one of {', '.join(ALIGNERS)}")
    aligner = ALIGNERS[method]
    if aligner.regularised and not regularisation > 0:
        raise ValueError(
            f"regularisation {regularisation:g} of {method}; it must be above 0 (choose_regularisation finds it)"
        )
    return aligner
