"""Names of bundle files: the same narrow rule for the bundle root, repositories and buckets."""

import unicodedata

from artifacts.errors import quoted
from server.sources.errors import SourceError, SourceErrorCode

SUFFIX = ".safetensors"
MAX_NAME_BYTES, MAX_PART_BYTES, MAX_PARTS = 1024, 255, 16


def name_parts(name: str) -> tuple[str, ...]:
    """Return the parts of `name`, a relative path with `/` between folders that ends in `.safetensors`.

    Raises:
        SourceError: `bad_name`: absolute, an empty part, a part that begins with a dot (so no `.` and no `..`), a
            backslash, a control, format or other unprintable character, not NFC, too long or too deep.
    """
    problem = _problem(name)
    if problem is not None:
        message = f"the name {quoted(name)} {problem}; give a relative path such as 'medical/v1{SUFFIX}'"
        raise SourceError(SourceErrorCode.BAD_NAME, message)
    return tuple(name.split("/"))


def _problem(name: str) -> str | None:
    # Length first: the other checks walk the whole text. Printable second: half of a surrogate pair cannot be encoded.
    if len(name) > MAX_NAME_BYTES:
        return f"has more than {MAX_NAME_BYTES} characters"
    if not name.isprintable():
        return "has a character that cannot be printed"
    if len(name.encode()) > MAX_NAME_BYTES:
        return f"has more than {MAX_NAME_BYTES} bytes"
    if "\\" in name:
        return "has a backslash"
    if not unicodedata.is_normalized("NFC", name):
        return "is not in Unicode form NFC"
    if not name.endswith(SUFFIX):
        return f"does not end in {SUFFIX}"
    return _problem_of_parts(name.split("/"))


def _problem_of_parts(parts: list[str]) -> str | None:
    if len(parts) > MAX_PARTS:
        return f"has more than {MAX_PARTS} parts"
    if not all(parts):
        return "is absolute or has an empty part"
    if any(part.startswith(".") for part in parts):
        return "has a part that begins with a dot"
    if any(len(part.encode()) > MAX_PART_BYTES for part in parts):
        return f"has a part of more than {MAX_PART_BYTES} bytes"
    return None
