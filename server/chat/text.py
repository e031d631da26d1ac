"""Text of a model on a terminal: nothing in it drives the terminal; words that differ between two answers."""

import difflib
import re
import unicodedata
from typing import NamedTuple

# Line breaks and tabs are layout. Joiners are part of words in many scripts, and of emoji.
_LAYOUT = frozenset("\n\t\u200c\u200d")
_WORDS = re.compile(r"\S+")


class Piece(NamedTuple):
    """A stretch of an answer, and whether the other answer has something else there."""

    text: str
    differs: bool


def shown(text: str) -> str:
    """`text` with control and direction-changing characters escaped, in any language."""
    return "".join(char if _is_harmless(char) else repr(char)[1:-1] for char in text)


def compared(left: str, right: str) -> tuple[list[Piece], list[Piece]]:
    """Two answers in pieces, by words: those of the longest common sequence do not differ."""
    words = [list(_WORDS.finditer(text)) for text in (left, right)]
    left_words, right_words = ([word.group() for word in each] for each in words)
    matcher = difflib.SequenceMatcher(None, left_words, right_words)
    differing: tuple[set[int], set[int]] = set(), set()
    for tag, left_from, left_to, right_from, right_to in matcher.get_opcodes():
        if tag != "equal":
            differing[0].update(range(left_from, left_to))
            differing[1].update(range(right_from, right_to))
    return _pieces(left, words[0], differing[0]), _pieces(right, words[1], differing[1])


def _is_harmless(char: str) -> bool:
    return char.isprintable() or char in _LAYOUT or unicodedata.category(char) == "Zs"


def _pieces(text: str, words: list[re.Match[str]], differing: set[int]) -> list[Piece]:
    """The blanks before a word belong to the piece before it, so that only words are marked."""
    pieces, end = [], 0
    for number, word in enumerate(words):
        pieces += [Piece(text[end : word.start()], False), Piece(word.group(), number in differing)]
        end = word.end()
    return [piece for piece in (*pieces, Piece(text[end:], False)) if piece.text]
