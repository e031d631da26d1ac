"""vLLM's benchmark client, `vllm bench serve`, as a process that runs one benchmark after another.

    python -m server.engine.bench_client

Each line of standard input is a JSON list, the arguments of one `vllm bench serve`; each is answered by one line on
standard output, a JSON object: vLLM's result with every request's times, or `error`. What vLLM prints goes to standard
error. One process for all of them, because the imports take longer than a short benchmark.
"""

import json
import os
import sys
from typing import Any

READY = {"ready": True}


def main() -> int:
    """Answer until standard input ends."""
    # vLLM prints its own tables, which must not come between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm bench serve", exit_on_error=False)
    add_cli_args(parser)
    _send(answers, READY)
    for line in sys.stdin:
        _send(answers, _run(parser, json.loads(line)))
    return 0


def _run(parser: Any, arguments: list[str]) -> dict[str, Any]:
    from vllm.benchmarks.serve import main as bench_serve

    try:
        result: dict[str, Any] = bench_serve(parser.parse_args(arguments))
    except SystemExit as error:
        return {"error": f"vllm bench serve ended with status {error.code}"}
    # Whatever went wrong in vLLM's client is the answer to this benchmark, and the next one may go well.
    except Exception as error:  # noqa: BLE001
        return {"error": f"{type(error).__name__}: {error}"}
    # What was said is not measured, and would be most of the line.
    return {key: value for key, value in result.items() if key != "generated_texts"}


def _send(answers: Any, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    sys.exit(main())
