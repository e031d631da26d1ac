"""Text of strangers inside Markdown: it shows as it is and formats nothing."""

import re
from collections.abc import Sequence

# Everything that opens emphasis, code, links, images, HTML, entities, tables, headings, mathematics or mentions, and
# what makes a bare address a link.
_SPECIAL = re.compile(r"[`*_{}\[\]<>#|~&$@!^=]|(?<=[a-zA-Z]):|(?<=www)\.")
# What makes a line a list item; none of it does anything within a line.
_LIST_ITEM = re.compile(r"[-+0-9]")


def plain(text: str) -> str:
    """Return `text` as one line: white space becomes single spaces, control characters their Python escapes."""
    return " ".join(
        "".join(char if char.isprintable() or char.isspace() else repr(char)[1:-1] for char in text).split()
    )


def escaped(text: str) -> str:
    """Return `text` as Markdown within a line, or within a table cell, that renders as the words of `plain(text)`."""
    parts = [_SPECIAL.sub(lambda match: f"\\{match[0]}", part) for part in plain(text).split("\\")]
    # A backslash as an entity: before a bracket even an escaped one opens a formula on the hub.
    return "&#92;".join(parts)


def paragraph(text: str) -> str:
    """Return `text` as a paragraph of Markdown that renders as the words of `plain(text)`."""
    words = escaped(text)
    return f"&#{ord(words[0])};{words[1:]}" if _LIST_ITEM.match(words) else words


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """Return a table whose cells are Markdown already; with `numbers` all but the first column are right-aligned."""
    rule = [":--", *("--:" if numbers else ":--" for _ in columns[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows))
