"""Whether a server withstands administrators, senders and clients who behave badly, at length.

    python tests/bench/soak.py [--parts race,damage,cycle,abort] [--server URL] [--json FILE]

race    --threads x --calls changes of one name at once: no crash, no 5xx, the history is what was acknowledged
damage  --files damaged bundles while requests run: all refused with a reason, the state unchanged
cycle   --cycles times a new bundle is added, used and removed: memory grows by at most 50 MiB, all rows come back
abort   --streams streams are left after their first words: all slots, rows and references come back

The exit status is 0 when nothing was found. Without --server one is started, from the repository's lab model.
"""

import argparse
import json
import secrets
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import churn
import httpx
from damaged import upload_damaged
from race import race
from random_bundle import random_bundle
from rich.console import Console
from rich.table import Table
from served import Served, ServerError, add_server_arguments
from shapes import LAB_MODEL
from traffic import Address

from server.client import SteeringClientError

PARTS = ("race", "damage", "cycle", "abort")
FLAGS = ("--max-model-len", "512", "--enforce-eager", "--max-num-seqs", "64", "--steering-write-rate", "100000")
MAX_GROWTH_MIB = 50.0
_CAREFUL = LAB_MODEL.parents[1] / "careful.safetensors"


def main() -> int:
    """Run and print; see the module's docstring."""
    args = _parse()
    try:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="expertsteer-soak-")))
            server = Address(args.server, args.key)
            if not args.server:
                key = secrets.token_urlsafe(24)
                flags = [*FLAGS, "--steering-registry", str(folder / "registry")]
                server = Address(stack.enter_context(Served(LAB_MODEL, flags, key, folder / "server.log")).url, key)
            report = {part: _run(part, server, folder, args) for part in args.parts}
    except (ServerError, SteeringClientError, httpx.HTTPError) as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1
    _print(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if any(each["problems"] for each in report.values()) else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Treats a server badly, at length, and looks at what is left.")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help="default: all of them")
    parser.add_argument("--threads", type=int, default=32, help="administrators of the race (default: 32)")
    parser.add_argument("--calls", type=int, default=200, help="of each of them (default: 200)")
    parser.add_argument("--files", type=int, default=10_000, help="damaged bundles (default: 10000)")
    parser.add_argument("--cycles", type=int, default=2000, help="bundles that come and go (default: 2000)")
    parser.add_argument("--warm-up", type=int, default=200, help="cycles before memory is measured (default: 200)")
    parser.add_argument("--streams", type=int, default=1000, help="streams that are left (default: 1000)")
    add_server_arguments(parser)
    args = parser.parse_args()
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"--parts has {unknown[0]!r}; known: {', '.join(PARTS)}")
    for name in ("threads", "calls", "files", "cycles", "streams"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, the least is 1")
    return args


def _run(part: str, server: Address, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    one, other = (random_bundle(folder / f"soak-{seed}.safetensors", [0, 2, 4], seed) for seed in (1, 2))
    match part:
        case "race":
            return asdict(race(server, [one, other], args.threads, args.calls))
        case "damage":
            try:
                halves = [
                    upload_damaged(server, one, other, (args.files + 1) // 2),
                    upload_damaged(server, one, _CAREFUL, args.files // 2, 1),
                ]
            except AssertionError as error:
                return {"problems": [str(error)]}
            return {
                "files": sum(half.files for half in halves),
                "statuses": dict(Counter(halves[0].statuses) + Counter(halves[1].statuses)),
                "answers": sum(half.answers for half in halves),
                "problems": halves[0].problems + halves[1].problems,
            }
        case "cycle":
            figures = churn.cycle(server, one, folder, args.cycles, args.warm_up)
            if figures.growth_mib > MAX_GROWTH_MIB:
                figures.problems.append(f"memory grew by {figures.growth_mib:.1f} MiB; at most {MAX_GROWTH_MIB:g}")
        case _:
            figures = churn.abort(server, one, args.streams)
    if figures.left != churn.NOTHING:
        figures.problems.append(f"left behind: {figures.left}")
    return asdict(figures)


def _print(report: dict[str, dict[str, Any]]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140)
    for part, figures in report.items():
        table = Table(title=part, show_header=False)
        for name, value in figures.items():
            if name != "problems":
                table.add_row(name, _text(value))
        table.add_row("problems", str(len(figures["problems"])))
        console.print(table)
        for problem in figures["problems"][:10]:
            console.print(problem, markup=False)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_text(each)}" for name, each in sorted(value.items()))
    if isinstance(value, list | tuple):
        return " -> ".join(map(_text, value))
    return f"{value:.1f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
