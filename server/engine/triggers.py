"""Gates that follow a token's id: evaluated on the device, because under asynchronous scheduling only it knows them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from steering_kernels import NUM_GATES


class TriggerTable:
    """Which gate of which slot is 1 for which token ids.

    A step sets the gates before the model runs and outside its CUDA graph, so the masks may grow; the gates themselves
    keep their address.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._rows = torch.full((num_slots, NUM_GATES), -1, dtype=torch.int64, device=device)
        self._masks = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self._row_of: dict[tuple[int, ...], int] = {}

    def assign(self, slot: int, gates: Mapping[int, tuple[int, ...]]) -> None:
        """Say which gates of a slot follow the token ids, and which; its other gates are left to conditions."""
        rows = torch.full((NUM_GATES,), -1, dtype=torch.int64)
        for gate, tokens in gates.items():
            rows[gate] = self._row(tokens)
        self._rows[slot].copy_(rows)

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

    def _row(self, tokens: tuple[int, ...]) -> int:
        if tokens not in self._row_of:
            mask = torch.zeros(1, self._masks.shape[1], dtype=torch.bool)
            mask[0, [token for token in tokens if token < mask.shape[1]]] = True
            self._masks = torch.cat([self._masks, mask.to(self._masks.device)])
            self._row_of[tokens] = self._masks.shape[0] - 1
        return self._row_of[tokens]
