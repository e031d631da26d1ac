"""The `cuda` backend: csrc/steer_cuda.cu, built ahead of time or by nvcc at first use, and called through ctypes.

`python -m steering_kernels.cuda --build` puts the library for every target into `lib/` beside this file, under a name
that holds a digest of the sources, so that a library of other sources is never used. Without one it is built for the
device at hand, into the cache folder of `build`.
"""

import argparse
import ctypes
import functools
import logging
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steering_kernels import build, reference

# Compute capabilities of a library that is built ahead of time; PTX of the first serves devices that are not listed.
TARGETS = ("80", "90a", "100")
LIBRARY_FOLDER = Path(__file__).with_name("lib")
_CSRC = Path(__file__).with_name("csrc")
_SOURCES = (_CSRC / "steer_cuda.cu", *sorted(_CSRC.glob("*.cuh")), _CSRC / "steer_math.h")
_FLAGS = ("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# `Call` of the source: nine pointers, four strides and sizes, six integers, two floats.
_CALL = struct.Struct("@9P4q6i2f")
# Gates live in the lanes of a warp.
_MAX_GATES = 32

_logger = logging.getLogger(__name__)


class _Device(ctypes.Structure):
    """`Device` of the source."""

    _fields_ = [
        ("multiprocessors", ctypes.c_int32),
        ("programmatic", ctypes.c_int32),
        ("max_hidden_size", ctypes.c_int32),
    ]


class Kernels:
    """The operators of one library on one device.

    Args:
        library: path of the shared library.
        current_stream: handle of the stream in which a call for tensors of a device is to run.

    Raises:
        OSError: it is no library of these operators.
        RuntimeError: it holds no code for the current device.
    """

    def __init__(self, library: Path, current_stream: Callable[[torch.device], int]) -> None:
        self._library, self._current_stream = ctypes.CDLL(str(library)), current_stream
        self._library.steering_error_text.restype = ctypes.c_char_p
        self._device = _Device()
        self._device_pointer = ctypes.byref(self._device)
        self._check(self._library.steering_load(self._device_pointer))
        for function in (self._library.steer, self._library.steer_add_rms_norm):
            function.argtypes = (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p)

    def steer_(
        self,
        hidden: Tensor,
        pool: Tensor,
        codes: Tensor,
        params: Tensor,
        slot_ids: Tensor,
        strengths: Tensor,
        gates: Tensor,
        residual: Tensor | None = None,
    ) -> None:
        """Same contract as `reference.steer_`, for tensors of the current device that `op` would accept."""
        if not self._can(hidden, gates):
            reference.steer_(hidden, pool, codes, params, slot_ids, strengths, gates, residual)
        elif len(hidden) > 0:
            call = _packed(hidden, residual, None, 0.0, 0.0, pool, codes, params, slot_ids, strengths, gates)
            self._check(self._library.steer(call, self._device_pointer, self._current_stream(hidden.device)))

    def steer_add_rms_norm_(
        self,
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
        """Same contract as `reference.steer_add_rms_norm_`, likewise."""
        tables = (pool, codes, params, slot_ids, strengths, gates)
        if not self._can(hidden, gates):
            reference.steer_add_rms_norm_(hidden, residual, weight, epsilon, weight_offset, *tables)
        elif len(hidden) > 0:
            weight = None if weight is None else weight.contiguous()
            call = _packed(hidden, residual, weight, epsilon, weight_offset, *tables)
            stream = self._current_stream(hidden.device)
            self._check(self._library.steer_add_rms_norm(call, self._device_pointer, stream))

    def _can(self, hidden: Tensor, gates: Tensor) -> bool:
        return hidden.shape[1] <= self._device.max_hidden_size and gates.shape[1] <= _MAX_GATES

    def _check(self, error: int) -> None:
        if error != 0:
            text = self._library.steering_error_text(error).decode()
            raise RuntimeError(f"the steering kernels report CUDA error {error}: {text}")


def supports(device_type: str, dtype: torch.dtype) -> bool:
    """Whether it runs here for a residual stream of `dtype` on a device; the first such question may build it."""
    if device_type != "cuda" or dtype not in _DTYPES or not torch.cuda.is_available():
        return False
    return _kernels(torch.cuda.current_device()) is not None


def steer_(hidden: Tensor, *others: Any) -> None:
    """Same contract as `reference.steer_`, for tensors of one CUDA device that `op` would accept."""
    with torch.cuda.device(hidden.device):
        _loaded(hidden.device).steer_(hidden, *others)


def steer_add_rms_norm_(hidden: Tensor, *others: Any) -> None:
    """Same contract as `reference.steer_add_rms_norm_`, likewise."""
    with torch.cuda.device(hidden.device):
        _loaded(hidden.device).steer_add_rms_norm_(hidden, *others)


def compile_library(target: Path, architectures: Sequence[str]) -> None:
    """Build a library with code for compute capabilities such as "90a", and PTX of the first.

    Raises:
        OSError: no nvcc, or the folder cannot be written.
        SubprocessError: nvcc failed.
    """
    first = architectures[0]
    command = [*_command(architectures), f"-gencode=arch=compute_{first},code=compute_{first}", str(_SOURCES[0])]
    build.compile_to(target, command)


def built_path(folder: Path) -> Path:
    """Where a library that is built ahead of time lies in a folder."""
    return folder / f"steer_cuda-{build.digest(_SOURCES)[:16]}.so"


def _packed(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    epsilon: float,
    weight_offset: float,
    pool: Tensor,
    codes: Tensor,
    params: Tensor,
    slot_ids: Tensor,
    strengths: Tensor,
    gates: Tensor,
) -> bytes:
    """One packed argument, which costs a third of 21."""
    return _CALL.pack(
        hidden.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        pool.data_ptr(),
        codes.data_ptr(),
        params.data_ptr(),
        slot_ids.data_ptr(),
        strengths.data_ptr(),
        gates.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        hidden.shape[0],
        hidden.stride(0),
        0 if residual is None else residual.stride(0),
        pool.stride(0),
        hidden.shape[1],
        codes.shape[1],
        gates.shape[1],
        _DTYPES[hidden.dtype],
        _DTYPES[pool.dtype],
        0 if weight is None else _DTYPES[weight.dtype],
        epsilon,
        weight_offset,
    )


def _loaded(device: torch.device) -> Kernels:
    kernels = _kernels(device.index)
    assert kernels is not None, "call it only where `supports` says so"
    return kernels


@functools.cache
def _kernels(device_index: int) -> Kernels | None:
    """The operators on a device, from the first library that has code for it."""
    errors = []
    with torch.cuda.device(device_index):
        for find in (_built_ahead_of_time, _built_at_first_use):
            try:
                return Kernels(find(), _current_stream)
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                errors.append(str(getattr(error, "stderr", None) or error))
    _logger.warning("Steering falls back to a slower kernel than the CUDA one: %s", "; ".join(errors))
    return None


def _current_stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _built_ahead_of_time() -> Path:
    return built_path(LIBRARY_FOLDER)


def _built_at_first_use() -> Path:
    major, minor = torch.cuda.get_device_capability()
    architecture = "90a" if (major, minor) == (9, 0) else f"{major}{minor}"
    return build.shared_library("steer_cuda", _command([architecture]), _SOURCES)


def _command(architectures: Sequence[str]) -> list[str]:
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("no nvcc found; put it on PATH, set NVCC, or build the library ahead of time")
    return [nvcc, *_FLAGS, *(f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures)]


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m steering_kernels.cuda`."""
    parser = argparse.ArgumentParser(
        prog="python -m steering_kernels.cuda",
        description="Build the CUDA kernels ahead of time, for images that have no nvcc when they run.",
    )
    parser.add_argument(
        "--build",
        metavar="DIR",
        type=Path,
        nargs="?",
        const=LIBRARY_FOLDER,
        required=True,
        help="folder of the library (default: the one inside the package where the server looks for it)",
    )
    parser.add_argument(
        "--arch",
        nargs="+",
        default=TARGETS,
        help=f"compute capabilities without the dot (default: {' '.join(TARGETS)})",
    )
    options = parser.parse_args(arguments)
    target = built_path(options.build)
    try:
        compile_library(target, options.arch)
    except (OSError, subprocess.SubprocessError) as error:
        sys.stderr.write(f"{getattr(error, 'stderr', None) or error}\n")
        return 1
    sys.stdout.write(f"{target}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
