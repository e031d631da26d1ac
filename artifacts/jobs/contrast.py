"""Which contrast rows a direction is fitted on, chosen with and held out from."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from artifacts.jobs.data import ContrastRow, split_by_group
from artifacts.jobs.errors import BuildError

CHOOSE_SHARE = 0.15
HELD_SHARE = 0.15


class ContrastSplit(NamedTuple):
    """Labels [num_rows] of the contrast rows and the row indices of each part."""

    labels: Tensor
    fit: list[int]
    choose: list[int]
    held: list[int]

    @property
    def known(self) -> list[int]:
        """Everything but the held-out rows."""
        return sorted([*self.fit, *self.choose])


def split_contrast(rows: Sequence[ContrastRow], seed: int) -> ContrastSplit:
    """The file's own splits where it has any (tune rows choose, test rows are held out), else a split by group.

    Raises:
        BuildError: a part lacks one of the labels.
    """
    labels = torch.tensor([row.label for row in rows])
    parts = {name: [index for index, row in enumerate(rows) if row.split == name] for name in ("fit", "tune", "test")}
    if parts["tune"] or parts["test"]:
        # With only one of the two given, it serves for both: better than held-out rows that were fitted on.
        split = ContrastSplit(labels, parts["fit"], parts["tune"] or parts["test"], parts["test"] or parts["tune"])
    else:
        split = ContrastSplit(labels, *split_by_group(rows, CHOOSE_SHARE, HELD_SHARE, seed))
    for name in ("fit", "choose", "held"):
        present = set(labels[getattr(split, name)].tolist())
        if present != {0, 1}:
            raise BuildError(
                f"the `{name}` part of the contrast rows has labels {sorted(present)}; both 0 and 1 are needed, "
                "so give more groups or rows of the other label"
            )
    return split
