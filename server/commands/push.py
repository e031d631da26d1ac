"""`expertsteer push FILE --profile NAME --server URL`: put a bundle into a running server."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.commands.connection import (
    UsageError,
    add_connection_arguments,
    connect,
    generation,
    guarded,
    print_profiles,
    print_table,
    printable,
    short,
)

if TYPE_CHECKING:
    from server.admin_schema import BundleAnswer, ProfileSpec
    from server.client import SteeringClient

HELP = "Put a bundle into a running server and serve it as a profile."
_MAX_SIGNATURE_BYTES = 64 * 1024
_MAX_SHOWN = 20
# A digest that fits the form: what the arguments say is checked before the file goes on its way.
_ANY_DIGEST = f"sha256:{'0' * 64}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("file", type=Path, metavar="FILE", help="the bundle, a .safetensors file")
    parser.add_argument("--profile", metavar="NAME", help="serve it under this name (default: the bundle's own)")
    add_connection_arguments(parser)
    profile = parser.add_argument_group("profile", "What is left out, the bundle recommends.")
    profile.add_argument("--strength", type=float, metavar="S", help="strength of requests that name none")
    profile.add_argument("--maximum-strength", type=float, metavar="S", help="bound of |strength| in a request")
    profile.add_argument("--scope", metavar="SCOPE", help="all, prompt, response or generation")
    profile.add_argument("--layers", type=_layers, metavar="N[,N]", help="use the interventions of these layers only")
    profile.add_argument(
        "--exclude",
        type=_names,
        metavar="SPAN[,SPAN]",
        help="spans to leave unsteered: tool_calls, structured_output, reasoning, or none",
    )
    profile.add_argument("--allowed-keys", type=_names, metavar="NAME[,NAME]", help="keys that may use the profile")
    profile.add_argument("--description", metavar="TEXT", help="one line for people")
    parser.add_argument(
        "--if-match", type=generation, metavar="GENERATION", help="only while the profile is of this generation"
    )
    parser.add_argument("--signature", type=Path, metavar="FILE.sig", help="signature of FILE by model-signing")
    parser.add_argument("--dry-run", action="store_true", help="let the server check everything and change nothing")
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")


def run(args: argparse.Namespace) -> int:
    """Upload the bundle, point the profile at it and show what is served."""

    def work() -> int:
        spec, signature = _spec(args), _signature(args.signature)
        with connect(args) as client:
            bundle = _upload(client, args, signature)
            return _serve(client, args, bundle, spec.model_copy(update={"bundle": bundle.digest}))

    return guarded("push", work)


def _serve(client: "SteeringClient", args: argparse.Namespace, bundle: "BundleAnswer", spec: "ProfileSpec") -> int:
    from server.client import SteeringClientError

    name = args.profile or bundle.name
    state = "was there already" if not bundle.created else "would be added" if args.dry_run else "is added"
    print(f"{bundle.digest} {state}, {bundle.num_bytes} bytes")
    if args.dry_run:
        print_table(("check", "found"), [(check.check, check.found) for check in bundle.checks])
        if bundle.created:
            print("The profile is checked when the bundle is there.")
            return 0
    try:
        answer = client.put_profile(name, spec, if_match=args.if_match, dry_run=args.dry_run)
    except SteeringClientError as error:
        done = "Nothing was changed" if args.dry_run else "The bundle is there and the profile was not changed"
        raise SteeringClientError(error.status, error.code, f"{error} {done}.") from error
    if args.dry_run:
        print(f"Profile {printable(name)} would be:" if answer.changed else f"Profile {printable(name)} would stay:")
        print_profiles([answer], name)
        return 0
    before = None if answer.previous is None else answer.previous.settings
    came = f", before {short(before.bundle)} at strength {before.strength:g}" if before and answer.changed else ""
    print(f"Profile {printable(name)} is {'served' if answer.changed else 'unchanged'}{came}.")
    if not answer.observed:
        print("Some processes of the server still admit requests with the version before.", file=sys.stderr)
    profiles = client.profiles()
    shown = profiles if len(profiles) <= _MAX_SHOWN else [profile for profile in profiles if profile.name == name]
    print_profiles(shown, name)
    if len(shown) < len(profiles):
        print(f"and {len(profiles) - len(shown)} more, see `expertsteer profile list`")
    return 0


def _upload(client: "SteeringClient", args: argparse.Namespace, signature: bytes | None) -> "BundleAnswer":
    from tqdm import tqdm

    # Without a terminal there is nobody to watch.
    disable = True if args.quiet else None
    with tqdm(
        desc=args.file.name, total=args.file.stat().st_size, unit="B", unit_scale=True, leave=False, disable=disable
    ) as bar:

        def show(sent: int, total: int) -> None:
            bar.total = total
            bar.update(sent - bar.n)

        return client.upload(args.file, dry_run=args.dry_run, signature=signature, on_progress=show)


def _spec(args: argparse.Namespace) -> "ProfileSpec":
    """The profile that the arguments describe, checked before the file is sent."""
    from pydantic import ValidationError

    from server.admin_schema import ProfileSpec

    fields: dict[str, Any] = {
        "strength": args.strength,
        "maximum_strength": args.maximum_strength,
        "scope": args.scope,
        "layers": args.layers,
        "exclude": args.exclude,
        "allowed_keys": args.allowed_keys,
        "description": args.description,
    }
    try:
        return ProfileSpec(bundle=_ANY_DIGEST, **fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = f"--{str(first['loc'][0]).replace('_', '-')}: " if first["loc"] else ""
        raise UsageError(f"{option}{first['msg']}.") from None


def _signature(path: Path | None) -> bytes | None:
    if path is None:
        return None
    with path.open("rb") as file:
        signature = file.read(_MAX_SIGNATURE_BYTES + 1)
    if len(signature) > _MAX_SIGNATURE_BYTES:
        raise UsageError(f"{path} has more than {_MAX_SIGNATURE_BYTES} bytes, so it is no signature.")
    return signature


def _layers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers like 12,14")
    return tuple(map(int, parts))


def _names(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(part.strip() for part in text.split(","))
