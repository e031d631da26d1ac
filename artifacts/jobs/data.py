"""Rows of the JSON Lines files that a build reads.

One format serves every file: `messages` (a chat) or `text`, with `group`, `template` and what the kind of row adds.
A contrast or mapping file may also hold paired prompts, `positive` and `negative`, each line in either form.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeVar

from pydantic import BaseModel, ConfigDict, PrivateAttr, StrictInt, ValidationError, field_validator, model_validator

from artifacts.jobs.errors import BuildError
from artifacts.jobs.families import families
from artifacts.jobs.jsonl import Origin, read_objects


def _refuse_blank(text: str, name: str) -> None:
    if not text.strip():
        raise ValueError(f"{name} is empty or white space")
    if "\0" in text:
        raise ValueError(f"{name} holds a NUL character; take it out")


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    role: str
    content: str

    @field_validator("content")
    @classmethod
    def _not_blank(cls, content: str) -> str:
        _refuse_blank(content, "a message")
        return content


class Text(BaseModel):
    """A chat or plain text. Other keys are ignored.

    A chat that ends in an assistant message has that message as its response; any other is read up to the generation
    prompt. Plain text has a response only where `response` gives one, which follows `text` directly.

    `group` names what the row is about and `template` the pattern that its words were filled into: rows of one group
    or of one template stay on one side of every split.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")
    # Whether a line may hold two rows of this kind, `positive` and `negative`.
    PAIRED: ClassVar[bool] = True

    messages: tuple[Message, ...] = ()
    text: str = ""
    response: str | None = None
    group: str | None = None
    template: str | None = None
    _origin: Origin = PrivateAttr(default=Origin())

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if bool(self.messages) == bool(self.text):
            raise ValueError("exactly one of `messages` and `text` must be given and not empty")
        if self.text:
            _refuse_blank(self.text, "`text`")
        if self.response is not None:
            _refuse_blank(self.response, "`response`")
            if self.messages:
                raise ValueError("`response` goes with `text`; end a chat in an assistant message instead")
        if self.messages and self.messages[-1].role == "assistant" and len(self.messages) == 1:
            raise ValueError("the chat holds an assistant message only; give the prompt that it answers")
        return self

    @property
    def has_response(self) -> bool:
        return self.messages[-1].role == "assistant" if self.messages else self.response is not None

    @property
    def where(self) -> str:
        """File and line that the row was read from, for messages; part of no comparison and no dump."""
        return str(self._origin)

    @property
    def line(self) -> int:
        """Line of its file, counted from 1; 0 for a row that comes from no file."""
        return self._origin.line


class ContrastRow(Text):
    """An example of the concept (label 1) or of its absence (label 0)."""

    label: Literal[0, 1]
    split: Literal["fit", "tune", "test"] = "fit"
    set: StrictInt | None = None


class Question(Text):
    """A prompt and the exact answer that a steered model should give."""

    PAIRED = False
    answer: str

    @model_validator(mode="after")
    def _only_the_answer(self) -> Self:
        _refuse_blank(self.answer, "`answer`")
        if self.has_response:
            raise ValueError("a question ends in the user's turn; what the model should say goes into `answer`")
        return self


class NeutralRow(Text):
    """Text that steering must leave alone; its perplexity is watched."""

    PAIRED = False
    split: Literal["tune", "test"]


Row = TypeVar("Row", bound=Text)


class RetentionRow(Question):
    """A question on another subject. Rows of split `tune` bound the strength, those of `test` are measured last."""

    split: Literal["tune", "test"]


class GroupSplit(NamedTuple):
    """Row indices of a split by group."""

    fit: list[int]
    choose: list[int]
    held: list[int]


