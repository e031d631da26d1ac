"""The chat as a loop of lines on a terminal."""

import contextlib
import io
import sys
from types import ModuleType

from server.chat.chat import Chat
from server.chat.commands import Commands, Quit
from server.chat.text import shown
from server.client import SteeringClientError


def talk(chat: Chat, commands: Commands) -> None:
    """Read lines and answer them until Ctrl-D or `/quit`. Ctrl-C stops an answer, or clears the line."""
    _edit_lines(commands)
    # A byte that is no text of the terminal's encoding must not end the chat.
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            line = input(_prompt(chat)).strip()
        except KeyboardInterrupt:
            chat.screen.line()
            continue
        except EOFError:
            chat.screen.line()
            return
        # Nor can it be sent on.
        line = line.encode(errors="replace").decode()
        try:
            if line.startswith("/") and not line.startswith("//"):
                commands.run(line[1:])
            elif line:
                chat.say(line[1:] if line.startswith("//") else line)
        except SteeringClientError as error:
            chat.screen.error(error)
        except KeyboardInterrupt:
            chat.screen.line("Stopped.", "dim")
        except Quit:
            return


def _prompt(chat: Chat) -> str:
    label = shown(chat.conversation.label)
    return f"unsteered | {label}> " if chat.conversation.is_side_by_side else f"{label}> "


def _edit_lines(commands: Commands) -> None:
    """Arrow keys, the lines before, and Tab after a slash, where Python has readline."""
    readline: ModuleType | None = None
    with contextlib.suppress(ImportError):
        import readline
    if readline is None:
        return
    found: list[str] = []

    def complete(text: str, state: int) -> str | None:
        if state == 0:
            found[:] = [f"/{name} " for name in commands.names if text.startswith("/") and name.startswith(text[1:])]
        return found[state] if state < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" ")
    readline.parse_and_bind("tab: complete")
