"""What the commands that talk to a running server have in common: address, key, refusals and tables."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from server.admin_schema import ProfileInfo
    from server.client import SteeringClient

KEY_VARIABLE = "EXPERTSTEER_ADMIN_KEY"
INFERENCE_KEY_VARIABLE = "EXPERTSTEER_API_KEY"
_MAX_KEY_BYTES = 4096
_DIGEST_CHARS = len("sha256:") + 12
_PROFILE_COLUMNS = ("profile", "bundle", "strength", "maximum", "scope", "layers", "exclude", "generation")


class UsageError(Exception):
    """Something in the arguments that only shows when they are used. `str(error)` is one sentence."""


def add_connection_arguments(parser: argparse.ArgumentParser, key_variable: str = KEY_VARIABLE) -> None:
    """Declare where the server is and what opens it.

    Args:
        parser: of the command.
        key_variable: environment variable that holds the key unless the user names another.
    """
    parser.add_argument(
        "--server", default="http://127.0.0.1:8000", metavar="URL", help="the server (default: %(default)s)"
    )
    keys = parser.add_mutually_exclusive_group()
    keys.add_argument(
        "--key-env",
        default=key_variable,
        metavar="NAME",
        help="environment variable that holds the API key (default: %(default)s)",
    )
    keys.add_argument("--key-file", type=Path, metavar="FILE", help="file that holds the API key and nothing else")
    parser.add_argument(
        "--timeout",
        type=positive_seconds,
        default=60.0,
        metavar="SECONDS",
        help="how long an answer may take (default: %(default)g)",
    )


def connect(args: argparse.Namespace) -> "SteeringClient":
    """A client as the arguments say.

    Raises:
        UsageError: the file holds no key.
        OSError: the file cannot be read.
        SteeringClientError: the address or the key cannot be one.
    """
    from server.client import SteeringClient

    return SteeringClient(args.server, api_key(args), timeout_s=args.timeout)


def guarded(
    command: str, work: Callable[[], int], interrupted: str = "`expertsteer profile list` shows what is served"
) -> int:
    """The exit status of some work; a refusal is one line on stderr and 1.

    Args:
        command: that does it.
        work: what to do.
        interrupted: what to say after Ctrl-C.
    """
    from server.client import SteeringClientError

    try:
        return work()
    except (SteeringClientError, UsageError, OSError) as error:
        print(f"expertsteer {command}: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"expertsteer {command}: interrupted; {interrupted}.", file=sys.stderr)
        return 130


def print_profiles(profiles: Iterable["ProfileInfo"], marked: str | None = None) -> None:
    """Print a table of profiles, one of them in bold."""
    rows = [_profile_row(profile) for profile in profiles]
    print_table(_PROFILE_COLUMNS, rows, marked)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], marked: str | None = None) -> None:
    """Print a table; the row whose first cell is `marked` in bold. No cell can format or drive the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=SIMPLE_HEAD, show_edge=False)
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row), style="bold" if row[0] == marked else "")
    Console(highlight=False).print(table)


def short(digest: str) -> str:
    """A digest as far as people compare it; servers take it so."""
    return digest[:_DIGEST_CHARS]


def printable(text: str) -> str:
    """`text` with control and direction-changing characters escaped, so that it cannot drive the terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def positive_seconds(text: str) -> float:
    """Type of an argument."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0, a day at most")
    return value


def generation(text: str) -> int:
    """Type of an argument."""
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise argparse.ArgumentTypeError(f"{text!r} is no generation; `expertsteer profile show NAME` lists them")
    return int(text)


def api_key(args: argparse.Namespace) -> str | None:
    """The API key that the arguments name; None without one.

    Raises:
        UsageError: the file holds no key.
        OSError: the file cannot be read.
    """
    if args.key_file is None:
        return os.environ.get(args.key_env) or None
    with args.key_file.open("rb") as file:
        data: bytes = file.read(_MAX_KEY_BYTES + 1)
    lines = data.decode("ascii", errors="replace").split()
    if len(data) > _MAX_KEY_BYTES or len(lines) != 1:
        raise UsageError(f"{args.key_file} holds {len(lines)} words; a key file holds one key and nothing else.")
    return lines[0]


def _profile_row(profile: "ProfileInfo") -> tuple[str, ...]:
    return (
        profile.name,
        short(profile.bundle),
        f"{profile.strength:g}",
        f"{profile.maximum_strength:g}",
        profile.scope.value,
        ", ".join(map(str, profile.layers)),
        ", ".join(profile.exclude) or "-",
        str(profile.generation),
    )
