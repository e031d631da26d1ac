"""Identities: who a request is from, what that one may do, and the hash that shows it."""

import hashlib
import logging
import re
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import cached_property

# vLLM shows loggers under its own name only.
_logger = logging.getLogger("vllm.expertsteer.access")

MAX_KEY_LENGTH = 512
SHORT_KEY_LENGTH = 16
_WILD = frozenset("*?[")
_KEY = re.compile(rf"[!-~]{{1,{MAX_KEY_LENGTH}}}")


class Role(StrEnum):
    """What a key is for."""

    INFERENCE = "inference"
    READ = "read"
    WRITE = "write"


@dataclass(frozen=True)
class Identity:
    """Who a request is from.

    Attributes:
        name: name of the key, never the key.
        role: what the key is for.
        profiles: patterns (as in a shell, with case) of the profiles that it may ask for; None for all.
        maximum_strength: bound of the absolute strength that it may ask for; None for the profile's own.
    """

    name: str
    role: Role
    profiles: tuple[str, ...] | None = None
    maximum_strength: float | None = None

    def may_use(self, profile: str) -> bool:
        """Whether requests of this identity may name a profile."""
        if self.profiles is None:
            return True
        return profile in self._names or any(fnmatchcase(profile, pattern) for pattern in self._patterns)

    # Of a thousand names, one is found at once; only patterns are gone through.
    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.profiles or ())

    @cached_property
    def _patterns(self) -> tuple[str, ...]:
        return tuple(pattern for pattern in self.profiles or () if not _WILD.isdisjoint(pattern))


ANONYMOUS = Identity("anonymous", Role.INFERENCE)


@dataclass(frozen=True)
class Key:
    """One key: the hash of its text, never the text.

    Attributes:
        sha256: SHA-256 of the key.
        identity: whose key it is.
        not_after: the moment that ends its validity; None for never.
    """

    sha256: bytes
    identity: Identity
    not_after: datetime | None = None

    def is_valid(self, now: datetime) -> bool:
        """Whether it is accepted at this time."""
        return self.not_after is None or now <= self.not_after


def hash_key(key: str) -> bytes:
    """SHA-256 of a key as a client sends it."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def check_key(key: str, what: str) -> None:
    """Refuse a text that cannot be sent as a key, and warn about one that can be guessed.

    Raises:
        ValueError: it is empty, too long, or holds white space or characters other than ASCII; the message does not
            hold the key.
    """
    if not _KEY.fullmatch(key):
        raise ValueError(
            f"{what} is not 1 to {MAX_KEY_LENGTH} visible ASCII characters; make one by: expertsteer key new."
        )
    if len(key) < SHORT_KEY_LENGTH:
        _logger.warning("%s has %d characters and can be guessed; make one by: expertsteer key new.", what, len(key))
