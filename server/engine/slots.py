"""Device storage of steering: row pool, operation tables, and one slot id and strength per token."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping

import numpy as np
import torch
from torch import Tensor

# Terms that one request may combine, and write rows that one slot may hold at one layer.
MAX_OPS = 4

# What a slot applies: (bundle digest, factor) in order.
SlotKey = tuple[tuple[str, float], ...]


class RowPoolFullError(ValueError):
    """The bundle needs more rows than the pool has free; nothing was changed."""


class RowPool:
    """Write rows of every resident bundle, allocated once and only ever rewritten in place.

    Attributes:
        rows: [num_rows, hidden_size], dtype of the model.
    """

    def __init__(self, num_rows: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = torch.zeros(num_rows, hidden_size, dtype=dtype, device=device)
        self._free = list(range(num_rows))
        self._bundles: dict[str, dict[int, list[int]]] = {}

    def load(self, bundle: str, writes: Mapping[int, Tensor]) -> None:
        """Store a bundle's write rows; a digest that is resident already is left as it is.

        Args:
            bundle: content digest.
            writes: layer -> [num_interventions, hidden_size], fp32.

        Raises:
            RowPoolFullError: too few free rows.
            ValueError: a row has another length, or a value is not finite in the model's dtype; nothing was changed.
        """
        if bundle in self._bundles:
            return
        needed = sum(vectors.shape[0] for vectors in writes.values())
        if needed > len(self._free):
            raise RowPoolFullError(
                f"{bundle} needs {needed} rows, {len(self._free)} of {self.rows.shape[0]} are free; "
                "raise --steering-rows or load fewer bundles."
            )
        for layer, vectors in writes.items():
            if vectors.dim() != 2 or vectors.shape[1] != self.rows.shape[1]:
                raise ValueError(
                    f"{bundle} has vectors {tuple(vectors.shape)} at layer {layer}, "
                    f"the model takes [num_interventions, {self.rows.shape[1]}]."
                )
            if not torch.isfinite(vectors.to(self.rows)).all():
                raise ValueError(f"{bundle} has values at layer {layer} that overflow the model's {self.rows.dtype}.")
        placed: dict[int, list[int]] = {}
        for layer, vectors in writes.items():
            placed[layer] = [self._free.pop(0) for _ in range(vectors.shape[0])]
            self.rows[placed[layer]] = vectors.to(self.rows)
        self._bundles[bundle] = placed

    def unload(self, bundle: str) -> None:
        """Give a bundle's rows back; the caller makes sure that no request uses it."""
        for rows in self._bundles.pop(bundle, {}).values():
            self._free.extend(rows)

    def rows_of(self, bundle: str) -> Mapping[int, list[int]]:
        """Layer -> row numbers, in the order in which they apply. Raises KeyError for an unknown digest."""
        return self._bundles[bundle]

    def __contains__(self, bundle: object) -> bool:
        return bundle in self._bundles

    @property
    def bundles(self) -> list[str]:
        """Digests of the resident bundles, sorted."""
        return sorted(self._bundles)

    @property
    def num_used(self) -> int:
        """Rows in use."""
        return self.rows.shape[0] - len(self._free)


class SlotTable:
    """What each slot applies at each layer. A cache over slot keys: an entry lives until its slot is needed.

    There are more slots than a batch can use at once (`num_slots` >= 3 per running request), so a batch never waits
    for a slot and a slot in use is never taken away.

    Attributes:
        write_rows: [num_layers, num_slots, MAX_OPS], int32; -1 for none.
        scales: [num_layers, num_slots, MAX_OPS], fp32.
    """

    def __init__(self, pool: RowPool, num_layers: int, num_slots: int) -> None:
        device = pool.rows.device
        self.write_rows = torch.full((num_layers, num_slots, MAX_OPS), -1, dtype=torch.int32, device=device)
        self.scales = torch.zeros(num_layers, num_slots, MAX_OPS, dtype=torch.float32, device=device)
        self._pool = pool
        self._free = list(range(num_slots))
        self._slots: OrderedDict[SlotKey, int] = OrderedDict()

    def slot_of(self, key: SlotKey, in_use: Callable[[], Collection[SlotKey]]) -> int:
        """Slot that applies `key`, filled now if need be.

        Args:
            key: what to apply; all its bundles are resident.
            in_use: gives the keys of the current batch, whose slots stay; asked only when no slot is free.
        """
        if key in self._slots:
            self._slots.move_to_end(key)
            return self._slots[key]
        if not self._free:
            kept = in_use()
            oldest = next(other for other in self._slots if other not in kept)
            self._free.append(self._slots.pop(oldest))
        slot = self._free.pop()
        self._slots[key] = slot
        self._write(slot, key)
        return slot

    def forget(self, bundle: str) -> None:
        """Drop every slot that applies a bundle, so that a later bundle in its rows is never applied by mistake."""
        for key in [key for key in self._slots if any(digest == bundle for digest, _ in key)]:
            self._free.append(self._slots.pop(key))

    def _write(self, slot: int, key: SlotKey) -> None:
        num_layers = self.write_rows.shape[0]
        rows = torch.full((num_layers, MAX_OPS), -1, dtype=torch.int32)
        scales = torch.zeros(num_layers, MAX_OPS, dtype=torch.float32)
        filled = [0] * num_layers
        for bundle, factor in key:
            for layer, numbers in self._pool.rows_of(bundle).items():
                for number in numbers:
                    rows[layer, filled[layer]] = number
                    scales[layer, filled[layer]] = factor
                    filled[layer] += 1
        # On the compute stream and therefore after the steps that still read the slot's old content.
        self.write_rows[:, slot].copy_(rows)
        self.scales[:, slot].copy_(scales)


class TokenTable:
    """Slot id and strength of every token of the current step: one host buffer, one copy per step.

    Attributes:
        slot_ids: [max_num_tokens], int32, on the device; -1 = unsteered.
        strengths: [max_num_tokens], fp32, on the device.
        host_slot_ids: int32 view of the host buffer, for the runner to fill.
        host_strengths: fp32 view of the host buffer.
    """

    def __init__(self, max_num_tokens: int, device: torch.device) -> None:
        pin = device.type != "cpu"
        # The strengths are stored by their bits, so that both rows travel in a single copy.
        self._host = torch.zeros(2, max_num_tokens, dtype=torch.int32, pin_memory=pin)
        self._host[0] = -1
        self._device = self._host.to(device, copy=True)
        self.slot_ids = self._device[0]
        self.strengths = self._device[1].view(torch.float32)
        self.host_slot_ids: np.ndarray = self._host[0].numpy()
        self.host_strengths: np.ndarray = self._host[1].view(torch.float32).numpy()
        self._num_dirty = 0

    def clear(self) -> None:
        """Mark every token unsteered on the host; `publish` makes it so on the device."""
        self.host_slot_ids[: self._num_dirty] = -1

    def publish(self, num_tokens: int) -> None:
        """Copy the host buffer's first num_tokens (and what the last step left behind them) to the device."""
        count = max(num_tokens, self._num_dirty)
        if count:
            self._device[:, :count].copy_(self._host[:, :count], non_blocking=True)
        self._num_dirty = num_tokens
