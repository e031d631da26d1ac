"""The one error type of the registry: a stable code and one sentence for people."""

from collections.abc import Sequence
from enum import StrEnum


class RegistryErrorCode(StrEnum):
    """Why the registry refused or failed. The values are stable."""

    NOT_FOUND = "not_found"
    IN_USE = "in_use"
    PRECONDITION_FAILED = "precondition_failed"
    NOT_HELD = "not_held"
    NEWER_SCHEMA = "newer_schema"
    STORE_DAMAGED = "store_damaged"
    LOCKED = "locked"
    BUNDLE_MISSING = "bundle_missing"
    UNSAFE_DIRECTORY = "unsafe_directory"
    IO = "io"


class RegistryError(RuntimeError):
    """A refusal or a failure. `str(error)` is one sentence that names the value, the bound and the remedy."""

    def __init__(self, code: RegistryErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class PreconditionFailed(RegistryError):
    """A profile is not at the version that a change expects.

    Attributes:
        found: generation of its current version; None when it does not exist.
    """

    def __init__(self, message: str, found: int | None) -> None:
        super().__init__(RegistryErrorCode.PRECONDITION_FAILED, message)
        self.found = found


class NotHeld(RegistryError):
    """Live instances do not hold a program yet, so no profile may name it.

    Attributes:
        instances: those that lack it.
    """

    def __init__(self, message: str, instances: Sequence[str]) -> None:
        super().__init__(RegistryErrorCode.NOT_HELD, message)
        self.instances = tuple(instances)
