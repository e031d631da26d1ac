"""Command line entry point: `expertsteer COMMAND ...`.

Subcommands are modules registered under the entry-point group `expertsteer.commands`. Each has `HELP`,
`add_arguments(parser)` (or `make_parser(prog)`) and `run(args) -> int`. Only the module of the command that was asked
for is imported, so that `expertsteer bundle inspect` does not wait for vLLM.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points, version
from types import ModuleType

GROUP = "expertsteer.commands"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status.

    Args:
        argv: arguments without the program name; `sys.argv[1:]` when None.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {point.name: point for point in entry_points(group=GROUP)}
    if arguments and arguments[0] in commands:
        module: ModuleType = commands[arguments[0]].load()
        return int(module.run(parser_of(arguments[0], module).parse_args(arguments[1:])))
    return _overview({name: point.load().HELP for name, point in sorted(commands.items())}, arguments)


def parser_of(name: str, module: ModuleType) -> argparse.ArgumentParser:
    """Parser of a subcommand.

    Args:
        name: of the command.
        module: of it.
    """
    prog = f"expertsteer {name}"
    if hasattr(module, "make_parser"):
        made: argparse.ArgumentParser = module.make_parser(prog)
        return made
    parser = argparse.ArgumentParser(prog=prog, description=module.HELP)
    module.add_arguments(parser)
    return parser


def _overview(commands: dict[str, str], arguments: list[str]) -> int:
    """Handle everything that names no command: `--help`, `--version`, nothing, or a mistake."""
    parser = argparse.ArgumentParser(
        prog="expertsteer", description="Per-request activation steering for any decoder LLM on unmodified vLLM."
    )
    parser.add_argument("--version", action="version", version=f"expertsteer {version('expertsteer')}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, text in commands.items():
        subparsers.add_parser(name, help=text)
    parser.parse_args(arguments)
    return 2


if __name__ == "__main__":
    sys.exit(main())
