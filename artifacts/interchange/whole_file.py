"""Files of strangers, read only when regular and small, and files of ours, written whole or not at all."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

from artifacts.errors import quoted
from artifacts.jobs.errors import BuildError

# Ten times the vectors of the largest models (126 layers of 16384 in fp64 are 16 MB).
MAX_FILE_BYTES = 1 << 28


def check_regular(path: Path) -> int:
    """Return the size of a regular file in bytes; pipes and devices are refused without being opened.

    Raises:
        BuildError: missing, no regular file, empty, or over `MAX_FILE_BYTES`.
    """
    name = quoted(str(path), 200)
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BuildError(f"{name} cannot be read ({reason}); check the path") from None
    if not stat.S_ISREG(status.st_mode):
        raise BuildError(f"{name} is a directory or a device; name the file with the vectors")
    if not 0 < status.st_size <= MAX_FILE_BYTES:
        raise BuildError(
            f"{name} has {status.st_size} bytes, and 1 to {MAX_FILE_BYTES} are taken; a file of vectors holds one row "
            "per layer and no model"
        )
    return status.st_size


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` and move it there when the block ends well; else nothing is left."""
    temporary = path.with_name(f".{path.name}.{token_hex(8)}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
