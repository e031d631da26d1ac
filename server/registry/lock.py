"""A lock that the processes of one instance share, taken inside asyncio."""

import asyncio
import fcntl
import os
import time
from pathlib import Path
from types import TracebackType

from artifacts.errors import quoted
from server.registry.directory import make_folder
from server.registry.errors import RegistryError, RegistryErrorCode

_POLL_S = 0.005


class InstanceLock:
    """Asynchronous context manager: one task of one process at a time. A process that ends lets go of it."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        """Name the lock.

        Args:
            path: its file, made when it is missing, in a folder that is made too.
            timeout_s: how long to wait for it.
        """
        self._path = path
        self._timeout_s = timeout_s
        # Tasks of this process queue here, in order, and only the first of them polls the file.
        self._queue = asyncio.Lock()
        self._descriptor = -1

    async def __aenter__(self) -> "InstanceLock":
        """Take the lock.

        Raises:
            RegistryError: code locked, when it stays taken for `timeout_s`; or io.
        """
        deadline = time.monotonic() + self._timeout_s
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._queue.acquire()
        except TimeoutError:
            raise self._locked() from None
        try:
            self._descriptor = await self._take(deadline)
        except BaseException:
            self._queue.release()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of the lock."""
        os.close(self._descriptor)
        self._queue.release()

    async def _take(self, deadline: float) -> int:
        make_folder(self._path.parent)
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise RegistryError(
                RegistryErrorCode.IO,
                f"The lock {quoted(str(self._path), 200)} cannot be used ({error.strerror}); check its permissions.",
            ) from None
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return descriptor
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise self._locked() from None
                await asyncio.sleep(_POLL_S)
        except BaseException:
            os.close(descriptor)
            raise

    def _locked(self) -> RegistryError:
        return RegistryError(
            RegistryErrorCode.LOCKED, f"Another change of the engine has taken over {self._timeout_s:g} s; try again."
        )
