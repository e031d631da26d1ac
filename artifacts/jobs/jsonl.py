"""JSON Lines files, one object at a time, whatever a file may hold."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pydantic_core import from_json

from artifacts.jobs.errors import BuildError

# A hundred thousand tokens of text are about half a megabyte; more is no row but a broken file.
MAX_LINE_BYTES: Final = 16 * 2**20
_MARKS: Final = {b"\xef\xbb\xbf": "UTF-8", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


@dataclass(frozen=True)
class Origin:
    """Where a row was read; all origins are equal, so that equal rows are equal wherever they stand.

    Attributes:
        path: of the file; None for a row that comes from no file.
        line: counted from 1.
        side: of a pair.
    """

    path: Path | None = field(default=None, compare=False)
    line: int = field(default=0, compare=False)
    side: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        if self.path is None:
            return "a row of no file"
        return f"{self.path} line {self.line}" + (f" ({self.side})" if self.side else "")


def read_objects(path: Path) -> Iterator[tuple[Origin, dict[str, Any]]]:
    """Origin and object of every line that is not blank; memory holds one line.

    Raises:
        BuildError: unreadable file, byte order mark, or a line that is too long, no UTF-8, no JSON or no object.
    """
    try:
        with path.open("rb") as file:
            number = 0
            # Lines end at a line feed only: U+2028 and its like may stand inside a JSON string.
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if number == 1:
                    _refuse_mark(path, line)
                if line.strip():
                    yield Origin(path, number), _parse(f"{path} line {number}", line)
    except OSError as error:
        raise BuildError(f"cannot read the data file {path}: {error}") from error


def _refuse_mark(path: Path, line: bytes) -> None:
    for mark, encoding in _MARKS.items():
        if line.startswith(mark):
            raise BuildError(
                f"{path} line 1 starts with a {encoding} byte order mark; save it as UTF-8 without a byte order mark"
            )


def _parse(where: str, line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise BuildError(f"{where} has more than {MAX_LINE_BYTES} bytes; every row needs a line of its own")
    if b"\0" in line:
        raise BuildError(
            f"{where}: NUL at byte {line.index(0) + 1}; the file is damaged or not UTF-8, take the NUL out"
        )
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BuildError(
            f"{where}: byte {error.start + 1} is no UTF-8 ({line[error.start]:#04x}); save the file as UTF-8"
        ) from None
    try:
        value = from_json(line)
    except ValueError as error:
        # The parser counts lines of the one line that it was given.
        raise BuildError(f"{where}: row: Invalid JSON: {str(error).replace(' at line 1 ', ' at ')}") from None
    if not isinstance(value, dict):
        raise BuildError(f"{where}: a JSON {type(value).__name__}; every line needs an object, in braces")
    return value
