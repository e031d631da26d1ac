"""Keys of a server: from a file that may change while it runs, and from its flags."""

import hmac
import logging
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from artifacts.errors import quoted
from server.auth.identity import ANONYMOUS, MAX_KEY_LENGTH, Identity, Key, Role, check_key, hash_key
from server.auth.key_file import MAX_KEYS, read_keys

__all__ = ["ADMIN_NAME", "ANONYMOUS", "CHECK_INTERVAL_S", "Identity", "KeyRing", "Role"]

# vLLM shows loggers under its own name only.
_logger = logging.getLogger("vllm.expertsteer.access")

CHECK_INTERVAL_S = 1.0
ADMIN_NAME = "admin"


class FileState(NamedTuple):
    """What tells one state of a file from the next."""

    inode: int
    modified_ns: int
    num_bytes: int
    changed_ns: int  # of its permissions too


class KeyRing:
    """The keys of a server.

    With neither a file nor a key from the flags nobody needs a key. A file without keys lets nobody in.
    """

    def __init__(
        self,
        fixed: Sequence[Key] = (),
        keys_file: Path | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Read the file, if there is one.

        Args:
            fixed: keys that stay as long as the server runs.
            keys_file: file of further keys.
            now: the present time.

        Raises:
            ValueError: the file cannot be read, or two keys have one name or one text.
        """
        self._fixed, self._file, self._now = tuple(fixed), keys_file, now
        self._lock = threading.Lock()
        self._checked_at = time.monotonic()
        self._state = self._file_state()
        # Why the file could not be used when it was last read.
        self._problem: str | None = None
        self._keys = self._load()

    @staticmethod
    def load(keys_file: Path | None, api_keys: Sequence[str] = (), admin_key: str | None = None) -> "KeyRing":
        """Keys of a server.

        Args:
            keys_file: file that `expertsteer key new --file` writes.
            api_keys: inference keys without limits, called `api-key-1`, `api-key-2`, ...; empty texts do not count.
            admin_key: a write key, called `admin`.

        Raises:
            ValueError: a key or the file cannot be used; one sentence says why.
        """
        fixed = []
        for index, text in enumerate([text for text in api_keys if text], start=1):
            check_key(text, f"--api-key number {index}")
            fixed.append(Key(hash_key(text), Identity(f"api-key-{index}", Role.INFERENCE)))
        if admin_key:
            check_key(admin_key, "The admin key")
            fixed.append(Key(hash_key(admin_key), Identity(ADMIN_NAME, Role.WRITE)))
        return KeyRing(fixed, keys_file)

    @property
    def has_any(self) -> bool:
        """Whether the server asks for keys at all; never changes while it runs."""
        return bool(self._fixed) or self._file is not None

    @property
    def guards_inference(self) -> bool:
        """Whether inference needs a key: there is a file, or a flag that names inference keys. An admin key from the
        environment closes nothing that was open."""
        return self._file is not None or any(key.identity.role is Role.INFERENCE for key in self._fixed)

    @property
    def has_admin(self) -> bool:
        """Whether any write key is valid now."""
        now = self._now()
        return any(key.identity.role is Role.WRITE and key.is_valid(now) for key in self._keys)

    def identify(self, presented: str | None) -> Identity | None:
        """Whose key this is; None for no key, an unknown one and one that has expired.

        It takes as long for every key of the same length: all hashes are compared, each in constant time.
        """
        if presented is None or len(presented) > MAX_KEY_LENGTH:
            return None
        digest, now, found = hash_key(presented), self._now(), None
        for key in self._keys:
            if hmac.compare_digest(digest, key.sha256):
                found = key
        return found.identity if found is not None and found.is_valid(now) else None

    def is_due(self) -> bool:
        """Whether the file deserves another look: a check of the clock, cheap enough for every request."""
        return self._file is not None and time.monotonic() - self._checked_at >= CHECK_INTERVAL_S

    def refresh(self) -> None:
        """Read the file again if it has changed. A file that cannot be used changes nothing, and is logged once."""
        # Whoever finds another thread here goes on with the keys that are known.
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._checked_at = time.monotonic()
            state = self._file_state()
            if state == self._state and self._problem is None:
                return
            self._state = state
            try:
                self._keys = self._load()
            except ValueError as error:
                # The next look may succeed, though nothing of the file has changed.
                if str(error) != self._problem:
                    _logger.error("The keys stay as they were: %s", error)
                self._problem = str(error)
            else:
                self._problem = None
                _logger.info("%d keys are known now.", len(self._keys))
        finally:
            self._lock.release()

    def _file_state(self) -> FileState | None:
        if self._file is None:
            return None
        try:
            status = self._file.stat()
        except OSError:
            return None
        return FileState(status.st_ino, status.st_mtime_ns, status.st_size, status.st_ctime_ns)

    def _load(self) -> tuple[Key, ...]:
        from_file = () if self._file is None else read_keys(self._file)
        keys = (*self._fixed, *from_file)
        if len(keys) > MAX_KEYS:
            raise ValueError(f"There are {len(keys)} keys, more than {MAX_KEYS}; take some out.")
        names: set[str] = set()
        hashes: dict[bytes, str] = {}
        for key in keys:
            name = key.identity.name
            if name in names:
                raise ValueError(f"Two keys are called {quoted(name)}; rename one.")
            if key.sha256 in hashes:
                raise ValueError(
                    f"{quoted(hashes[key.sha256])} and {quoted(name)} are the same key; give each a key of its own."
                )
            names.add(name)
            hashes[key.sha256] = name
        return keys
