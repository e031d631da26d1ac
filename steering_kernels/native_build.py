"""Builds csrc/steer_cpu.cpp, ahead of time or at first use, and finds what was built.

`python -m steering_kernels.native_build --build` puts a library for each of `LEVELS` into `lib/` beside this file,
under a name that holds a digest of the sources, so that a library of other sources is never used. Without one that runs
on the processor at hand it is built for that processor, into the cache folder of `build`.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from steering_kernels import build

LIBRARY_FOLDER = Path(__file__).with_name("lib")
# Levels of the x86-64 psABI, best first, and the names that Linux gives to what each needs beyond the one before.
LEVELS = {
    "x86-64-v4": frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    "x86-64-v3": frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}),
}
_CSRC = Path(__file__).with_name("csrc")
_SOURCES = (_CSRC / "steer_cpu.cpp", *sorted(_CSRC.glob("*.h")))
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")


def library() -> Path:
    """Path of a library for this processor: one built ahead of time, or one built now unless it was before.

    Raises:
        OSError: no compiler, or the cache folder cannot be written.
        SubprocessError: the compiler failed.
    """
    for level in usable_levels():
        path = built_path(LIBRARY_FOLDER, level)
        if path.exists():
            return path
    # -march=native: a library built on one processor may not run on another that shares the home folder.
    return build.shared_library("steer_cpu", _command("native"), _SOURCES, [_processor()], _libraries())


def usable_levels() -> list[str]:
    """Those of `LEVELS` that this processor has, best first."""
    return levels_of(_processor())


def levels_of(processor: str) -> list[str]:
    """Those of `LEVELS` that a processor has, best first.

    Args:
        processor: the line of /proc/cpuinfo that lists what it can do.
    """
    names, levels = set(processor.split()), list(LEVELS)
    # A level includes those below it.
    return [
        level for index, level in enumerate(levels) if all(names >= LEVELS[included] for included in levels[index:])
    ]


def built_path(folder: Path, level: str) -> Path:
    """Where a library that is built ahead of time lies in a folder."""
    return folder / f"steer_cpu-{level}-{build.digest(_SOURCES)[:16]}.so"


def build_ahead(folder: Path) -> list[Path]:
    """Build a library for each of `LEVELS`.

    Raises:
        OSError: this is no x86-64 machine, it has no compiler, or the folder cannot be written.
        SubprocessError: the compiler failed.
    """
    if platform.machine() != "x86_64":
        raise OSError(f"libraries are built ahead of time on x86_64 only, and this machine is {platform.machine()}")
    paths = []
    for level in LEVELS:
        paths.append(built_path(folder, level))
        build.compile_to(paths[-1], [*_command(level), str(_SOURCES[0])], _libraries())
    return paths


def _command(architecture: str) -> list[str]:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler found; install g++ or set CXX")
    return [compiler, *_FLAGS, f"-march={architecture}"]


def _libraries() -> list[str]:
    """The OpenMP library in torch's wheel: a second one in the process would bring threads of its own."""
    own = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    # As needed: the compiler's own is linked only where torch does not bring one.
    return ["-Wl,--as-needed", *map(str, own)]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m steering_kernels.native_build`."""
    parser = argparse.ArgumentParser(
        prog="python -m steering_kernels.native_build",
        description="Build the CPU kernels ahead of time, for images that have no compiler when they run.",
    )
    parser.add_argument(
        "--build",
        metavar="DIR",
        type=Path,
        nargs="?",
        const=LIBRARY_FOLDER,
        required=True,
        help="folder of the libraries (default: the one inside the package where the server looks for them)",
    )
    try:
        paths = build_ahead(parser.parse_args(arguments).build)
    except (OSError, subprocess.SubprocessError) as error:
        sys.stderr.write(f"{getattr(error, 'stderr', None) or error}\n")
        return 1
    sys.stdout.writelines(f"{path}\n" for path in paths)
    return 0


if __name__ == "__main__":
    sys.exit(main())
