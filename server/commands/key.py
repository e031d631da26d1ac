"""`expertsteer key new|list`: make API keys and keep their hashes in the file that `serve --steering-keys` reads."""

import argparse
import secrets
import sys
from pathlib import Path

HELP = "Make API keys for the server, and list them."

_ROLES = ("inference", "read", "write")
_RANDOM_BYTES = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommands and their flags."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    new = actions.add_parser("new", help="make a key; it is shown once and only its hash is kept")
    new.add_argument("--name", required=True, help="name of the key in logs and in the audit log")
    new.add_argument(
        "--role",
        required=True,
        choices=_ROLES,
        help="inference: requests to the model; read: what is served and how it is; write: everything",
    )
    new.add_argument(
        "--profiles",
        type=lambda text: tuple(part for part in text.split(",") if part),
        metavar="PATTERN,...",
        help="profiles that an inference key may ask for, with the wildcards of a shell (default: all)",
    )
    new.add_argument(
        "--maximum-strength",
        type=float,
        metavar="S",
        help="bound of the absolute strength that an inference key may ask for (default: that of the profile)",
    )
    new.add_argument(
        "--not-after",
        metavar="TIME",
        help="ISO date or time, in UTC unless it says otherwise, after which it is refused",
    )
    new.add_argument("--file", type=Path, metavar="KEYS.yaml", help="add the hash to this file (default: print it)")
    listing = actions.add_parser("list", help="show the keys of a file")
    listing.add_argument("--file", type=Path, metavar="KEYS.yaml", required=True, help="the file")


def run(args: argparse.Namespace) -> int:
    """Do it; 0 when it is done, 1 with one line on stderr otherwise."""
    try:
        return _new(args) if args.action == "new" else _list(args.file)
    except ValueError as error:
        print(f"expertsteer key: {error}", file=sys.stderr)
        return 1


def _new(args: argparse.Namespace) -> int:
    from server.auth.identity import hash_key
    from server.auth.key_file import append_entry, make_entry

    key = f"es-{secrets.token_urlsafe(_RANDOM_BYTES)}"
    entry = make_entry(
        {
            "name": args.name,
            "sha256": hash_key(key).hex(),
            "role": args.role,
            "profiles": args.profiles,
            "maximum_strength": args.maximum_strength,
            "not_after": args.not_after,
        }
    )
    if args.file is None:
        print(key)
        print(f"\nIn the keys file of the server, under keys:\n{entry.to_yaml()}", end="", file=sys.stderr)
        return 0
    append_entry(args.file, entry)
    print(key)
    return 0


def _list(path: Path) -> int:
    from datetime import UTC, datetime

    from rich.console import Console
    from rich.table import Table

    from server.auth.key_file import read_entries

    table = Table("name", "role", "profiles", "maximum strength", "not after", "sha256")
    now = datetime.now(UTC)
    for entry in read_entries(path):
        key = entry.to_key()
        identity = key.identity
        until = "" if key.not_after is None else key.not_after.isoformat(timespec="seconds")
        table.add_row(
            identity.name,
            identity.role,
            "all" if identity.profiles is None else ", ".join(identity.profiles) or "none",
            "" if identity.maximum_strength is None else f"{identity.maximum_strength:g}",
            until if key.is_valid(now) else f"{until} (expired)",
            key.sha256.hex()[:12],
        )
    Console().print(table)
    return 0
