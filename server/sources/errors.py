"""The one error type of bundle sources: a stable code and one sentence for people."""

from enum import StrEnum


class SourceErrorCode(StrEnum):
    """Why the bytes of a bundle were not taken. The values are stable; clients may match them."""

    BAD_NAME = "bad_name"
    BAD_ADDRESS = "bad_address"
    BAD_DIGEST = "bad_digest"
    SCHEME_DISABLED = "scheme_disabled"
    MISSING_PACKAGE = "missing_package"
    NOT_FOUND = "not_found"
    NOT_A_FILE = "not_a_file"
    UNREADABLE = "unreadable"
    REFUSED = "refused"
    BAD_REDIRECT = "bad_redirect"
    UNAVAILABLE = "unavailable"
    TIMEOUT = "timeout"
    EMPTY = "empty"
    TOO_LARGE = "too_large"
    DIGEST_MISMATCH = "digest_mismatch"
    NO_SPACE = "no_space"
    STORAGE_FAILED = "storage_failed"
    BAD_KEY = "bad_key"
    UNSIGNED = "unsigned"
    BAD_SIGNATURE = "bad_signature"


class SourceError(RuntimeError):
    """A refusal. `str(error)` is one sentence that names the value, the bound and the remedy, and holds no secret."""

    def __init__(self, code: SourceErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code
