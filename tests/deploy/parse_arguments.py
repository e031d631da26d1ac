"""Parse arguments of `expertsteer` as the program does; a process of its own, because vLLM's import warns.

Reads a JSON list of argument lists, and writes for each the parsed flags or, where they are refused, what was said.
"""

import argparse
import contextlib
import io
import json
import sys
from typing import Any

from server import app
from server.commands import demo


def of_serve(arguments: list[str]) -> list[str]:
    """Arguments of `expertsteer serve`, behind the command; those that the demo makes of its own for a demo."""
    command, *rest = arguments
    if command == "serve":
        return rest
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return demo.serve_arguments(parser.parse_args(rest))


def parse(parser: argparse.ArgumentParser, arguments: list[str]) -> dict[str, Any]:
    """The flags, by name."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return vars(parser.parse_args(of_serve(arguments)))
    except SystemExit:
        return {"refused": said.getvalue().strip().splitlines()[-1]}


if __name__ == "__main__":
    parser = app.make_parser("expertsteer serve")
    json.dump([parse(parser, arguments) for arguments in json.load(sys.stdin)], sys.stdout, default=str)
