"""A backend of the GPU behind the interface that the tests use for those of the host."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def moved(tensor: Tensor) -> Tensor:
    """The tensor on the GPU, with its whole buffer: same strides, same alignment, same neighbours."""
    buffer = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return buffer.cuda().as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


class OnDevice:
    """Runs calls for tensors on the host on the GPU, and brings back whatever was written, also between rows."""

    def __init__(self, backend: ModuleType) -> None:
        self._backend = backend

    def steer_(self, *args: Any) -> None:
        self._run("steer_", args)

    def steer_add_rms_norm_(self, *args: Any) -> None:
        self._run("steer_add_rms_norm_", args)

    def _run(self, operator: str, args: tuple[Any, ...]) -> None:
        on_device = [moved(arg) if isinstance(arg, Tensor) else arg for arg in args]
        getattr(self._backend, operator)(*on_device)
        for arg, result in zip(args, on_device, strict=True):
            if isinstance(arg, Tensor):
                arg.untyped_storage().copy_(result.untyped_storage())
