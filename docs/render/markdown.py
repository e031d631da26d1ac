"""Markdown from plain text."""

from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; cells are Markdown without line breaks."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def code(text: str) -> str:
    """Text as code inside a line."""
    return f"`{text}`"


def prose(text: str) -> str:
    """Plain text in one line, with nothing that Markdown would take for markup of HTML or for emphasis."""
    joined = " ".join(text.split())
    parts = joined.split("`")
    # Inside of backticks nothing is markup.
    parts[::2] = [part.replace("<", "\\<").replace("*", "\\*") for part in parts[::2]]
    return "`".join(parts)


def paragraphs(*parts: str) -> str:
    """Parts with blank lines between them; empty ones are left out."""
    return "\n\n".join(part.strip("\n") for part in parts if part.strip())
