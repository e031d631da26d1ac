"""`expertsteer chat`: talk to a server in the terminal, steered, unsteered or both side by side."""

import argparse
import math
import sys
from typing import TYPE_CHECKING

from server.commands.connection import (
    INFERENCE_KEY_VARIABLE,
    UsageError,
    add_connection_arguments,
    api_key,
    guarded,
)

if TYPE_CHECKING:
    from server.chat.chat import Chat
    from server.chat.screen import Screen
    from server.inference import InferenceClient

HELP = "Talk to a server in the terminal, steered, unsteered or both side by side."

_SCOPES = ("all", "prompt", "response", "generation")
_EXAMPLES = """\
examples:
  expertsteer chat --profile careful
  expertsteer chat --profile careful --strength -0.5 --side
  echo 'What is 7 plus 5?' | expertsteer chat --profile careful
  expertsteer chat --once 'What is 7 plus 5?'

/help inside lists the commands. With --once, or without a terminal as standard input, one question is
answered: the answer goes to standard output, what steered it to standard error.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    add_connection_arguments(parser, INFERENCE_KEY_VARIABLE)
    parser.add_argument("--model", metavar="NAME", help="served model (default: the server's first)")
    parser.add_argument("--profile", metavar="NAME", help="profile that steers, or NAME@sha256:... (default: none)")
    parser.add_argument(
        "--strength", type=_number, metavar="X", help="in place of the profile's default; may be negative"
    )
    parser.add_argument("--scope", choices=_SCOPES, help="tokens to steer, in place of the profile's default")
    parser.add_argument("--side", action="store_true", help="answer unsteered and steered, side by side")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument(
        "--temperature",
        type=_number,
        default=0.0,
        metavar="T",
        help="of sampling (default: 0, so that answers differ by their steering alone)",
    )
    parser.add_argument("--max-tokens", type=_tokens, metavar="N", help="of an answer (default: the server's)")
    parser.add_argument("--once", metavar="TEXT", help="answer one question and end")


def run(args: argparse.Namespace) -> int:
    """Talk, or answer one question, and return the exit status."""
    return guarded("chat", lambda: _run(args), "the answer is not complete")


def _run(args: argparse.Namespace) -> int:
    from server.chat.screen import Screen
    from server.client import SteeringClientError

    question = args.once
    if question is None and not sys.stdin.isatty():
        question = sys.stdin.buffer.read().decode(errors="replace")
    screen = Screen(is_for_one_answer=question is not None)
    try:
        return _talk(args, screen) if question is None else _answer(args, screen, question.strip())
    except SteeringClientError as error:
        screen.error(error)
        return 1


def _talk(args: argparse.Namespace, screen: "Screen") -> int:
    from server.chat.commands import Commands
    from server.chat.loop import talk
    from server.client import SteeringClient
    from server.inference import InferenceClient

    key = api_key(args)
    with (
        InferenceClient(args.server, key, timeout_s=args.timeout) as client,
        SteeringClient(args.server, key, timeout_s=args.timeout) as admin,
    ):
        chat = _chat(args, screen, client)
        screen.line(f"{chat.conversation.model} at {args.server}. /help lists the commands, Ctrl-D ends.", "dim")
        talk(chat, Commands(chat, client, admin))
    return 0


def _answer(args: argparse.Namespace, screen: "Screen", question: str) -> int:
    from server.inference import InferenceClient

    if not question:
        raise UsageError("There is no question: the text is empty.")
    with InferenceClient(args.server, api_key(args), timeout_s=args.timeout) as client:
        _chat(args, screen, client).say(question)
    return 0


def _chat(args: argparse.Namespace, screen: "Screen", client: "InferenceClient") -> "Chat":
    """The chat that the arguments ask for.

    Raises:
        UsageError: they contradict each other.
        SteeringClientError: the server does not have what they name.
    """
    from artifacts.manifest import Scope
    from server.chat.chat import Chat
    from server.chat.conversation import Conversation
    from server.inference import check_profile

    if args.profile is None and (args.strength is not None or args.scope is not None or args.side):
        raise UsageError("--strength, --scope and --side need a --profile.")
    served = client.served(args.model)
    if args.profile is not None:
        check_profile(served, args.profile)
    conversation = Conversation(
        served.model,
        args.profile,
        args.strength,
        None if args.scope is None else Scope(args.scope),
        is_side_by_side=args.side,
        system=args.system,
        temperature=args.temperature,
        max_tokens=args.max_tokens,
    )
    return Chat(conversation, screen, args.server, api_key(args), args.timeout)


def _number(text: str) -> float:
    """Type of an argument."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def _tokens(text: str) -> int:
    """Type of an argument."""
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens above 0")
    return int(text)
