"""Rows of the JSON Lines files that a build reads."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from artifacts.jobs.errors import BuildError


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    role: str
    content: str


class Text(BaseModel):
    """A chat, read at its generation prompt, or plain text, read at its last token. Other keys are ignored.

    `group` names what the row is about: rows of one group stay on one side of every split.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")
    messages: tuple[Message, ...] = ()
    text: str = ""
    group: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if bool(self.messages) == bool(self.text):
            raise ValueError("exactly one of `messages` and `text` must be given and not empty")
        return self


class ContrastRow(Text):
    """An example of the concept (label 1) or of its absence (label 0)."""

    label: Literal[0, 1]
    split: Literal["fit", "tune", "test"] = "fit"
    set: int | None = None


class Question(Text):
    """A prompt and the exact answer that a steered model should give."""

    answer: str


class NeutralRow(Text):
    """Text that steering must leave alone; its perplexity is watched."""

    split: Literal["tune", "test"]


Row = TypeVar("Row", bound=Text)


class GroupSplit(NamedTuple):
    """Row indices of a split by group."""

    fit: list[int]
    choose: list[int]
    held: list[int]


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Read a JSON Lines file.

    Raises:
        BuildError: unreadable, empty, or a line that is no such row (its number is named).
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BuildError(f"cannot read the data file {path}: {error}") from error
    rows = [_parse(line, kind, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise BuildError(f"the data file {path} has no rows; at least one is needed")
    return rows


def _parse(line: str, kind: type[Row], path: Path, number: int) -> Row:
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        causes = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'row'}: {each['msg']}" for each in error.errors())
        raise BuildError(f"{path} line {number}: {causes}") from None


def content(row: Text) -> str:
    """What the models read, as one comparable string."""
    return json.dumps([[message.role, message.content] for message in row.messages]) if row.messages else row.text


def split_by_group(rows: Sequence[Text], choose: float, held: float, seed: int) -> GroupSplit:
    """Split rows so that no group is on two sides; the order of the file and other groups do not matter.

    Args:
        rows: a row without a group is its own group, together with equal rows.
        choose, held: share of the groups on these sides, each at least one group; the rest is for fitting.
        seed: changes which groups go where.

    Raises:
        BuildError: fewer than three groups.
    """
    names = [row.group if row.group is not None else content(row) for row in rows]
    ordered = sorted(set(names), key=lambda name: hashlib.sha256(f"{seed}\n{name}".encode()).digest())
    if len(ordered) < 3:
        raise BuildError(f"{len(ordered)} group(s) in the data; at least 3 are needed to fit, choose and hold out")
    num_held = max(1, round(held * len(ordered)))
    num_choose = max(1, round(choose * len(ordered)))
    sides = {name: 2 if index < num_held else 1 for index, name in enumerate(ordered[: num_held + num_choose])}
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for index, name in enumerate(names):
        parts[sides.get(name, 0)].append(index)
    return GroupSplit(*parts)


def shared_contents(first: Sequence[Text], second: Sequence[Text]) -> int:
    """Number of distinct texts that occur in both."""
    return len({content(row) for row in first} & {content(row) for row in second})
