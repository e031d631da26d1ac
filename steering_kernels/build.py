"""Shared libraries that are compiled on first use and kept in a cache folder outside the package."""

import hashlib
import os
import secrets
import subprocess
from collections.abc import Sequence
from pathlib import Path

_BUILD_TIMEOUT_S = 600


def shared_library(
    name: str,
    command_prefix: Sequence[str],
    sources: Sequence[Path],
    key_parts: Sequence[str] = (),
    command_suffix: Sequence[str] = (),
) -> Path:
    """Path of a shared library, compiled now unless the same was compiled before.

    Args:
        name: beginning of its file name.
        command_prefix: the compiler and its flags.
        sources: the file to compile, then those that it includes.
        key_parts: what else the result depends on, such as the processor.
        command_suffix: arguments behind the output, such as libraries.

    Raises:
        OSError: the compiler cannot be started, or the cache folder cannot be written.
        SubprocessError: the compiler failed.
    """
    parts = [*command_prefix, *command_suffix, *key_parts, digest(sources)]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "expertsteer"
    built = cache / f"{name}-{key}.so"
    if not built.exists():
        compile_to(built, [*command_prefix, str(sources[0])], command_suffix)
    return built


def compile_to(target: Path, command: Sequence[str], command_suffix: Sequence[str] = ()) -> None:
    """Run a compiler whose output becomes `target`.

    Raises: as `shared_library`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{secrets.token_hex(8)}.so")
    try:
        subprocess.run(
            [*command, "-o", str(temporary), *command_suffix],
            text=True,
            check=True,
            capture_output=True,
            timeout=_BUILD_TIMEOUT_S,
        )
        # Several ranks may build at once; each puts a complete file in place.
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def digest(sources: Sequence[Path]) -> str:
    """SHA-256 over the contents of files, hexadecimal."""
    return hashlib.sha256("\n".join(source.read_text() for source in sources).encode()).hexdigest()
