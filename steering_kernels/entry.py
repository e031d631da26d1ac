"""Entries of the operation table in words, and their packing into the tensors that the operators read."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from steering_kernels.table import CODE_WIDTH, MAX_OPS, PARAM_WIDTH, Flag, Kind


class Entry(NamedTuple):
    """One intervention of a slot at a layer; the fields are those of `table.Code` and `table.Param`."""

    kind: Kind
    read: int = -1
    write: int = -1
    read2: int = -1
    write2: int = -1
    gate: int = -1
    gate_out: int = -1
    flags: Flag = Flag(0)
    scale: float = 1.0
    a: float = 0.0
    b: float = 0.0
    c: float = 0.0


def pack(slots: Sequence[Sequence[Entry]], max_ops: int = MAX_OPS) -> tuple[Tensor, Tensor]:
    """Entries of every slot, in the order in which they apply.

    Returns:
        codes: [num_slots, max_ops, CODE_WIDTH], int32; END behind the last entry of a slot.
        params: [num_slots, max_ops, PARAM_WIDTH], fp32.

    Raises:
        ValueError: a slot holds more than `max_ops` entries.
    """
    codes = torch.zeros(len(slots), max_ops, CODE_WIDTH, dtype=torch.int32)
    params = torch.zeros(len(slots), max_ops, PARAM_WIDTH)
    for slot, entries in enumerate(slots):
        if len(entries) > max_ops:
            raise ValueError(f"slot {slot} has {len(entries)} entries, the most is {max_ops}: raise max_ops")
        for index, entry in enumerate(entries):
            codes[slot, index] = torch.tensor([int(code) for code in entry[:CODE_WIDTH]], dtype=torch.int32)
            params[slot, index] = torch.tensor(entry[CODE_WIDTH:])
    return codes, params
