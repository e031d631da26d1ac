"""Which implementation of the operators runs where.

A backend is a module with `steer_`, `steer_add_rms_norm_` (arguments of `reference`) and `supports(device_type, dtype)`.
"""

import functools
from types import ModuleType
from typing import Any, Protocol

import torch

from steering_kernels import reference


class Backend(Protocol):
    """Interface of a backend module; semantics are those of `reference`."""

    def steer_(self, *args: Any) -> None: ...

    def steer_add_rms_norm_(self, *args: Any) -> None: ...


@functools.cache
def available(device_type: str, dtype: torch.dtype) -> dict[str, ModuleType]:
    """Backends that run here for a residual stream of `dtype` on "cpu" or "cuda", by name, fastest first."""
    return {"reference": reference}


@functools.cache
def chosen(device_type: str, dtype: torch.dtype) -> Any:
    """The backend that the operators use."""
    return next(iter(available(device_type, dtype).values()))


def name(device_type: str, dtype: torch.dtype) -> str:
    """Name of the backend that the operators use."""
    return next(iter(available(device_type, dtype)))
