"""The registry's directory: made safely, and who uses it."""

import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from artifacts.errors import quoted
from server.registry.errors import RegistryError, RegistryErrorCode

LOCKS = "locks"
_OPEN_TIMEOUT_S = 10.0
_POLL_S = 0.005


def prepare(directory: Path, create: bool) -> None:
    """Make the directory, or check that nobody else can write into it.

    Args:
        directory: of the registry.
        create: make it, readable by its owner only, when it does not exist.

    Raises:
        RegistryError: code not_found, unsafe_directory or io.
    """
    try:
        if create:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.stat()
        if not stat.S_ISDIR(found.st_mode):
            raise NotADirectoryError
    except (FileNotFoundError, NotADirectoryError, FileExistsError):
        raise RegistryError(
            RegistryErrorCode.NOT_FOUND, f"{quoted(str(directory), 200)} is no directory; name one of a registry."
        ) from None
    except (OSError, ValueError) as error:
        raise _failed(directory, error) from None
    user = os.geteuid()
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or (user != 0 and found.st_uid not in (0, user)):
        raise RegistryError(
            RegistryErrorCode.UNSAFE_DIRECTORY,
            f"Other users can write into {quoted(str(directory), 200)} (mode {stat.S_IMODE(found.st_mode):o}); "
            "take the right away, or name a new folder inside it.",
        )


def make_folder(folder: Path) -> None:
    """Make a folder of the registry, readable by its owner only.

    Raises:
        RegistryError: code io.
    """
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise _failed(folder, error) from None


@contextmanager
def opening(directory: Path) -> Iterator[None]:
    """Keep other processes from opening the registry meanwhile.

    Raises:
        RegistryError: code locked, after 10 s; or io.
    """
    descriptor = _lock_file(directory, "open")
    deadline = time.monotonic() + _OPEN_TIMEOUT_S
    try:
        while not _try_lock(descriptor, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise RegistryError(
                    RegistryErrorCode.LOCKED,
                    f"Another process has been opening {quoted(str(directory), 200)} for {_OPEN_TIMEOUT_S:g} s; "
                    "end it and try again.",
                )
            time.sleep(_POLL_S)
        yield
    finally:
        os.close(descriptor)


class Use:
    """This process's mark that it uses the registry. It goes with the process, however that ends."""

    def __init__(self, directory: Path) -> None:
        """Leave the mark; only inside `opening`.

        Raises:
            RegistryError: code io.
        """
        self._descriptor = _lock_file(directory, "use")
        # Nobody else can be between these two steps, since they are taken inside `opening` only.
        self.is_first = _try_lock(self._descriptor, fcntl.LOCK_EX)
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def end(self) -> None:
        """Take the mark away."""
        os.close(self._descriptor)


def _lock_file(directory: Path, name: str) -> int:
    make_folder(directory / LOCKS)
    path = directory / LOCKS / name
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _failed(path, error) from None


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _failed(path: Path, error: Exception) -> RegistryError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return RegistryError(
        RegistryErrorCode.IO,
        f"{quoted(str(path), 200)} cannot be used ({reason}); check the path, its permissions and the space left.",
    )
