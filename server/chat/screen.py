"""What the chat shows: answers as they come, two side by side, receipts, errors."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from server.chat.answer import Answer
from server.chat.text import Piece, compared, shown
from server.client import SteeringClientError

# Two columns of fewer characters are hard to read.
_MIN_COLUMNS = 60
_REFRESHES_PER_S = 8
# Lines of a terminal that a growing answer leaves to its heading and to the prompt.
_SPARE_LINES = 4
_MARK = "bold reverse"


class Screen:
    """The terminal, or whatever standard output is. No text of a model or a server can drive it."""

    def __init__(self, *, is_for_one_answer: bool = False) -> None:
        """Prepare.

        Args:
            is_for_one_answer: keep everything but answers away from standard output.
        """
        # A terminal that cannot show a character gets an escape for it.
        for stream in (sys.stdout, sys.stderr):
            reconfigure = getattr(stream, "reconfigure", None)
            if reconfigure is not None:
                reconfigure(errors="backslashreplace")
        self._console = Console(highlight=False)
        self._errors = Console(stderr=True, highlight=False)
        self._facts = self._errors if is_for_one_answer else self._console

    @property
    def has_styles(self) -> bool:
        """Whether text can be bold or reversed here."""
        return self._console.color_system is not None

    def stream(self, text: str, is_reasoning: bool = False) -> None:
        """Show a text of an answer as it comes."""
        self._console.out(shown(text), style="dim" if is_reasoning else None, end="")
        self._console.file.flush()

    def line(self, text: str = "", style: str = "") -> None:
        """Show a line."""
        self._console.print(Text(shown(text), style=style), soft_wrap=True)

    def error(self, error: SteeringClientError) -> None:
        """Show an error on one line, with its code."""
        message = " ".join(shown(str(error)).split())
        self._errors.print(Text(f"error: {message} ({error.code})", style="red"), soft_wrap=True)

    def facts(self, answer: Answer) -> None:
        """Show how an answer came about, on one line."""
        self._facts.print(Text(shown(describe(answer)), style="dim"), soft_wrap=True)

    @contextmanager
    def two_streams(self, names: tuple[str, str], texts: tuple[list[str], list[str]]) -> Iterator[None]:
        """Show two answers while they grow, and take them away again.

        Args:
            names: above the answers.
            texts: of the answers; the caller adds to them.
        """
        if not self._console.is_terminal or not self.has_styles:
            yield
            return

        def view() -> RenderableType:
            lines = max(1, self._console.height - _SPARE_LINES)
            return self._beside(names, [self._tail("".join(parts), lines) for parts in texts])

        live = Live(get_renderable=view, console=self._console, refresh_per_second=_REFRESHES_PER_S, transient=True)
        with live:
            yield

    def two_answers(self, names: tuple[str, str], texts: tuple[str, str]) -> None:
        """Show two answers side by side, one above the other on a narrow terminal; differing words are marked."""
        self._console.print(self._beside(names, [self._marked(pieces) for pieces in compared(*texts)]))

    def _beside(self, names: tuple[str, str], texts: Sequence[Text]) -> RenderableType:
        headings = [Text(shown(name), style="bold") for name in names]
        if self._is_narrow:
            return Group(headings[0], texts[0], "", headings[1], texts[1])
        table = Table(box=None, expand=True, padding=(0, 2, 0, 0), pad_edge=False)
        for heading in headings:
            table.add_column(heading, ratio=1, overflow="fold")
        table.add_row(*texts)
        return table

    @property
    def _is_narrow(self) -> bool:
        return self._console.width < _MIN_COLUMNS

    def _tail(self, text: str, num_lines: int) -> Text:
        """The end of a text that is longer than the terminal is high."""
        width, num_lines = (
            (self._console.width, num_lines // 2) if self._is_narrow else (self._console.width // 2 - 2, num_lines)
        )
        lines = Text(shown(text)).wrap(self._console, max(1, width))
        return Text("\n").join(lines[-max(1, num_lines) :])

    def _marked(self, pieces: Sequence[Piece]) -> Text:
        text = Text()
        for piece in pieces:
            if piece.differs and not self.has_styles:
                text.append(f"*{shown(piece.text)}*")
            else:
                text.append(shown(piece.text), style=_MARK if piece.differs else "")
        return text


def describe(answer: Answer) -> str:
    """How an answer came about, in one line."""
    facts = [
        f"{receipt.profile} at {receipt.strength:g}, {receipt.scope.value}, {receipt.tokens_steered} tokens steered"
        for receipt in answer.receipts
    ] or ["unsteered"]
    if answer.num_tokens is not None:
        facts.append(f"{answer.num_tokens} tokens")
    if answer.tokens_per_s is not None:
        facts.append(f"{answer.tokens_per_s:.1f} tokens/s")
    if answer.finish_reason not in (None, "stop"):
        facts.append(f"ended by {answer.finish_reason}")
    return f"[{'; '.join(facts)}]"
