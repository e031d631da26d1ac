"""Bundles by name from one directory of the operator's, and from nowhere else."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from artifacts.errors import quoted
from server.sources.errors import SourceError, SourceErrorCode
from server.sources.incoming_file import BLOCK_BYTES, IncomingFile, Received, require_size
from server.sources.names import SUFFIX, name_parts

MAX_LISTED = 1000
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# Not blocking: opening a FIFO without a writer would wait forever.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM})
_SPECIAL = frozenset({errno.ENXIO, errno.ENODEV})


class BundleRoot:
    """The directory of `--steering-bundle-root`.

    Every part of a name is opened relative to the folder before it and no symbolic link is followed, so nothing that
    changes in the directory meanwhile leads outside. The directory itself may be a symbolic link: it is the operator's
    word. A hard link counts as the file it is. All methods block: call them in a thread.
    """

    def __init__(self, directory: Path) -> None:
        """Check that `directory` can be read.

        Raises:
            SourceError: `unavailable`.
        """
        self._directory = directory
        with self._opened():
            pass

    def fetch(self, name: str, target: Path, max_bytes: int) -> Received:
        """Copy the file called `name` to the new file `target` and hash what was copied.

        Args:
            name: as `name_parts` has it.
            target: must not exist; removed again on any error.
            max_bytes: the longest file taken.

        Raises:
            SourceError: `bad_name`, `not_found`, `not_a_file`, `unreadable`, `empty`, `too_large`, `no_space`,
                `storage_failed`, `unavailable`.
        """
        descriptor = self._open_file(name_parts(name), name)
        try:
            details = os.fstat(descriptor)
            if not stat.S_ISREG(details.st_mode):
                _refuse_kind(name)
            require_size(details.st_size, max_bytes)
            return _copy(descriptor, name, target, max_bytes)
        finally:
            os.close(descriptor)

    def list(self) -> tuple[str, ...]:
        """Return the names that `fetch` could take, folder by folder, at most `MAX_LISTED` of them.

        Raises:
            SourceError: `unavailable`.
        """
        names: list[str] = []
        with self._opened() as root:
            for folder, folders, files, descriptor in os.fwalk(".", dir_fd=root, follow_symlinks=False):
                prefix = "" if folder == "." else f"{folder.removeprefix('./')}/"
                # Also keeps the walk from going deeper than a name may.
                folders[:] = sorted(part for part in folders if _is_name(f"{prefix}{part}/x{SUFFIX}"))
                for part in sorted(files):
                    if _is_name(prefix + part) and _is_regular(part, descriptor):
                        names.append(prefix + part)
                    if len(names) == MAX_LISTED:
                        return tuple(names)
        return tuple(names)

    @contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            descriptor = os.open(self._directory, _FOLDER)
        except OSError as error:
            message = f"the bundle root cannot be opened ({error.strerror}); correct --steering-bundle-root"
            raise SourceError(SourceErrorCode.UNAVAILABLE, message) from error
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _open_file(self, parts: tuple[str, ...], name: str) -> int:
        with self._opened() as root:
            folder = os.dup(root)
            try:
                for part in parts[:-1]:
                    deeper = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
                    os.close(folder)
                    folder = deeper
                return os.open(parts[-1], _FILE, dir_fd=folder)
            except OSError as error:
                _refuse(error, name)
            finally:
                os.close(folder)


def _copy(descriptor: int, name: str, target: Path, max_bytes: int) -> Received:
    incoming = IncomingFile(target, max_bytes)
    try:
        while block := _read(descriptor, name):
            incoming.write(block)
        return incoming.keep()
    except BaseException:
        incoming.discard()
        raise


def _read(descriptor: int, name: str) -> bytes:
    try:
        return os.read(descriptor, BLOCK_BYTES)
    except OSError as error:
        message = f"the file {quoted(name)} of the bundle root cannot be read ({error.strerror}); check its disk"
        raise SourceError(SourceErrorCode.UNREADABLE, message) from error


def _refuse(error: OSError, name: str) -> NoReturn:
    if error.errno in _ABSENT:
        message = f"the bundle root has no file {quoted(name)}; symbolic links in it are not followed"
        raise SourceError(SourceErrorCode.NOT_FOUND, message) from error
    if error.errno in _SPECIAL:
        _refuse_kind(name)
    if error.errno in _FORBIDDEN:
        message = f"the server may not read {quoted(name)} in the bundle root; change the permissions of the file"
        raise SourceError(SourceErrorCode.UNREADABLE, message) from error
    message = f"the bundle root cannot give {quoted(name)} ({error.strerror}); check the server and its disk"
    raise SourceError(SourceErrorCode.UNAVAILABLE, message) from error


def _refuse_kind(name: str) -> NoReturn:
    message = f"{quoted(name)} in the bundle root is not a regular file; name one that is"
    raise SourceError(SourceErrorCode.NOT_A_FILE, message)


def _is_name(name: str) -> bool:
    try:
        name_parts(name)
    except SourceError:
        return False
    return True


def _is_regular(part: str, folder: int) -> bool:
    try:
        return stat.S_ISREG(os.stat(part, dir_fd=folder, follow_symlinks=False).st_mode)
    except OSError:
        return False
