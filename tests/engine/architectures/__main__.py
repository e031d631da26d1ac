"""Compare architectures: `python tests/engine/architectures [NAME ...]` prints a table of them.

With --serve it answers lines `{"family", "fusion", "eager"}` of the standard input with lines of JSON: a `Comparison`,
or the error of an engine that failed and whether it failed at its start.
"""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

import table
import torch
from comparison import compare
from engine_process import EngineError, EngineProcess
from families import FAMILIES


def _write(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _answer(engines: EngineProcess, question: dict[str, Any]) -> dict[str, Any]:
    try:
        return asdict(compare(engines, FAMILIES[question["family"]], question["fusion"], question["eager"]))
    except EngineError as error:
        return {"error": str(error), "at_start": error.at_start}


def _print_table(engines: EngineProcess, names: list[str]) -> None:
    _write(table.header())
    for name in names:
        refusal = FAMILIES[name].refusal
        try:
            _write(table.line(name, compare(engines, FAMILIES[name], "always", eager=refusal is None)))
        except EngineError as error:
            if refusal is None or refusal not in str(error) or not error.at_start:
                raise
            _write(table.refused_line(name))


def main() -> None:
    parser = argparse.ArgumentParser(description="Steered vLLM against Transformers with hooks, by architecture.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(FAMILIES)}; all when none is given")
    parser.add_argument("--serve", action="store_true", help="answer questions on the standard input")
    arguments = parser.parse_args()
    # Models this small are slower on several cores, and the engine wants them.
    torch.set_num_threads(1)
    with EngineProcess() as engines:
        if not arguments.serve:
            _print_table(engines, arguments.names or list(FAMILIES))
            return
        for line in sys.stdin:
            _write(json.dumps(_answer(engines, json.loads(line))))


if __name__ == "__main__":
    main()
