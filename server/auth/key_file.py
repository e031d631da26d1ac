"""File of keys, in YAML: `keys: [{name, sha256 | key, role, profiles, maximum_strength, not_after}, ...]`."""

import contextlib
import fcntl
import logging
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from artifacts.errors import quoted
from server import yaml_file
from server.auth.identity import Identity, Key, Role, check_key, hash_key

_logger = logging.getLogger("vllm.expertsteer.access")

MAX_FILE_BYTES = 1 << 20
# Every key is compared with every request's, so their number is what a request pays.
MAX_KEYS = 1024
MAX_PATTERNS = 1024
# The form needs 4.
_MAX_DEPTH = 8
# Written with a hyphen in front and a colon behind: `- name:`.
_LIST_ITEM = re.compile(r"^( *)- ", re.MULTILINE)
_END_OF_DAY = time(23, 59, 59, 999999, tzinfo=UTC)


class KeyEntry(BaseModel):
    """One key of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    role: Role
    key: str | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    profiles: (
        Annotated[tuple[Annotated[str, Field(min_length=1, max_length=128)], ...], Field(max_length=MAX_PATTERNS)]
        | None
    ) = None
    maximum_strength: Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)] | None = None
    not_after: datetime | None = None

    @field_validator("not_after", mode="before")
    @classmethod
    def _read_time(cls, value: object) -> object:
        return None if value is None else _moment(value)

    @model_validator(mode="after")
    def _check(self) -> "KeyEntry":
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("exactly one of key and sha256 must be given")
        if self.role is not Role.INFERENCE and (self.profiles is not None or self.maximum_strength is not None):
            raise ValueError(f"profiles and maximum_strength belong to role inference, not to role {self.role}")
        return self

    def to_key(self) -> Key:
        """The key, without its text.

        Raises:
            ValueError: the text cannot be sent as a key.
        """
        if self.sha256 is not None:
            digest = bytes.fromhex(self.sha256)
        else:
            assert self.key is not None
            check_key(self.key, f"Key {quoted(self.name)}")
            digest = hash_key(self.key)
        return Key(digest, Identity(self.name, self.role, self.profiles, self.maximum_strength), self.not_after)

    def to_yaml(self, indent: int = 0) -> str:
        """The entry as the file has it, as an item of the list."""
        fields = self.model_dump(mode="json", exclude_none=True)
        text = yaml.safe_dump([fields], sort_keys=False, default_flow_style=False, allow_unicode=False)
        return "".join(" " * indent + line for line in text.splitlines(keepends=True))


def _moment(value: object) -> datetime:
    """A date is the end of that day, and a time without a zone is in UTC.

    Raises:
        ValueError: it is neither.
    """
    for parse in (date.fromisoformat, datetime.fromisoformat):
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = parse(value)
    if isinstance(value, datetime):
        return value if value.tzinfo is not None else value.replace(tzinfo=UTC)
    if isinstance(value, date):
        return datetime.combine(value, _END_OF_DAY)
    raise ValueError(f"{quoted(value)} is no ISO date or time, as 2030-01-31 or 2030-01-31T12:00:00+00:00")


def read_keys(path: Path) -> list[Key]:
    """Keys of a file.

    Raises:
        ValueError: the file cannot be read or understood; one sentence names it and never holds a key.
    """
    return [entry.to_key() for entry in read_entries(path)]


def read_entries(path: Path) -> list[KeyEntry]:
    """Entries of a file, in its order.

    Raises:
        ValueError: as `read_keys`.
    """
    return parse_entries(_read_bytes(path), path)


def parse_entries(data: bytes, path: Path) -> list[KeyEntry]:
    """Entries of the content of a file; `path` is for messages only.

    Raises:
        ValueError: as `read_keys`.
    """
    content = yaml_file.parse(data, f"Keys file {path}", _MAX_DEPTH)
    if not isinstance(content, dict) or set(content) != {"keys"} or not isinstance(content["keys"] or [], list):
        raise ValueError(f"Keys file {path} is not of the form 'keys: [{{name, sha256, role}}, ...]'.")
    entries = content["keys"] or []
    if len(entries) > MAX_KEYS:
        raise ValueError(f"Keys file {path} has {len(entries)} keys, more than {MAX_KEYS}; take some out.")
    return [_entry(entry, index, path) for index, entry in enumerate(entries, start=1)]


def make_entry(fields: object) -> KeyEntry:
    """An entry from its fields.

    Raises:
        ValueError: a field is missing, unknown or wrong; one sentence names it.
    """
    try:
        return KeyEntry.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{f'{where}: ' if where else ''}{message}.") from None


def append_entry(path: Path, entry: KeyEntry) -> None:
    """Add an entry to a file, which is created when there is none; what is in it stays as it is.

    The file is replaced as a whole and is readable by its owner only.

    Raises:
        ValueError: the file cannot be read, has a key of that name, or is not written in a way that lets an item be
            added at its end.
    """
    # A link, as of a mounted secret, stays a link.
    path = path.resolve()
    with _locked(path.parent):
        data = _read_bytes(path) if path.exists() else b""
        present = parse_entries(data, path) if data.strip() else []
        if entry.name in {other.name for other in present}:
            raise ValueError(f"Keys file {path} has a key {quoted(entry.name)} already; choose another name.")
        changed = _appended(data.decode() if present else "keys:\n", entry)
        try:
            is_appended = parse_entries(changed, path) == [*present, entry]
        except ValueError:
            is_appended = False
        if not is_appended:
            raise ValueError(f"Keys file {path} does not end in a list in block style; add the entry by hand.")
        _replace(path, changed)


def _appended(text: str, entry: KeyEntry) -> bytes:
    indent = _LIST_ITEM.search(text)
    item = entry.to_yaml(2 if indent is None else len(indent[1]))
    return (text if text.endswith("\n") else text + "\n").encode() + item.encode()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from changing a file of this folder at the same time."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ValueError(f"Folder {folder} cannot be opened: {error.strerror}.") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _entry(entry: object, index: int, path: Path) -> KeyEntry:
    try:
        return make_entry(entry)
    except ValueError as error:
        raise ValueError(f"Keys file {path}, key {index}: {error}") from None


def _read_bytes(path: Path) -> bytes:
    data, mode = yaml_file.read(path, f"Keys file {path}", MAX_FILE_BYTES)
    if mode & (stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP):
        _logger.warning("Keys file %s is open to others (mode %o); close it by: chmod 600.", path, mode)
    return data


def _replace(path: Path, data: bytes) -> None:
    temporary = None
    try:
        # Readable by its owner only.
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise ValueError(f"Keys file {path} cannot be written: {error.strerror}.") from None
