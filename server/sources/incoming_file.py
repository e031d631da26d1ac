"""A file on its way in: created exclusively, hashed while it is written, kept whole or removed."""

import contextlib
import errno
import hashlib
import os
import threading
from pathlib import Path
from typing import NamedTuple

from server.sources.errors import SourceError, SourceErrorCode

BLOCK_BYTES = 1 << 20
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Received(NamedTuple):
    """A file that arrived whole and is on disk."""

    num_bytes: int
    # "sha256:" and 64 hexadecimal digits.
    digest: str


class IncomingFile:
    """One writer at a time; `discard` may come at any moment, from any thread."""

    def __init__(self, target: Path, max_bytes: int) -> None:
        """Create `target`, readable by this user only.

        Args:
            target: must not exist; a symbolic link there is not followed.
            max_bytes: the longest file taken.

        Raises:
            SourceError: the file cannot be created (`no_space`, `storage_failed`).
        """
        self._target, self._max_bytes = target, max_bytes
        self._num_bytes = 0
        self._sha256 = hashlib.sha256()
        self._lock = threading.Lock()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._descriptor: int | None = os.open(target, flags, 0o600)
        except OSError as error:
            raise storage_error(error) from error

    def write(self, block: bytes | bytearray | memoryview) -> None:
        """Append `block` and hash it.

        Raises:
            SourceError: longer than the limit, or the disk refuses the bytes (`too_large`, `no_space`,
                `storage_failed`).
        """
        with self._lock:
            self._num_bytes += len(block)
            require_size(self._num_bytes, self._max_bytes)
            descriptor = self._open_descriptor()
            self._sha256.update(block)
            rest = memoryview(block)
            try:
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
            except OSError as error:
                raise storage_error(error) from error

    def keep(self) -> Received:
        """Make the bytes durable, close the file and return what it holds.

        Raises:
            SourceError: nothing was written, or the disk fails (`empty`, `no_space`, `storage_failed`).
        """
        with self._lock:
            descriptor = self._open_descriptor()
            if self._num_bytes == 0:
                raise SourceError(SourceErrorCode.EMPTY, "the bundle is empty (0 bytes); send the whole file")
            try:
                os.fsync(descriptor)
            except OSError as error:
                raise storage_error(error) from error
            self._close()
            return Received(self._num_bytes, f"sha256:{self._sha256.hexdigest()}")

    def discard(self) -> None:
        """Close and remove the file. Waits for a write in another thread; later writes fail."""
        with self._lock:
            self._close()
            self._target.unlink(missing_ok=True)

    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            raise ValueError("the file is closed")
        return self._descriptor

    def _close(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            # Network file systems report late write errors here; `keep` has seen them in fsync already.
            with contextlib.suppress(OSError):
                os.close(descriptor)


def require_size(num_bytes: int, max_bytes: int) -> None:
    """Refuse a file of `num_bytes`, announced or counted, over the limit.

    Raises:
        SourceError: `too_large`.
    """
    if num_bytes > max_bytes:
        message = (
            f"the bundle has at least {num_bytes} bytes and the limit is {max_bytes}; raise --steering-max-bundle-mib"
        )
        raise SourceError(SourceErrorCode.TOO_LARGE, message)


def storage_error(error: OSError) -> SourceError:
    """Return what a failure of the server's own disk means for the caller; the path stays out of the message."""
    if error.errno in _FULL:
        message = f"the server cannot store the bundle ({error.strerror}); free space on it and try again"
        return SourceError(SourceErrorCode.NO_SPACE, message)
    reason = error.strerror or type(error).__name__
    message = f"the server cannot store the bundle ({reason}); see the directory of --steering-registry"
    return SourceError(SourceErrorCode.STORAGE_FAILED, message)
