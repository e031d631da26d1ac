"""The CUDA kernels on the host: their own sources, compiled against `cuda_on_host` in place of CUDA's headers."""

import ctypes
import functools
import os
import shutil
from pathlib import Path

import steering_kernels
from steering_kernels import build
from steering_kernels.cuda import Kernels

# As on the device, products and sums are rounded as written; what is misaligned ends in an error.
_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-fsanitize=alignment", "-Wl,--as-needed")
_CSRC = Path(steering_kernels.__file__).with_name("csrc")
_HEADERS = Path(__file__).with_name("cuda_on_host")


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


@functools.cache
def library() -> Path:
    command = compiler()
    assert command is not None, "tests that need it are skipped without a compiler"
    headers = [*sorted(_CSRC.glob("*.cuh")), _CSRC / "steer_math.h", *sorted(_HEADERS.glob("*.h"))]
    return build.shared_library(
        "steer_cuda_on_host", [command, *_FLAGS, "-I", str(_HEADERS), "-x", "c++"], [_CSRC / "steer_cuda.cu", *headers]
    )


@functools.cache
def kernels() -> Kernels:
    """A backend for tensors on the host; 4 multiprocessors."""
    return Kernels(library(), lambda device: 0)


def draw_order_of_threads(seed: int) -> None:
    """Let the threads of a block take turns in another order from now on."""
    ctypes.CDLL(str(library())).cuda_on_host_seed(seed)
