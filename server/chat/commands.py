"""The chat's commands: lines that begin with a slash."""

import difflib
import json
import math
from collections.abc import Callable

from artifacts.errors import quoted
from artifacts.manifest import Scope
from server.chat.chat import Chat
from server.client import SteeringClient, SteeringClientError
from server.commands.connection import print_table
from server.inference import InferenceClient, check_profile

_OFF, _DEFAULT = "off", "default"
_DESCRIPTION_CHARS = 60


class Quit(Exception):
    """The user has had enough."""


class Commands:
    """Does what a line with a slash says."""

    def __init__(self, chat: Chat, client: InferenceClient, admin: SteeringClient) -> None:
        """Bind the commands to a chat.

        Args:
            chat: that they change.
            client: of the same server, for its models.
            admin: of the same server, for its profiles.
        """
        self._chat, self._client, self._admin = chat, client, admin
        self._known: dict[str, tuple[Callable[[str], None], str, str]] = {
            "profile": (self._profile, "NAME|off", "steer with a profile (or NAME@sha256:...) from now on, or not"),
            "strength": (self._strength, "X|default", "multiplier of the profile's vectors; negative reverses it"),
            "scope": (self._scope, "NAME|default", f"which tokens are steered: {', '.join(Scope)}"),
            "side": (self._side, "on|off", "answer everything twice, unsteered and steered, differing words marked"),
            "profiles": (self._profiles, "", "list the profiles that this key may use"),
            "system": (self._system, "TEXT|off", "system prompt"),
            "reset": (self._reset, "", "forget what was said; profile and system prompt stay"),
            "retry": (self._retry, "", "ask the last question again"),
            "receipt": (self._receipt, "", "what steered the last answer"),
            "help": (self._help, "", "this list"),
            "quit": (self._quit, "", "leave, as Ctrl-D does; Ctrl-C stops an answer"),
        }

    @property
    def names(self) -> list[str]:
        """What can stand after the slash."""
        return list(self._known)

    def run(self, line: str) -> None:
        """Do a command.

        Args:
            line: without its slash.

        Raises:
            SteeringClientError: it cannot be done; nothing has changed.
            Quit: the chat is to end.
            KeyboardInterrupt: the user stopped an answer.
        """
        name, _, rest = line.partition(" ")
        if name not in self._known:
            near = difflib.get_close_matches(name, self._known, n=1)
            hint = f"did you mean /{near[0]}?" if near else "/help lists the commands."
            raise _mistake(f"There is no command {quoted('/' + name)}; {hint}")
        self._known[name][0](rest.strip())

    def _profile(self, name: str) -> None:
        conversation = self._chat.conversation
        if name == _OFF:
            conversation.choose(None)
        elif name:
            check_profile(self._client.served(conversation.model), name)
            conversation.choose(name)
        self._chat.screen.line(f"profile: {conversation.label}", "dim")

    def _strength(self, text: str) -> None:
        conversation = self._chat.conversation
        if text:
            self._require_profile()
            conversation.strength = None if text == _DEFAULT else _number(text)
        self._chat.screen.line(f"strength: {_or_default(conversation.strength)}", "dim")

    def _scope(self, text: str) -> None:
        conversation = self._chat.conversation
        if text:
            self._require_profile()
            if text != _DEFAULT and text not in list(Scope):
                raise _mistake(f"Scope is {quoted(text)}, expected one of: {', '.join((*Scope, _DEFAULT))}.")
            conversation.scope = None if text == _DEFAULT else Scope(text)
        self._chat.screen.line(f"scope: {conversation.scope or _DEFAULT}", "dim")

    def _side(self, text: str) -> None:
        conversation = self._chat.conversation
        if text not in ("", "on", _OFF):
            raise _mistake(f"/side is {quoted(text)}, expected on or off.")
        wanted = not conversation.is_side_by_side if not text else text == "on"
        if wanted:
            self._require_profile()
        conversation.is_side_by_side = wanted
        self._chat.screen.line(f"side by side: {'on; the steered answers are kept' if wanted else _OFF}", "dim")

    def _profiles(self, _: str) -> None:
        profiles = self._admin.profiles()
        if not profiles:
            self._chat.screen.line("There are no profiles.", "dim")
            return
        rows = [
            (
                profile.name,
                f"{profile.strength:g}",
                f"{profile.maximum_strength:g}",
                profile.scope.value,
                profile.description[:_DESCRIPTION_CHARS],
            )
            for profile in profiles
        ]
        current = (self._chat.conversation.profile or "").partition("@")[0]
        print_table(("profile", "strength", "maximum", "scope", "description"), rows, current)

    def _system(self, text: str) -> None:
        conversation = self._chat.conversation
        if text:
            conversation.system = None if text == _OFF else text
        self._chat.screen.line(f"system prompt: {conversation.system or 'none'}", "dim")

    def _reset(self, _: str) -> None:
        self._chat.conversation.messages.clear()
        self._chat.screen.line("Forgotten.", "dim")

    def _retry(self, _: str) -> None:
        conversation = self._chat.conversation
        before = list(conversation.messages)
        question = conversation.take_back()
        if question is None:
            raise _mistake("There is no question to ask again.")
        try:
            self._chat.say(question)
        finally:
            if len(conversation.messages) < len(before):
                conversation.messages = before

    def _receipt(self, _: str) -> None:
        last = self._chat.last
        if last is None or not last.receipts:
            self._chat.screen.line("No answer yet." if last is None else "The last answer was not steered.", "dim")
            return
        for receipt in last.receipts:
            self._chat.screen.line(json.dumps(receipt.to_json(), indent=2))

    def _help(self, _: str) -> None:
        usages = {f"/{name} {usage}".rstrip(): text for name, (_, usage, text) in self._known.items()}
        width = max(map(len, usages))
        for usage, text in usages.items():
            self._chat.screen.line(f"{usage:<{width}}  {text}")
        self._chat.screen.line("A second slash sends a line that begins with one: //etc is a folder.", "dim")

    def _quit(self, _: str) -> None:
        raise Quit

    def _require_profile(self) -> None:
        if self._chat.conversation.profile is None:
            raise _mistake("No profile is chosen; /profiles lists them, /profile NAME chooses one.")


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _mistake(f"Strength is {quoted(text)}, expected a number, as 0.5 or -1.")
    return value


def _or_default(value: float | None) -> str:
    return _DEFAULT if value is None else f"{value:g}"


def _mistake(message: str) -> SteeringClientError:
    return SteeringClientError(None, "bad_argument", message)
