"""Which rows must stay on one side of a split."""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


def families(groups: Sequence[str], templates: Sequence[str | None]) -> list[str]:
    """Name of each row's family: the connected rows, where two rows of one group or of one template are connected.

    Args:
        groups: of the rows.
        templates: of the rows; None connects nothing.

    Returns:
        The alphabetically first group of the row's family, which depends neither on the order nor on other families.
    """
    nodes: dict[tuple[str, str], int] = {}
    left = [nodes.setdefault(("group", group), len(nodes)) for group in groups]
    right = [
        node if template is None else nodes.setdefault(("template", template), len(nodes))
        for node, template in zip(left, templates, strict=True)
    ]
    graph = coo_array((np.ones(len(left)), (left, right)), shape=(len(nodes), len(nodes)))
    _, family = connected_components(graph, directed=False)
    names: dict[int, str] = {}
    for group, node in zip(groups, left, strict=True):
        names[family[node]] = min(group, names.get(family[node], group))
    return [names[family[node]] for node in left]
