"""The one error type of the bundle format: a stable code and one sentence for people."""

import reprlib
from enum import StrEnum

# Bounded in depth as well as length: a file may nest lists as deep as the interpreter's stack.
_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8
_SHORT.maxlevel, _SHORT.maxlong, _SHORT.maxstring, _SHORT.maxother = 3, 60, 80, 80


class BundleErrorCode(StrEnum):
    """Why a bundle, or the model it is held against, was refused. The values are stable; clients may match them."""

    NOT_A_FILE = "not_a_file"
    UNREADABLE = "unreadable"
    EMPTY = "empty"
    TOO_LARGE = "too_large"
    PICKLE = "pickle"
    FOREIGN_FORMAT = "foreign_format"
    TRUNCATED = "truncated"
    HEADER_TOO_LARGE = "header_too_large"
    BAD_HEADER = "bad_header"
    WRONG_FORMAT = "wrong_format"
    UNKNOWN_SCHEMA = "unknown_schema"
    BAD_MANIFEST = "bad_manifest"
    UNKNOWN_KIND = "unknown_kind"
    LAYER_OUT_OF_RANGE = "layer_out_of_range"
    DUPLICATE_TENSOR = "duplicate_tensor"
    TOO_MANY_INTERVENTIONS = "too_many_interventions"
    BAD_GATE = "bad_gate"
    MISSING_TENSOR = "missing_tensor"
    UNNAMED_TENSOR = "unnamed_tensor"
    UNSAFE_DTYPE = "unsafe_dtype"
    WRONG_SHAPE = "wrong_shape"
    NON_FINITE = "non_finite"
    BAD_NORM = "bad_norm"
    NOT_ORTHOGONAL = "not_orthogonal"
    NOT_PLAIN_ADD = "not_plain_add"
    BAD_MODEL = "bad_model"
    MODEL_MISMATCH = "model_mismatch"


class BundleError(ValueError):
    """A refusal. `str(error)` is one sentence that names the value, the bound and the remedy."""

    def __init__(self, code: BundleErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type["BundleError"], tuple[BundleErrorCode, str]]:
        """Survive the process boundary between the server and its engine."""
        return type(self), (self.code, str(self))


def quoted(value: object, limit: int = 80) -> str:
    """Return `value` for a message: control characters escaped, about `limit` characters, no deep recursion."""
    if not isinstance(value, str):
        return _SHORT.repr(value)
    text = repr(value[:limit])
    return text if len(value) <= limit else f"{text}..."
