"""Hold command lines against the real parsers: JSON on standard input and output.

In a process of its own, because building vLLM's parser changes logging and registries of a process for good.
"""

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points

from server.cli import GROUP, parser_of


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Every option of a parser and of its actions."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for nested in action.choices.values():
                yield from options(nested)


def problem(parser: argparse.ArgumentParser, arguments: list[str]) -> str | None:
    """Why a parser refuses arguments; None when it takes them."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            parser.parse_args(arguments)
        except SystemExit as error:
            return (said.getvalue().strip() or "refused") if error.code else None
    return None


def main() -> None:
    """Answer {"options": {command: [option]}, "problems": [[command line, why]]} for a list of command lines."""
    parsers = {point.name: parser_of(point.name, point.load()) for point in entry_points(group=GROUP)}
    problems = []
    for name, *arguments in json.load(sys.stdin):
        why = problem(parsers[name], arguments) if name in parsers else "there is no such command"
        if why is not None:
            problems.append((" ".join([name, *arguments]), why))
    answer = {"options": {name: sorted(options(parser)) for name, parser in parsers.items()}, "problems": problems}
    sys.stdout.write(f"\n{json.dumps(answer)}\n")


if __name__ == "__main__":
    main()
