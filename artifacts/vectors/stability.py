"""How much a direction depends on the rows that it was fitted on, and on wrong labels among them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from artifacts.vectors.score import SignError

# Fits a direction [width] from states [num_rows, width], labels [num_rows] and group numbers [num_rows], int64. A fit
# may raise SignError; then it found no direction, and its cosine counts as 0.
Fit = Callable[[Tensor, Tensor, Tensor], Tensor]

FLIPPED_SHARES = (0.05, 0.1, 0.2)
_DRAWS = 100


class Stability(NamedTuple):
    """Cosines of fits on resampled rows.

    Attributes:
        mean: of bootstrap fits to the full fit. Noise does not give 0 here, because a bootstrap sample shares most of
            its rows with the full one: difference of means on pure noise gives about 0.7.
        low: 5th percentile of the same.
        halves: mean between fits on two disjoint halves of the groups; 0 for noise.
    """

    mean: float
    low: float
    halves: float


class FlipSensitivity(NamedTuple):
    """Mean cosine to the full fit after a share of the labels has been flipped."""

    share: float
    cosine: float


def group_numbers(names: Sequence[str]) -> Tensor:
    """Number the groups in order of appearance, [num_rows], int64."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(name, len(numbers)) for name in names], dtype=torch.int64)


def stability(fit: Fit, states: Tensor, labels: Tensor, groups: Tensor, resamples: int, seed: int) -> Stability:
    """Refit on groups drawn with replacement, and on two halves of the groups, each `resamples` times.

    Groups, not rows, are resampled, because rows on the same content are not independent (the cluster bootstrap; Efron
    and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 8). Angles stay the same in principal coordinates
    with one scale, so hand those in place of wide states to save time.

    Args:
        fit: any estimator.
        states: [num_rows, width]; labels: [num_rows], 0 or 1; groups: [num_rows], int64.
        resamples: >= 1.
        seed: of the draws.

    Raises:
        SignError: the full fit has no sign.
        ValueError: fewer than two groups, or draws that hold one class only.
    """
    names = groups.unique()
    if len(names) < 2:
        raise ValueError(f"{len(names)} group(s) cannot be resampled; at least 2 are needed")
    members = [torch.nonzero(groups == name).flatten() for name in names]
    generator = torch.Generator().manual_seed(seed)
    full = fit(states, labels, groups)
    cosines, halves = [], []
    for _ in range(resamples):
        drawn = _usable(lambda: torch.randint(len(names), (len(names),), generator=generator), members, labels)
        cosines.append(_cosine(full, _refit(fit, states, labels, members, drawn)))
        order = _usable(lambda: torch.randperm(len(names), generator=generator), members, labels, halved=True)
        first, second = (_refit(fit, states, labels, members, half) for half in order.tensor_split(2))
        halves.append(_cosine(first, second))
    values = torch.tensor(cosines, dtype=torch.float64)
    return Stability(float(values.mean()), float(values.quantile(0.05)), sum(halves) / len(halves))


def flip_sensitivity(
    fit: Fit,
    states: Tensor,
    labels: Tensor,
    groups: Tensor,
    resamples: int,
    seed: int,
    shares: Sequence[float] = FLIPPED_SHARES,
) -> list[FlipSensitivity]:
    """Refit after flipping a share of the labels, drawn at random from all rows.

    Args:
        fit: any estimator.
        states: [num_rows, width]; labels: [num_rows], 0 or 1; groups: [num_rows], int64.
        resamples: draws per share, >= 1.
        seed: of the draws.
        shares: of the rows, in (0, 1); at least one row is flipped.

    Raises:
        SignError: the full fit has no sign.
        ValueError: a draw leaves one class only.
    """
    generator = torch.Generator().manual_seed(seed)
    full = fit(states, labels, groups)
    result = []
    for share in shares:
        total = 0.0
        for _ in range(resamples):
            flipped = labels.clone()
            rows = torch.randperm(len(labels), generator=generator)[: max(1, round(share * len(labels)))]
            flipped[rows] = 1 - flipped[rows]
            total += _cosine(full, _attempt(fit, states, flipped, groups))
        result.append(FlipSensitivity(share, total / resamples))
    return result


def _usable(draw: Callable[[], Tensor], members: Sequence[Tensor], labels: Tensor, halved: bool = False) -> Tensor:
    """The first of up to 100 draws of groups in which both classes occur, in both halves where it will be halved."""
    for _ in range(_DRAWS):
        drawn = draw()
        parts = drawn.tensor_split(2) if halved else (drawn,)
        if all(len(labels[_rows(members, part)].unique()) == 2 for part in parts):
            return drawn
    raise ValueError(f"{_DRAWS} draws of {len(members)} groups held one class only; more groups of each are needed")


def _rows(members: Sequence[Tensor], drawn: Tensor) -> Tensor:
    return torch.cat([members[index] for index in drawn.tolist()])


def _refit(fit: Fit, states: Tensor, labels: Tensor, members: Sequence[Tensor], drawn: Tensor) -> Tensor | None:
    rows = _rows(members, drawn)
    # A group that was drawn twice counts as two groups.
    sizes = torch.tensor([len(members[index]) for index in drawn.tolist()])
    return _attempt(fit, states[rows], labels[rows], torch.arange(len(drawn)).repeat_interleave(sizes))


def _attempt(fit: Fit, states: Tensor, labels: Tensor, groups: Tensor) -> Tensor | None:
    try:
        return fit(states, labels, groups)
    except SignError:
        return None


def _cosine(first: Tensor | None, second: Tensor | None) -> float:
    if first is None or second is None:
        return 0.0
    return float(torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=0))
