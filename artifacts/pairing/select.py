"""Which layers to pair, by how much they share or by where they lie."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from artifacts.pairing.information import LayerInformation

Preference = Literal["low-mi", "high-mi"]


class LayerPair(NamedTuple):
    """An expert layer and the target layer that it is to steer, both 0-based."""

    expert: int
    target: int


def pairs_by_information(
    information: LayerInformation,
    expert_layers: Sequence[int],
    target_layers: Sequence[int],
    preference: Preference,
    level: float = 0.05,
    one_to_one: bool = False,
) -> list[LayerPair]:
    """Layer pairs whose mutual information is significant, ranked by it.

    `low-mi` is the paper's choice: intervene where the models differ. Without the test it would find layers that share
    nothing at all, dead ones first. `high-mi` puts the pairs first whose states tell most about each other. Equals keep
    the order of their layers.

    Args:
        information: rows are `expert_layers`, columns `target_layers`.
        level: false discovery rate, in (0, 1); a pair counts where q <= level.
        one_to_one: every layer in one pair at most, the better-ranked pair first.

    Raises:
        ValueError: the layers do not fit the matrix, or no pair is significant.
    """
    if tuple(information.q.shape) != (len(expert_layers), len(target_layers)):
        raise ValueError(
            f"a matrix of {tuple(information.q.shape)} for {len(expert_layers)} expert and {len(target_layers)} target "
            "layers"
        )
    q, value = information.q.tolist(), information.value.tolist()
    cells = [(i, j) for i in range(len(expert_layers)) for j in range(len(target_layers)) if q[i][j] <= level]
    if not cells:
        raise ValueError(_no_pair(information, level))
    direction = 1 if preference == "low-mi" else -1
    cells.sort(key=lambda cell: direction * value[cell[0]][cell[1]])
    pairs = [LayerPair(expert_layers[i], target_layers[j]) for i, j in cells]
    return first_of_each(pairs) if one_to_one else pairs


def pairs_by_depth(
    expert_layers: Sequence[int],
    target_layers: Sequence[int],
    expert_depth: int,
    target_depth: int,
    one_to_one: bool = False,
) -> list[LayerPair]:
    """Every target layer with the expert layer at the nearest relative depth, the middle of the target first.

    Relative depth is layer / (number of layers - 1), so that first and last blocks meet. Steering works best in the
    middle of a network, hence the order; equals go to the lower layer.

    Args:
        expert_layers, target_layers: that may be paired, not empty.
        expert_depth, target_depth: number of decoder blocks of each model.
        one_to_one: every expert layer once at most, for the target layer nearest to the middle.
    """
    # Both depths times both denominators: whole numbers, so that equals are equal.
    expert_last, target_last = max(expert_depth - 1, 1), max(target_depth - 1, 1)

    def distance(expert: int, target: int) -> int:
        return abs(expert * target_last - target * expert_last)

    pairs = [
        LayerPair(min(sorted(expert_layers), key=lambda expert: distance(expert, target)), target)
        for target in sorted(target_layers, key=lambda target: (abs(2 * target - target_last), target))
    ]
    return first_of_each(pairs) if one_to_one else pairs


def first_of_each(pairs: Iterable[LayerPair]) -> list[LayerPair]:
    """Pairs in their order, without those of which a layer has already been taken."""
    experts: set[int] = set()
    targets: set[int] = set()
    chosen = []
    for pair in pairs:
        if pair.expert not in experts and pair.target not in targets:
            experts.add(pair.expert)
            targets.add(pair.target)
            chosen.append(pair)
    return chosen


def _no_pair(information: LayerInformation, level: float) -> str:
    remedies = ["use more paired texts", "pair by same-depth or held-out"]
    if float(information.p.min()) <= 1 / (1 + information.permutations):
        # The least p that the null can give, times the number of pairs, may lie above the bound.
        remedies.insert(0, f"use more than {information.permutations} permutations")
    return (
        f"none of {information.q.numel()} layer pairs has significant mutual information: the smallest q is "
        f"{float(information.q.min()):.3f}, the bound {level:g}; {', '.join(remedies[:-1])} or {remedies[-1]}"
    )
