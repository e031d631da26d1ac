"""Fails where the kernels of an installation were not built ahead: `python deploy/image/kernel_check.py cpu|gpu`."""

import ctypes
import sys

import torch

from steering_kernels import backends, cuda, native_build


def problem(target: str) -> str | None:
    """What is wrong with the kernels, or None.

    Args:
        target: `cpu` or `gpu`. A GPU need not be there.
    """
    if target == "gpu":
        library = cuda.built_path(cuda.LIBRARY_FOLDER)
        if not library.exists():
            return f"{library} is missing."
        ctypes.CDLL(str(library))
        return None
    libraries = [native_build.built_path(native_build.LIBRARY_FOLDER, level) for level in native_build.LEVELS]
    if missing := [str(library) for library in libraries if not library.exists()]:
        return f"{', '.join(missing)} is missing."
    if native_build.usable_levels() and (backend := backends.name("cpu", torch.float32)) != "cpu":
        return f"The backend is {backend}, not cpu."
    return None


def main(target: str) -> int:
    """Check the kernels of this installation."""
    found = problem(target)
    if found is not None:
        sys.stderr.write(f"{found}\n")
    return 0 if found is None else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