class Repeat(NamedTuple):
    """Two rows with the same content."""

    first: Text
    again: Text


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Read a JSON Lines file.

    Plain texts and chats without a label may repeat, as small talk does in any corpus; `repeats` lists them. A question
    may not: asked twice, it would count twice in every accuracy.

    Raises:
        BuildError: unreadable, empty, a line that is no such row, or a repeated question; lines are named.
    """
    rows = [row for origin, value in read_objects(path) for row in _rows(value, kind, origin)]
    if not rows:
        raise BuildError(f"the data file {path} has no rows; at least one is needed")
    if issubclass(kind, Question):
        for first, again in repeats(rows):
            raise BuildError(f"{again.where} asks the question of line {_line(first)} again; take one of them out")
    return rows


def read_contrast(path: Path) -> list[ContrastRow]:
    """Read labelled examples, paired prompts or both; every line stands for itself.

    A pair is two rows of one group, its own unless `group` names another: `positive` with label 1, then `negative`
    with label 0. Each is a string (text), a list (messages) or an object with the keys of a row.

    Raises:
        BuildError: as `read_rows`; a text that repeats within a set, with the same label or the other; only one
            label; a group or template in two of the file's own splits.
    """
    rows = read_rows(path, ContrastRow)
    for numbered in sorted({row.set for row in rows}, key=str):
        for first, again in repeats([row for row in rows if row.set == numbered]):
            same = isinstance(first, ContrastRow) and isinstance(again, ContrastRow) and first.label == again.label
            reason = "with the same label, so it would count twice" if same else "with the other label"
            raise BuildError(f"{again.where} repeats the text of line {_line(first)} {reason}; take one of them out")
    labels = {row.label for row in rows}
    if labels != {0, 1}:
        raise BuildError(
            f"all {len(rows)} rows of {path} have label {labels.pop()}; both 0 and 1 are needed to contrast them"
        )
    for key in ("group", "template"):
        _refuse_crossing(rows, key)
    return rows


def content(row: Text) -> str:
    """What the models read, as one comparable string."""
    if row.messages:
        return json.dumps([[message.role, message.content] for message in row.messages])
    return row.text if row.response is None else json.dumps([row.text, row.response])


def repeats(rows: Sequence[Text]) -> list[Repeat]:
    """Rows whose content stood in an earlier row, each with the first such row, in order."""
    seen: dict[str, Text] = {}
    return [Repeat(first, row) for row in rows if (first := seen.setdefault(content(row), row)) is not row]


def split_by_group(rows: Sequence[Text], choose: float, held: float, seed: int) -> GroupSplit:
    """Split rows so that no group and no template is on two sides; the order of the file does not matter.

    Args:
        rows: a row without a group is its own group, together with equal rows.
        choose, held: share of the groups on these sides, each at least one group; the rest is for fitting. Groups
            that share a template count as one.
        seed: changes which groups go where.

    Raises:
        BuildError: fewer than three groups that share no template.
    """
    groups = [row.group if row.group is not None else content(row) for row in rows]
    names = families(groups, [row.template for row in rows])
    ordered = sorted(set(names), key=lambda name: hashlib.sha256(f"{seed}\n{name}".encode()).digest())
    if len(ordered) < 3:
        raise BuildError(
            f"{len(ordered)} group(s) in the data, those that share a template taken together; at least 3 are needed "
            "to fit, choose and hold out"
        )
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


def refuse_shared_templates(parts: Mapping[str, Sequence[Text]]) -> None:
    """Check that no template serves two of the named splits, which come from different files.

    Raises:
        BuildError: one does; both lines are named.
    """
    seen: dict[str, tuple[str, Text]] = {}
    for name, rows in parts.items():
        for row in rows:
            if row.template is not None:
                other, first = seen.setdefault(row.template, (name, row))
                if other != name:
                    raise BuildError(
                        f"template {row.template!r} is in {other} ({first.where}) and in {name} ({row.where}); a "
                        "template family belongs to one split, or the figures flatter the vector"
                    )


def _rows(value: dict[str, Any], kind: type[Row], origin: Origin) -> Iterator[Row]:
    if not kind.PAIRED or not value.keys() & {"positive", "negative"}:
        yield _row(value, kind, origin)
        return
    wrong = sorted({"positive", "negative"} - value.keys()) or sorted(value.keys() & {"text", "messages", "label"})
    if wrong:
        raise BuildError(f"{origin}: a pair has `positive` and `negative` and no other text or label; see {wrong[0]!r}")
    shared = {key: each for key, each in value.items() if key not in ("positive", "negative")}
    # The same pair is the same group wherever it stands in the file.
    texts = json.dumps([value["positive"], value["negative"]], sort_keys=True)
    shared.setdefault("group", f"pair {hashlib.sha256(texts.encode()).hexdigest()}")
    for side, label in (("positive", 1), ("negative", 0)):
        given = value[side]
        keys = given if isinstance(given, dict) else {"messages" if isinstance(given, list) else "text": given}
        yield _row({**keys, **shared, "label": label}, kind, replace(origin, side=side))


def _row(value: dict[str, Any], kind: type[Row], origin: Origin) -> Row:
    try:
        row = kind.model_validate(value)
    except ValidationError as error:
        causes = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'row'}: {each['msg']}" for each in error.errors())
        raise BuildError(f"{origin}: {causes}") from None
    row._origin = origin
    return row


def _line(row: Text) -> int:
    return row._origin.line


def _refuse_crossing(rows: Sequence[ContrastRow], key: Literal["group", "template"]) -> None:
    seen: dict[str, ContrastRow] = {}
    for row in rows:
        name = getattr(row, key)
        if name is not None and seen.setdefault(name, row).split != row.split:
            first = seen[name]
            raise BuildError(
                f"{key} {name!r} is in split {first.split} ({first.where}) and in split {row.split} "
                f"(line {_line(row)}); every {key} belongs to one split"
            )
