"""Slot id and strength of every token of a step: from a host buffer to the device."""

from dataclasses import dataclass

import numpy as np
import torch

# Steps that may be under way at once: one on the device while the host prepares the next, and one to spare.
_NUM_BUFFERS = 3


@dataclass
class _HostBuffer:
    """Source of one copy; it is filled again only after the copy has run."""

    data: torch.Tensor
    copied: torch.cuda.Event | None
    num_dirty: int = 0

    @property
    def slot_ids(self) -> np.ndarray:
        array: np.ndarray = self.data[0].numpy()
        return array

    @property
    def strengths(self) -> np.ndarray:
        # Stored by their bits, in one allocation with the slot ids.
        array: np.ndarray = self.data[1].view(torch.float32).numpy()
        return array


class TokenTable:
    """What the kernels know about the tokens of the current step.

    Attributes:
        slot_ids: [max_num_tokens], int32, on the device; -1 = unsteered.
        strengths: [max_num_tokens], fp32, on the device.
        host_slot_ids: int32, the host buffer of this step, for the runner to fill between `clear` and `publish`.
        host_strengths: fp32, likewise.
    """

    def __init__(self, max_num_tokens: int, device: torch.device) -> None:
        on_gpu = device.type != "cpu"
        self._buffers = [_new_buffer(max_num_tokens, on_gpu) for _ in range(_NUM_BUFFERS if on_gpu else 1)]
        self._device = self._buffers[0].data.to(device, copy=True)
        self.slot_ids = self._device[0]
        self.strengths = self._device[1].view(torch.float32)
        self._current = 0
        self._num_dirty = 0
        self.clear()

    def clear(self) -> None:
        """Take a host buffer whose copy has run and mark every token in it unsteered."""
        self._current = (self._current + 1) % len(self._buffers)
        buffer = self._buffers[self._current]
        if buffer.copied is not None:
            buffer.copied.synchronize()
        self.host_slot_ids, self.host_strengths = buffer.slot_ids, buffer.strengths
        self.host_slot_ids[: buffer.num_dirty] = -1

    def publish(self, num_tokens: int) -> None:
        """Copy the first num_tokens, and what the step before left behind them, to the device."""
        buffer = self._buffers[self._current]
        buffer.num_dirty = num_tokens
        count = max(num_tokens, self._num_dirty)
        if count:
            # Row by row: of a strided source torch first makes a copy that is not pinned, and waits for the device.
            for target, source in zip(self._device, buffer.data, strict=True):
                target[:count].copy_(source[:count], non_blocking=True)
            if buffer.copied is not None:
                buffer.copied.record()
        self._num_dirty = num_tokens


def _new_buffer(max_num_tokens: int, on_gpu: bool) -> _HostBuffer:
    data = torch.zeros(2, max_num_tokens, dtype=torch.int32, pin_memory=on_gpu)
    data[0] = -1
    return _HostBuffer(data, torch.cuda.Event() if on_gpu else None)
