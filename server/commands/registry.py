"""`expertsteer registry list|add|rollback|gc|verify|export`: a registry on this machine, also while servers use it."""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.commands.connection import generation, positive_seconds, print_table, printable, short

if TYPE_CHECKING:
    from server.registry.members import MemberRow
    from server.registry.offline import OfflineChanges
    from server.registry.records import BundleRecord, ProfileVersion, Snapshot
    from server.registry.registry import Registry

HELP = "Look at, change, check or export a registry directory, also while servers run on it."

_KEEP = 8
_PROFILE_NAME = r"[a-z0-9][a-z0-9._-]{0,63}"
_BUNDLE_COLUMNS = ("bundle", "name", "bytes", "layers", "added", "by", "signer", "state")
_PROFILE_COLUMNS = ("profile", "bundle", "strength", "maximum", "scope", "layers", "exclude", "keys")
_SERVER_COLUMNS = ("server", "process", "state", "generation", "problem")
_VERSION_COLUMNS = ("profile", "generation", "change", "bundle", "strength", "by", "at")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the six actions and their options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="print bundles, profiles and their versions")
    add = actions.add_parser("add", help="add a bundle, or everything that an export holds")
    rollback = actions.add_parser("rollback", help="restore an earlier version of a profile")
    gc = actions.add_parser("gc", help="remove bundles that nobody goes back to, and files that crashes left")
    verify = actions.add_parser("verify", help="read every file; exit status 0 when nothing is damaged, 1 otherwise")
    export = actions.add_parser("export", help="write all bundles and the current profiles into a .tar file")
    for action in (listing, add, rollback, gc, verify, export):
        action.add_argument("directory", type=Path, metavar="DIR", help="what --steering-registry names")
    listing.add_argument("--json", action="store_true", help="print JSON instead of text")
    for action in (listing, gc):
        action.add_argument(
            "--keep", type=_positive, default=_KEEP, metavar="N", help="versions of each profile (default: %(default)s)"
        )
    add.add_argument(
        "file", type=Path, metavar="FILE", help="a bundle; or the .tar file of an export, or the folder it unpacks to"
    )
    add.add_argument(
        "--profile",
        type=_profile_name,
        metavar="NAME",
        help="let this profile mean the bundle, as it recommends; who may use the profile stays",
    )
    add.add_argument("--strength", type=float, metavar="S", help="of the profile (default: the recommended one)")
    rollback.add_argument("name", metavar="NAME", help="name of the profile")
    rollback.add_argument(
        "--to", type=generation, metavar="GENERATION", help="version to restore (default: the last different one)"
    )
    for action in (add, rollback):
        action.add_argument(
            "--timeout",
            type=positive_seconds,
            default=30.0,
            metavar="SECONDS",
            help="how long running servers may take to load the bundle (default: %(default)g)",
        )
    gc.add_argument("--dry-run", action="store_true", help="say what would go, remove nothing")
    export.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.tar", help="file to write")


def run(args: argparse.Namespace) -> int:
    """Run the chosen action; 0, or 1 with one sentence on stderr."""
    from artifacts.errors import BundleError
    from server.registry.errors import RegistryError
    from server.registry.offline import SettingsError
    from server.registry.registry import Registry

    actions: dict[str, Callable[[Registry, argparse.Namespace], int]] = {
        **{"list": _list, "add": _add, "rollback": _roll_back, "gc": _gc, "verify": _verify, "export": _export}
    }
    try:
        registry = Registry.open(args.directory, create=args.action == "add")
        try:
            return actions[args.action](registry, args)
        finally:
            registry.close()
    except (BundleError, RegistryError, SettingsError, OSError) as error:
        _say(f"expertsteer registry {args.action}: {printable(' '.join(str(error).split()))}")
        return 1
    except KeyboardInterrupt:
        _say(f"expertsteer registry {args.action}: interrupted; `expertsteer registry list` shows what is there.")
        return 130


def _list(registry: "Registry", args: argparse.Namespace) -> int:
    snapshot, members = registry.snapshot(args.keep), registry.members.list()
    if args.json:
        print(json.dumps(_as_json(snapshot, members), indent=2))
        return 0
    print(f"Generation {snapshot.generation}\n\nBundles")
    print_table(_BUNDLE_COLUMNS, [_bundle_row(record) for record in snapshot.bundles.values()])
    print("\nProfiles")
    print_table(_PROFILE_COLUMNS, [_profile_row(versions[0]) for versions in snapshot.profiles.values()])
    print("\nVersions")
    print_table(_VERSION_COLUMNS, [_version_row(each) for versions in snapshot.profiles.values() for each in versions])
    print("\nServers")
    print_table(
        _SERVER_COLUMNS,
        [(row.instance, str(row.pid), row.state, str(row.observed), row.problem or "-") for row in members],
    )
    return 0


