"""`expertsteer profile list|show|rollback|delete|check`: the profiles of a running server, or of a declaration."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from server.commands.connection import (
    UsageError,
    add_connection_arguments,
    connect,
    generation,
    guarded,
    positive_seconds,
    print_profiles,
    print_table,
    printable,
    short,
)

if TYPE_CHECKING:
    from server.admin_schema import ProfileDetail, VersionInfo
    from server.client import SteeringClient
    from server.declaration import DeclaredProfile

HELP = "List, show, roll back or delete the profiles of a running server; check a file that declares some."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the five actions and their options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="print all profiles")
    show = actions.add_parser("show", help="print a profile and its history")
    rollback = actions.add_parser("rollback", help="restore an earlier version of a profile")
    delete = actions.add_parser("delete", help="delete a profile; requests that run go on")
    check = actions.add_parser("check", help="check a file for --steering-declaration; needs no server")
    check.add_argument("file", type=Path, metavar="FILE", help="the file")
    for action in (show, rollback, delete):
        action.add_argument("name", metavar="NAME", help="name of the profile")
    for action in (listing, show, rollback, delete):
        add_connection_arguments(action)
    for action in (listing, show):
        action.add_argument("--json", action="store_true", help="print JSON instead of text")
    rollback.add_argument(
        "--to", type=generation, metavar="GENERATION", help="version to restore (default: the last different one)"
    )
    for action in (rollback, delete):
        action.add_argument(
            "--if-match", type=generation, metavar="GENERATION", help="only while the profile is of this generation"
        )
    delete.add_argument(
        "--drain", type=positive_seconds, metavar="SECONDS", help="wait as long for the requests that use it"
    )


def run(args: argparse.Namespace) -> int:
    """Run the chosen action and return the exit status."""
    if args.action == "check":
        return guarded("profile check", lambda: _check(args.file))
    action = {"list": _list, "show": _show, "rollback": _roll_back, "delete": _delete}[args.action]

    def work() -> int:
        with connect(args) as client:
            action(client, args)
        return 0

    return guarded(f"profile {args.action}", work)


def _check(file: Path) -> int:
    from server.declaration import read

    try:
        declared = read(file)
    except ValueError as error:
        raise UsageError(str(error)) from None
    columns = ("profile", "bundle", "strength", "scope", "source")
    print_table(columns, [_declared_row(*item) for item in declared.declaration.profiles.items()])
    return 0


def _declared_row(name: str, profile: "DeclaredProfile") -> tuple[str, ...]:
    return (
        name,
        short(profile.bundle),
        "recommended" if profile.strength is None else f"{profile.strength:g}",
        "recommended" if profile.scope is None else profile.scope.value,
        profile.source or "registry",
    )


def _list(client: "SteeringClient", args: argparse.Namespace) -> None:
    from server.admin_schema import ProfileList

    profiles = client.profiles()
    if args.json:
        print(ProfileList(profiles=profiles).model_dump_json(indent=2))
    else:
        print_profiles(profiles)


def _show(client: "SteeringClient", args: argparse.Namespace) -> None:
    profile = client.profile(args.name)
    if args.json:
        print(profile.model_dump_json(indent=2))
        return
    for label, value in _facts(profile):
        print(f"{label:<13}{printable(value)}")
    print()
    columns = ("generation", "change", "bundle", "strength", "by", "at")
    print_table(columns, [_history_row(version) for version in profile.history], str(profile.generation))
    if profile.next is not None:
        print("Older changes are not shown.")


def _roll_back(client: "SteeringClient", args: argparse.Namespace) -> None:
    answer = client.rollback(args.name, to=args.to, if_match=args.if_match)
    print(f"Profile {printable(answer.name)} is {'restored' if answer.changed else 'unchanged'}.")
    if not answer.observed:
        print("Some processes of the server still admit requests with the version before.", file=sys.stderr)
    print_profiles([answer])


def _delete(client: "SteeringClient", args: argparse.Namespace) -> None:
    client.delete_profile(args.name, drain=args.drain is not None, timeout_s=args.drain or 0, if_match=args.if_match)
    print(f"Profile {printable(args.name)} is deleted.")


def _facts(profile: "ProfileDetail") -> list[tuple[str, str]]:
    keys = "all" if profile.allowed_keys is None else ", ".join(profile.allowed_keys)
    return [
        ("profile", profile.name),
        ("description", profile.description or "-"),
        ("bundle", profile.bundle),
        ("strength", f"{profile.strength:g}, {profile.maximum_strength:g} at most"),
        ("scope", profile.scope.value),
        ("layers", ", ".join(map(str, profile.layers))),
        ("exclude", ", ".join(profile.exclude) or "-"),
        ("keys", keys),
        ("generation", str(profile.generation)),
        ("changed", f"{profile.changed_at:%Y-%m-%d %H:%M:%S} UTC by {profile.changed_by or '-'}"),
    ]


def _history_row(version: "VersionInfo") -> tuple[str, ...]:
    settings = version.settings
    restored = "" if version.restored_from is None else f" to {version.restored_from}"
    return (
        str(version.generation),
        version.action + restored,
        "-" if settings is None else short(settings.bundle),
        "-" if settings is None else f"{settings.strength:g}",
        version.actor,
        f"{version.at:%Y-%m-%d %H:%M:%S}",
    )
