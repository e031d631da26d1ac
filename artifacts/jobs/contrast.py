"""Which contrast rows a direction is fitted on, chosen with and held out from."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from artifacts.jobs.data import ContrastRow, content, split_by_group
from artifacts.jobs.errors import BuildError
from artifacts.jobs.families import families

CHOOSE_SHARE = 0.15
HELD_SHARE = 0.15


def first_half(rows: Sequence[ContrastRow], seed: int) -> list[bool]:
    """Rows that the aligner is fitted on when there are no mapping texts; no group or template is in both halves."""
    groups = [row.group if row.group is not None else content(row) for row in rows]
    names = families(groups, [row.template for row in rows])
    ordered = sorted(set(names), key=lambda name: hashlib.sha256(f"{seed}\nhalf\n{name}".encode()).digest())
    chosen = set(ordered[: len(ordered) // 2])
    return [name in chosen for name in names]


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


def _choose_and_hold(
    rows: Sequence[ContrastRow], tune: list[int], test: list[int], seed: int
) -> tuple[list[int], list[int]]:
    """Tune rows choose and test rows are held out; where only one of the two is given, it is halved by group."""
    if tune and test:
        return tune, test
    given = tune or test
    chosen = first_half([rows[index] for index in given], seed)
    return (
        [index for index, taken in zip(given, chosen, strict=True) if taken],
        [index for index, taken in zip(given, chosen, strict=True) if not taken],
    )


def split_contrast(rows: Sequence[ContrastRow], seed: int) -> ContrastSplit:
    """The file's own splits where it has any (tune rows choose, test rows are held out), else a split by group.

    Raises:
        BuildError: a part lacks one of the labels.
    """
    labels = torch.tensor([row.label for row in rows])
    parts = {name: [index for index, row in enumerate(rows) if row.split == name] for name in ("fit", "tune", "test")}
    if parts["tune"] or parts["test"]:
        split = ContrastSplit(labels, parts["fit"], *_choose_and_hold(rows, parts["tune"], parts["test"], seed))
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