def _add(registry: "Registry", args: argparse.Namespace) -> int:
    from server.registry.offline import SettingsError

    changes = _changes(registry, args)
    is_export = args.file.is_dir() or args.file.suffix == ".tar"
    if args.strength is not None and args.profile is None:
        raise SettingsError("--strength is of a profile; name it with --profile.")
    if is_export:
        if args.profile is not None:
            raise SettingsError("--profile is for a single bundle; an export names its profiles.")
        added, versions = changes.restore(args.file)
    elif args.profile is None:
        added, versions = [changes.add(args.file)], []
    else:
        record, is_new, version = changes.point(args.profile, args.file, args.strength)
        added, versions = [(record, is_new)], [version]
    for record, is_new in added:
        print(f"{record.digest} {'added' if is_new else 'was there already'}: {printable(record.manifest.name)}")
    _print_profiles(versions)
    return 0


def _roll_back(registry: "Registry", args: argparse.Namespace) -> int:
    _print_profiles([_changes(registry, args).roll_back(args.name, args.to)])
    return 0


def _gc(registry: "Registry", args: argparse.Namespace) -> int:
    from server.registry.offline import OfflineChanges

    if args.dry_run:
        removed = registry.gc(keep_history=args.keep, dry_run=True)
    else:
        removed = OfflineChanges(registry, 0.0, _say).gc(args.keep)
    for digest in removed:
        print(f"{digest} {'would be removed' if args.dry_run else 'removed'}")
    if not removed:
        print("No bundle is left over.")
    return 0


def _verify(registry: "Registry", _args: argparse.Namespace) -> int:
    problems = registry.verify()
    for what, problem in problems:
        print(f"{what}: {printable(problem)}")
    if not problems:
        print(f"Everything is in order at generation {registry.generation()}.")
    return 1 if problems else 0


def _export(registry: "Registry", args: argparse.Namespace) -> int:
    registry.export(args.output)
    print(f"{args.output}: generation {registry.generation()}, {args.output.stat().st_size} bytes")
    return 0


def _changes(registry: "Registry", args: argparse.Namespace) -> "OfflineChanges":
    from server.registry.offline import OfflineChanges

    return OfflineChanges(registry, args.timeout, _say)


def _print_profiles(versions: "list[ProfileVersion]") -> None:
    if versions:
        print_table(_VERSION_COLUMNS, [_version_row(version) for version in versions])


def _as_json(snapshot: "Snapshot", members: "list[MemberRow]") -> dict[str, Any]:
    return {
        "generation": snapshot.generation,
        "bundles": [
            {
                "digest": record.digest,
                "num_bytes": record.num_bytes,
                "name": record.manifest.name,
                "added_at": record.added_at.isoformat(),
                "added_by": record.added_by,
                "source": record.source,
                "signer": record.signer,
                "is_draining": record.is_draining,
            }
            for record in snapshot.bundles.values()
        ],
        "profiles": {
            name: [_version_as_json(version) for version in versions] for name, versions in snapshot.profiles.items()
        },
        "servers": [
            {
                "instance": row.instance,
                "pid": row.pid,
                "state": row.state,
                "generation_observed": row.observed,
                "problem": row.problem,
            }
            for row in members
        ],
    }


def _version_as_json(version: "ProfileVersion") -> dict[str, Any]:
    from dataclasses import asdict

    fields = asdict(version)
    return {**{name: value for name, value in fields.items() if name != "name"}, "at": version.at.isoformat()}


def _bundle_row(record: "BundleRecord") -> tuple[str, ...]:
    layers = sorted({step.layer for step in record.manifest.interventions})
    return (
        short(record.digest),
        record.manifest.name,
        str(record.num_bytes),
        ", ".join(map(str, layers)),
        f"{record.added_at:%Y-%m-%d %H:%M:%S}",
        record.added_by,
        record.signer or "-",
        "draining" if record.is_draining else "present",
    )


def _profile_row(version: "ProfileVersion") -> tuple[str, ...]:
    settings = version.settings
    assert settings is not None
    return (
        version.name,
        short(settings.bundle),
        f"{settings.strength:g}",
        f"{settings.maximum_strength:g}",
        settings.scope.value,
        "all" if settings.layers is None else ", ".join(map(str, settings.layers)),
        ", ".join(settings.exclude) or "-",
        "all" if settings.allowed_keys is None else ", ".join(settings.allowed_keys) or "none",
    )


def _version_row(version: "ProfileVersion") -> tuple[str, ...]:
    settings = version.settings
    restored = "" if version.restored_from is None else f" to {version.restored_from}"
    return (
        version.name,
        str(version.generation),
        version.action + restored,
        "-" if settings is None else short(settings.bundle),
        "-" if settings is None else f"{settings.strength:g}",
        version.actor,
        f"{version.at:%Y-%m-%d %H:%M:%S}",
    )


def _profile_name(text: str) -> str:
    if not re.fullmatch(_PROFILE_NAME, text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a profile: a-z, 0-9, '.', '_', '-', 64 at most")
    return text


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 10**6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to a million")
    return int(text)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
