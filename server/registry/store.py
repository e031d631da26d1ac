"""Bundle files by the digest of their content."""

import os
import re
import secrets
import time
from collections.abc import Collection
from pathlib import Path

from artifacts.bundle import Bundle, load_bundle
from artifacts.errors import BundleError, BundleErrorCode, quoted
from server.registry.directory import make_folder
from server.registry.errors import RegistryError, RegistryErrorCode

# An upload that takes longer than this has been given up, whatever became of its process.
ABANDONED_S = 3600.0
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_SUFFIX = ".safetensors"


class BundleStore:
    """Files in the registry's directory, complete and immutable.

    A file lies here before the registry has a record of it, and until after the record is gone; a crash between leaves
    a stray file and never a record without one.
    """

    def __init__(self, directory: Path) -> None:
        """Use the folders `bundles` and `incoming` of a directory, made where they are missing.

        Raises:
            RegistryError: code io.
        """
        self._kept, self._incoming = directory / "bundles", directory / "incoming"
        for folder in (self._kept, self._incoming):
            make_folder(folder)

    def incoming(self) -> Path:
        """A path on the store's file system, for a new file that is not checked yet. Nothing lies there."""
        return self._incoming / f"{secrets.token_hex(16)}{_SUFFIX}"

    def path(self, digest: str) -> Path:
        """Where the file of a bundle lies, if it does.

        Raises:
            RegistryError: code not_found; it is no digest.
        """
        if not _DIGEST.fullmatch(digest):
            raise RegistryError(
                RegistryErrorCode.NOT_FOUND, f"{quoted(digest)} is no digest; expected sha256:<64 hex digits>."
            )
        return self._kept / f"{digest.removeprefix('sha256:')}{_SUFFIX}"

    def has(self, digest: str) -> bool:
        """Whether the file of a bundle lies in the store."""
        return self.file_identity(digest) is not None

    def file_identity(self, digest: str) -> tuple[int, int] | None:
        """Which file holds a bundle: another `keep` makes another one. None when there is none."""
        try:
            return _identity(self.path(digest))
        except FileNotFoundError:
            return None

    def keep(self, temporary: Path, digest: str) -> None:
        """Move a checked file into the store, where it survives a loss of power. One of the same digest is replaced.

        Args:
            temporary: path from `incoming`; nothing lies there afterwards.
            digest: of its content.

        Raises:
            OSError: the disk is full or fails.
        """
        descriptor = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fchmod(descriptor, 0o400)
            # The age of a stray file counts from here.
            os.utime(descriptor)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, self.path(digest))
        self._sync_folder()

    def load(self, digest: str) -> Bundle:
        """Read and check a bundle.

        Raises:
            RegistryError: code store_damaged; the file is missing, or no longer what it was.
        """
        try:
            bundle = load_bundle(self.path(digest))
        except BundleError as error:
            what = "its file is missing" if error.code is BundleErrorCode.UNREADABLE and not self.has(digest) else error
            raise self._damaged(digest, str(what)) from None
        if bundle.digest != digest:
            raise self._damaged(digest, f"its file is now {bundle.digest}")
        return bundle

    def remove(self, digest: str, identity: tuple[int, int] | None = None) -> None:
        """Remove the file of a bundle, if it lies here.

        Args:
            digest: of the bundle.
            identity: remove this very file only, not one that was kept meanwhile; None for any.

        Raises:
            OSError: the disk fails.
        """
        # Moved out first: what is looked at is then what is removed, whoever keeps a file of this digest meanwhile.
        aside = self.incoming()
        try:
            os.rename(self.path(digest), aside)
        except FileNotFoundError:
            return
        if identity is not None and _identity(aside) != identity:
            os.rename(aside, self.path(digest))
            return
        aside.unlink()
        self._sync_folder()

    def stray(self, known: Collection[str]) -> list[Path]:
        """Files that belong to no record and are not just being added: what crashes left.

        Args:
            known: digests of all records.
        """
        named = {self.path(digest) for digest in known}
        return [path for path in sorted(self._kept.iterdir()) if path not in named and _age_s(path) > ABANDONED_S]

    def is_used(self) -> bool:
        """Whether there is any bundle."""
        return any(self._kept.iterdir())

    def sweep(self) -> None:
        """Remove incoming files that nobody writes any more.

        Raises:
            OSError: the disk fails.
        """
        for path in self._incoming.iterdir():
            if _age_s(path) > ABANDONED_S:
                path.unlink(missing_ok=True)

    def _sync_folder(self) -> None:
        folder = os.open(self._kept, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _damaged(self, digest: str, what: str) -> RegistryError:
        return RegistryError(
            RegistryErrorCode.STORE_DAMAGED, f"Bundle {digest} in the store is damaged: {what}; add it again."
        )


def _identity(path: Path) -> tuple[int, int]:
    # A number of a file may be used again after the file is gone, so it does not suffice.
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
