"""The `cpu` backend: csrc/steer_cpu.cpp, built ahead of time or at first use, and called through ctypes."""

import ctypes
import functools
import logging
import struct
import subprocess

import torch
from torch import Tensor

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# `Call` of the source: nine pointers, eleven integers, two floats. One packed argument costs a third of 22 arguments.
_PACK = struct.Struct("@20q2d").pack

_logger = logging.getLogger(__name__)


def supports(device_type: str, dtype: torch.dtype) -> bool:
    """Whether it runs here for a residual stream of `dtype` on a device; the first such question may build it."""
    return device_type == "cpu" and dtype in _DTYPES and _library() is not None


def steer_(
    hidden: Tensor,
    pool: Tensor,
    codes: Tensor,
    params: Tensor,
    slot_ids: Tensor,
    strengths: Tensor,
    gates: Tensor,
    residual: Tensor | None = None,
) -> None:
    """Same contract as `reference.steer_`, for tensors on the host that `op` would accept."""
    library = _library()
    assert library is not None, "call it only where `supports` says so"
    # Most calls of most servers end here: at this layer nobody steers.
    if library.steer_is_needed(slot_ids.data_ptr(), hidden.shape[0]):
        library.steer(_packed(hidden, residual, None, pool, codes, params, slot_ids, strengths, gates, 0.0, 0.0))


def steer_add_rms_norm_(
    hidden: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    weight_offset: float,
    pool: Tensor,
    codes: Tensor,
    params: Tensor,
    slot_ids: Tensor,
    strengths: Tensor,
    gates: Tensor,
) -> None:
    """Same contract as `reference.steer_add_rms_norm_`, for tensors on the host that `op` would accept."""
    library = _library()
    assert library is not None, "call it only where `supports` says so"
    if weight is not None:
        weight = weight.contiguous()
    library.steer_add_rms_norm(
        _packed(hidden, residual, weight, pool, codes, params, slot_ids, strengths, gates, epsilon, weight_offset)
    )


def _packed(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    pool: Tensor,
    codes: Tensor,
    params: Tensor,
    slot_ids: Tensor,
    strengths: Tensor,
    gates: Tensor,
    epsilon: float,
    weight_offset: float,
) -> bytes:
    num_tokens, hidden_size = hidden.shape
    return _PACK(
        hidden.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        pool.data_ptr(),
        codes.data_ptr(),
        params.data_ptr(),
        slot_ids.data_ptr(),
        strengths.data_ptr(),
        gates.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        num_tokens,
        hidden_size,
        hidden.stride(0),
        0 if residual is None else residual.stride(0),
        pool.stride(0),
        codes.shape[1],
        gates.shape[1],
        torch.get_num_threads(),
        _DTYPES[hidden.dtype],
        _DTYPES[pool.dtype],
        0 if weight is None else _DTYPES[weight.dtype],
        epsilon,
        weight_offset,
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    # Not at the top: as a command, `python -m steering_kernels.native_build` must not find itself imported.
    from steering_kernels import native_build

    try:
        library = ctypes.CDLL(str(native_build.library()))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        _logger.warning(
            "Steering falls back to the slower reference kernel: it could not be built or loaded (%s)", detail
        )
        return None
    library.steer_is_needed.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    library.steer_is_needed.restype = ctypes.c_int32
    for function in (library.steer, library.steer_add_rms_norm):
        function.argtypes, function.restype = (ctypes.c_char_p,), None
    return library
