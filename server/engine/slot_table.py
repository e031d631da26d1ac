"""What each slot applies at each layer, on the device."""

from collections import OrderedDict
from collections.abc import Callable, Collection

import numpy as np
import torch

from server.engine.row_pool import RowPool
from server.engine.triggers import TriggerTable
from steering_kernels import CODE_WIDTH, MAX_OPS, NUM_GATES, PARAM_WIDTH, Param

# What a slot applies: (program key, factor) in order.
SlotKey = tuple[tuple[str, float], ...]


class SlotTable:
    """A cache over slot keys: an entry lives until its slot is needed.

    There are more slots than a batch can use at once, so a batch never waits for a slot and a slot in use is never
    taken away.

    Attributes:
        codes: [num_layers, num_slots, MAX_OPS, CODE_WIDTH], int32.
        params: [num_layers, num_slots, MAX_OPS, PARAM_WIDTH], fp32.
        triggers: which gates of a slot follow a token's id.
    """

    def __init__(self, pool: RowPool, num_layers: int, num_slots: int, triggers: TriggerTable) -> None:
        device = pool.rows.device
        self.codes = torch.zeros(num_layers, num_slots, MAX_OPS, CODE_WIDTH, dtype=torch.int32, device=device)
        self.params = torch.zeros(num_layers, num_slots, MAX_OPS, PARAM_WIDTH, dtype=torch.float32, device=device)
        self.triggers = triggers
        self._pool = pool
        self._free = list(range(num_slots))
        self._slots: OrderedDict[SlotKey, int] = OrderedDict()

    def slot_of(self, key: SlotKey, in_use: Callable[[], Collection[SlotKey]]) -> int:
        """Slot that applies `key`, filled now if need be.

        Args:
            key: what to apply; all its bundles are resident, and the API has checked that it fits.
            in_use: gives the keys of the current batch, whose slots stay; asked only when no slot is free.
        """
        if key in self._slots:
            self._slots.move_to_end(key)
            return self._slots[key]
        if not self._free:
            kept = in_use()
            oldest = next(other for other in self._slots if other not in kept)
            self._free_slot(oldest)
        slot = self._free.pop()
        self._slots[key] = slot
        self._write(slot, key)
        return slot

    def forget(self, bundle: str) -> None:
        """Drop every slot that applies a bundle, so that a later bundle in its rows is never applied by mistake."""
        for key in [key for key in self._slots if any(digest == bundle for digest, _ in key)]:
            self._free_slot(key)

    def _free_slot(self, key: SlotKey) -> None:
        slot = self._slots.pop(key)
        self.triggers.release(slot)
        self._free.append(slot)

    def _write(self, slot: int, key: SlotKey) -> None:
        num_layers = self.codes.shape[0]
        codes = np.zeros((num_layers, MAX_OPS, CODE_WIDTH), dtype=np.int32)
        params = np.zeros((num_layers, MAX_OPS, PARAM_WIDTH), dtype=np.float32)
        filled = np.zeros(num_layers, dtype=np.int64)
        first_gate = 0
        gates: dict[int, tuple[int, ...]] = {}
        for bundle, factor in key:
            resident = self._pool[bundle]
            entries = resident.entries
            indices = filled[entries.layers] + entries.indices
            # An index over MAX_OPS raises: the API has checked that the interventions of a request fit.
            codes[entries.layers, indices] = entries.codes_with(first_gate)
            params[entries.layers, indices, Param.A :] = entries.params
            params[entries.layers, indices, Param.SCALE] = factor
            np.add.at(filled, entries.layers, 1)
            gates |= {first_gate + gate: tokens for gate, tokens in resident.program.triggers.items()}
            first_gate += resident.program.num_gates
        assert first_gate <= NUM_GATES
        # On the compute stream and therefore after the steps that still read the slot's old content. The sources are
        # pageable and of this call alone: the copies have left them when they return.
        self.codes[:, slot].copy_(torch.from_numpy(codes))
        self.params[:, slot].copy_(torch.from_numpy(params))
        self.triggers.assign(slot, gates)
