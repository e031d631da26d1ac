"""Gates that follow a token's id: evaluated on the device, because under asynchronous scheduling only it knows them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from steering_kernels import NUM_GATES


class TriggerTable:
    """Which gate of which slot is 1 for which token ids.

    A step sets the gates before the model runs and outside its CUDA graph, so the masks may grow; the gates themselves
    keep their address. A mask lives as long as a slot uses it, and its row is used again.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._rows = torch.full((num_slots, NUM_GATES), -1, dtype=torch.int64, device=device)
        self._masks = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self._free: list[int] = []
        # Row of the mask of some token ids, and how many gates use it.
        self._row_of: dict[tuple[int, ...], int] = {}
        self._num_users: dict[tuple[int, ...], int] = {}
        self._used: dict[int, tuple[tuple[int, ...], ...]] = {}

    def assign(self, slot: int, gates: Mapping[int, tuple[int, ...]]) -> None:
        """Say which gates of a slot follow the token ids, and which; its other gates are left to conditions."""
        self.release(slot)
        rows = torch.full((NUM_GATES,), -1, dtype=torch.int64)
        for gate, tokens in gates.items():
            rows[gate] = self._acquire(tokens)
        if gates:
            self._used[slot] = tuple(gates.values())
        self._rows[slot].copy_(rows)

    def release(self, slot: int) -> None:
        """Give up what a slot used; no token may carry it until it is assigned again."""
        for tokens in self._used.pop(slot, ()):
            self._num_users[tokens] -= 1
            if not self._num_users[tokens]:
                del self._num_users[tokens]
                self._free.append(self._row_of.pop(tokens))

    def set_gates_(self, gates: Tensor, slot_ids: Tensor, input_ids: Tensor) -> None:
        """Set the triggered gates of the tokens of a step.

        Args:
            gates: [num_tokens, NUM_GATES], fp32. Changed in place.
            slot_ids: [num_tokens], int32; -1 for none.
            input_ids: [num_tokens], integer.
        """
        if not self._row_of:
            return
        rows = self._rows[slot_ids.clamp_min(0).long()]
        # Placeholders of multimodal tokens may lie outside the vocabulary; they match nothing.
        known = (input_ids >= 0) & (input_ids < self._masks.shape[1])
        tokens = torch.where(known, input_ids, 0).long()
        hits = self._masks[rows.clamp_min(0), tokens[:, None]] & known[:, None]
        gates.copy_(torch.where((rows >= 0) & (slot_ids >= 0)[:, None], hits.float(), gates))

    @property
    def num_masks(self) -> int:
        """Masks in use."""
        return len(self._row_of)

    def _acquire(self, tokens: tuple[int, ...]) -> int:
        self._num_users[tokens] = self._num_users.get(tokens, 0) + 1
        if tokens not in self._row_of:
            if not self._free:
                self._grow()
            row = self._row_of[tokens] = self._free.pop()
            mask = torch.zeros(self._masks.shape[1], dtype=torch.bool)
            mask[[token for token in tokens if 0 <= token < mask.shape[0]]] = True
            # On the compute stream, after the steps that still read what the row held before.
            self._masks[row].copy_(mask)
        return self._row_of[tokens]

    def _grow(self) -> None:
        count = self._masks.shape[0]
        added = max(1, count)
        self._masks = torch.cat([self._masks, self._masks.new_zeros(added, self._masks.shape[1])])
        self._free.extend(reversed(range(count, count + added)))
