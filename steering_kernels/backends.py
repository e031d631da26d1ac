"""Which implementation of the operators runs where.

A backend is a module with `steer_`, `steer_add_rms_norm_` (arguments of `reference`) and `supports(device_type,
dtype)`.
"""

import functools
import os
from types import ModuleType
from typing import Any, Protocol

import torch

from steering_kernels import native, reference


class Backend(Protocol):
    """Interface of a backend module; semantics are those of `reference`."""

    def steer_(self, *args: Any) -> None: ...

    def steer_add_rms_norm_(self, *args: Any) -> None: ...


@functools.cache
def available(device_type: str, dtype: torch.dtype) -> dict[str, ModuleType]:
    """Backends that run here for a residual stream of `dtype` on "cpu" or "cuda", by name, fastest first."""
    compiled = {"cpu": native} if native.supports(device_type, dtype) else {}
    if device_type == "cuda":
        # Not at the top: as a command, `python -m steering_kernels.cuda` must not find itself imported.
        from steering_kernels import cuda

        if cuda.supports(device_type, dtype):
            compiled["cuda"] = cuda
    triton = _triton_steer(device_type)
    if triton is not None and triton.supports(device_type, dtype):
        compiled["triton"] = triton
    return {**compiled, "reference": reference}


def _triton_steer(device_type: str) -> ModuleType | None:
    """The Triton kernels where Triton is installed; not even imported where only its interpreter could run them."""
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    try:
        from steering_kernels import triton_steer
    except ImportError:
        return None
    return triton_steer


@functools.cache
def chosen(device_type: str, dtype: torch.dtype) -> Any:
    """The backend that the operators use."""
    return next(iter(available(device_type, dtype).values()))


def name(device_type: str, dtype: torch.dtype) -> str:
    """Name of the backend that the operators use."""
    return next(iter(available(device_type, dtype)))
