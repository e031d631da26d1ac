"""The `cpu` backend: csrc/steer_cpu.cpp, built once with the machine's compiler and called through ctypes."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import secrets
import shutil
import subprocess
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from steering_kernels.reference import steer_reference_

_SOURCE = files("steering_kernels") / "csrc" / "steer_cpu.cpp"
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC")
_BUILD_TIMEOUT_S = 120
_SYMBOLS = {torch.float32: "steer_float32", torch.bfloat16: "steer_bfloat16"}
_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = (_POINTER, *[_INTEGER] * 3, *[_POINTER] * 3, _INTEGER, *[_POINTER] * 2)
_MAX_OPS = 64

_logger = logging.getLogger(__name__)


def steer_cpu_(
    hidden: Tensor, pool: Tensor, write_rows: Tensor, scales: Tensor, slot_ids: Tensor, strengths: Tensor
) -> None:
    """Same contract as `reference.steer_reference_`, for tensors on the host.

    fp16, a pool of another dtype, non-contiguous tables, and a machine without a compiler take the reference.
    """
    kernel = _kernel(hidden.dtype)
    if (
        kernel is None
        or pool.dtype != hidden.dtype
        or hidden.stride(1) != 1
        or write_rows.shape[1] > _MAX_OPS
        or not (pool.is_contiguous() and write_rows.is_contiguous() and scales.is_contiguous())
        or not (slot_ids.is_contiguous() and strengths.is_contiguous())
    ):
        steer_reference_(hidden, pool, write_rows, scales, slot_ids, strengths)
        return
    kernel(
        hidden.data_ptr(),
        hidden.shape[0],
        hidden.shape[1],
        hidden.stride(0),
        pool.data_ptr(),
        write_rows.data_ptr(),
        scales.data_ptr(),
        write_rows.shape[1],
        slot_ids.data_ptr(),
        strengths.data_ptr(),
    )


def has_kernel(dtype: torch.dtype) -> bool:
    """Whether this machine has, or can build, a compiled kernel for a dtype of the residual stream."""
    return _kernel(dtype) is not None


@functools.cache
def _kernel(dtype: torch.dtype) -> Callable[..., None] | None:
    """Compiled function for a dtype of the residual stream; None where there is none."""
    library = _library() if dtype in _SYMBOLS else None
    if library is None:
        return None
    function: Callable[..., None] = getattr(library, _SYMBOLS[dtype])
    function.argtypes, function.restype = _ARGUMENTS, None  # type: ignore[attr-defined]
    return function


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(_build()))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        _logger.warning("Steering falls back to the slower reference kernel: it could not be compiled (%s)", detail)
        return None


def _build() -> Path:
    """Path of the shared library, built now unless this source was built on such a processor before.

    Raises:
        OSError: no compiler, or the cache folder cannot be written.
        SubprocessError: the compiler failed.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler found; install g++ or set CXX")
    source = _SOURCE.read_text()
    # -march=native: a library built on one processor may not run on another that shares the home folder.
    key = hashlib.sha256("\n".join([source, *_FLAGS, compiler, _processor()]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "expertsteer"
    built = cache / f"steer_cpu-{key}.so"
    if not built.exists():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = cache / f".{secrets.token_hex(8)}.so"
        command = [compiler, *_FLAGS, "-x", "c++", "-", "-o", str(temporary)]
        try:
            subprocess.run(command, input=source, text=True, check=True, capture_output=True, timeout=_BUILD_TIMEOUT_S)
            # Several ranks may build at once; each puts a complete file in place.
            temporary.replace(built)
        finally:
            temporary.unlink(missing_ok=True)
    return built


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
