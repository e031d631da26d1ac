"""The documents that users read, and the blocks of code in them."""

import re
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
_PATTERNS = ("README.md", "CONTRIBUTING.md", "docs/*.md", "artifacts/README.md", "deploy/**/*.md")
DOCUMENTS = sorted({path.relative_to(ROOT).as_posix() for pattern in _PATTERNS for path in ROOT.glob(pattern)})
# What a shell block needs that a test does not have; such a block is read, not run.
ELSEWHERE = frozenset({"gpu", "cluster", "docker"})
# A shell block that starts a server: it runs in the background, and the next block waits until the server is ready.
SERVER = "server"
_ADDRESS = re.compile(r"\b(?:href|src|srcset)=\"([^\"]+)\"")
_MARKDOWN = MarkdownIt("commonmark").enable("table")


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        place: document and line of its first line.
        language: first word of the info string, empty when there is none.
        marks: the other words.
        text: content.
    """

    place: str
    language: str
    marks: frozenset[str]
    text: str

    @property
    def runs(self) -> bool:
        """Whether a test can run it."""
        return self.language in ("sh", "python") and not self.marks & ELSEWHERE


def blocks(document: str) -> list[Block]:
    """Fenced blocks of a document, in order."""
    found = []
    for token in _MARKDOWN.parse((ROOT / document).read_text()):
        if token.type == "fence":
            assert token.map is not None
            language, *marks = token.info.split() or [""]
            found.append(Block(f"{document}:{token.map[0] + 2}", language, frozenset(marks), token.content))
    return found


def inline_codes(document: str) -> list[str]:
    """Code inside of lines."""
    return [" ".join(token.content.split()) for token in _inline(document) if token.type == "code_inline"]


def links(document: str) -> list[str]:
    """Targets of links and of pictures."""
    text = (ROOT / document).read_text()
    in_markup = [
        match[1]
        for token in [*_MARKDOWN.parse(text), *_inline(document)]
        if token.type in ("html_block", "html_inline")
        for match in _ADDRESS.finditer(token.content)
    ]
    return in_markup + [
        str(token.attrs.get("href", token.attrs.get("src"))) for token in _inline(document) if token.attrs
    ]


def anchors(document: str) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    tokens = _MARKDOWN.parse((ROOT / document).read_text())
    found: set[str] = set()
    for opening, inline in pairwise(tokens):
        if opening.type == "heading_open":
            text = "".join(child.content for child in inline.children or ())
            anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            numbered = (f"{anchor}-{number}" for number in range(1, 1000))
            found.add(anchor if anchor not in found else next(each for each in numbered if each not in found))
    return found


def _inline(document: str) -> list[Token]:
    tokens = _MARKDOWN.parse((ROOT / document).read_text())
    return [child for token in tokens if token.type == "inline" for child in token.children or ()]
