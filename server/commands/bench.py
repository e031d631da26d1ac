"""`expertsteer bench`: steered against unsteered requests on a running server, with vLLM's own client."""

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from server.commands.connection import INFERENCE_KEY_VARIABLE, add_connection_arguments, api_key, guarded, printable

if TYPE_CHECKING:
    from server.bench.plan import Plan
    from server.bench.run import Outcome, Watcher
    from server.inference import InferenceClient

HELP = "Measure what steering costs on a running server, with vLLM's own benchmark client."

_READING = """\
how to read it:
  Every round sends the same prompts with the same arrivals to <model> and to <model>@<profile>, in
  alternating order, through `vllm bench serve`; every request generates exactly --output-len tokens.
  The ratio is steered / unsteered, paired by request, with a bootstrap 95 % interval. An interval
  that holds 1 shows no difference; 1.02 [1.01, 1.03] of TPOT is 2 % slower. For throughput more is
  better, for times less. More rounds and more requests make intervals narrower.
  At a rate that the server keeps up with, look at TTFT and TPOT; with `--rates inf` all requests are
  sent at once, so look at tokens/s. A p99 needs some hundreds of requests to mean anything.
  The strength is the profile's default: its cost does not depend on it, unless it is 0.

files in the folder of -o:
  bench.md, bench.svg and bench.png (table and plot), bench.json (all figures), turns.jsonl (the
  times of every request) and client.log (what vLLM's client printed). Ctrl-C leaves complete rounds.

example:
  expertsteer bench --server http://127.0.0.1:8000 --profile careful --rates 2 8 inf -o results
"""
_MAX_PROMPTS, _MAX_TOKENS, _MAX_ROUNDS, _MAX_RATE = 100_000, 1_000_000, 1000, 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _READING
    add_connection_arguments(parser, INFERENCE_KEY_VARIABLE)
    parser.add_argument("--model", metavar="NAME", help="served model (default: the server's first)")
    parser.add_argument(
        "--profile",
        action="append",
        default=[],
        metavar="NAME",
        help="profile to measure, or NAME@sha256:...; may be repeated (default: the server's first)",
    )
    parser.add_argument(
        "--rates",
        nargs="+",
        type=_rate,
        default=[2.0, math.inf],
        metavar="RATE",
        help="requests a second, in Poisson arrivals; inf sends all at once (default: 2 inf)",
    )
    for flag, default, maximum, text in (
        ("--num-prompts", 64, _MAX_PROMPTS, "requests of a round"),
        ("--input-len", 256, _MAX_TOKENS, "prompt tokens of a request"),
        ("--output-len", 64, _MAX_TOKENS, "generated tokens of a request"),
        ("--rounds", 4, _MAX_ROUNDS, "rounds at each rate; an even number cancels drift"),
    ):
        parser.add_argument(
            flag, type=_Count(maximum), default=default, metavar="N", help=f"{text} (default: %(default)s)"
        )
    parser.add_argument(
        "--seed", type=_Count(2**31, 0), default=0, metavar="N", help="of prompts and arrivals (default: %(default)s)"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="folder or id of the tokenizer that makes the prompts (default: that of the server's model)",
    )
    parser.add_argument(
        "--no-counters",
        action="store_true",
        help="do not hold /metrics against the requests sent; for several servers behind one address",
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="folder for the results (default: bench-DATE-TIME)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print the table and return the exit status."""
    return guarded("bench", lambda: _run(args), "nothing was measured")


def _run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.text import Text

    from server.bench.files import title
    from server.bench.run import run_bench
    from server.bench.table import CAPTION, terminal_table
    from server.inference import InferenceClient

    folder = args.output or Path(f"bench-{datetime.now(UTC):%Y%m%d-%H%M%S}")
    key = api_key(args)
    with InferenceClient(args.server, key, timeout_s=args.timeout) as client:
        plan = _plan(args, client)
        with _progress(plan) as watcher:
            outcome = run_bench(plan, client, key, folder, watcher, with_counters=not args.no_counters)
    console = Console(highlight=False)
    console.print(Text(printable(title(plan)), style="bold"))
    if outcome.figures.num_rounds:
        console.print(terminal_table(plan, outcome.figures))
    for note in (*CAPTION.splitlines(), *outcome.notes):
        console.print(Text(printable(note)))
    console.print(Text(f"Results: {printable(str(folder))}"), soft_wrap=True)
    return _status(outcome)


def _plan(args: argparse.Namespace, client: "InferenceClient") -> "Plan":
    """The plan that the arguments mean on this server.

    Raises:
        BenchError: they cannot be meant.
        SteeringClientError: the server does not have what they name.
    """
    import secrets

    from server.bench.client import BenchError
    from server.bench.plan import UNSTEERED, Plan
    from server.inference import check_profile

    served = client.served(args.model)
    profiles = tuple(dict.fromkeys(args.profile)) or served.profiles[:1]
    if not profiles:
        raise BenchError("The server lists no profile for this key; add one with `expertsteer push` first.")
    for profile in profiles:
        check_profile(served, profile)
    if UNSTEERED in profiles:
        raise BenchError(
            f"A profile named {UNSTEERED!r} cannot be told from the other arm; measure it by another name."
        )
    num_tokens = args.input_len + args.output_len
    if served.max_model_len is not None and num_tokens > served.max_model_len:
        raise BenchError(
            f"--input-len and --output-len are {num_tokens} tokens together; the server takes {served.max_model_len}."
        )
    return Plan(
        args.server.rstrip("/"),
        served.model,
        args.tokenizer or _tokenizer(served.root),
        profiles,
        tuple(dict.fromkeys(args.rates)),
        num_prompts=args.num_prompts,
        input_tokens=args.input_len,
        output_tokens=args.output_len,
        num_rounds=args.rounds,
        seed=args.seed,
        salt=secrets.token_hex(8),
    )


def _tokenizer(root: str | None) -> str:
    """The server's own model, if it can be had here."""
    from artifacts.errors import quoted
    from server.bench.client import BenchError

    # `owner/name` may be an id of a hub; anything else must be a folder on this machine.
    is_id = root is not None and root.count("/") == 1 and not root.startswith((".", "/", "~"))
    if root is None or not (Path(root).is_dir() or is_id):
        where = "nowhere that the server says" if root is None else f"in {quoted(root, 200)} on the server, not here"
        raise BenchError(f"The model's tokenizer is {where}; name a folder or an id with --tokenizer.")
    return root


def _status(outcome: "Outcome") -> int:
    if outcome.is_complete:
        return 0
    if not outcome.figures.num_rounds:
        print("expertsteer bench: interrupted before the first round was complete.", file=sys.stderr)
    return 130


@contextmanager
def _progress(plan: "Plan") -> Iterator["Watcher"]:
    """A bar on a terminal, a line for each turn elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from server.bench.measured import Measured
    from server.bench.plan import Turn
    from server.bench.run import Watcher
    from server.bench.table import rate_text

    console = Console(stderr=True, highlight=False)
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(None), MofNCompleteColumn()
    total = len(plan.rates) * plan.num_rounds * len(plan.arms)

    def described(turn: Turn) -> str:
        return f"{printable(turn.arm)} at {rate_text(turn.rate)}, round {turn.round + 1}"

    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=total)

        def end(turn: Measured) -> None:
            progress.advance(task)
            if not console.is_terminal:
                failed = f", {len(turn.errors)} failed" if turn.errors else ""
                print(f"{described(turn.turn)}: {turn.duration_s:.1f} s{failed}", file=sys.stderr, flush=True)

        if plan.least_duration_s:
            minutes = plan.least_duration_s / 60
            progress.console.print(f"{total} turns; the arrivals alone take {minutes:.1f} minutes. Ctrl-C ends it.")
        yield Watcher(
            on_stage=lambda stage: progress.update(task, description=stage),
            on_start=lambda turn: progress.update(task, description=described(turn)),
            on_end=end,
        )


class _Count:
    """Type of an argument: a whole number within bounds."""

    def __init__(self, maximum: int, minimum: int = 1) -> None:
        self._minimum, self._maximum = minimum, maximum

    def __call__(self, text: str) -> int:
        if not text.isascii() or not text.isdigit() or not self._minimum <= int(text[:20]) <= self._maximum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {self._minimum} to {self._maximum}")
        return int(text)


def _rate(text: str) -> float:
    """Type of an argument."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 < value <= _MAX_RATE or value == math.inf):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of requests a second up to {_MAX_RATE:g}, or inf")
    return value
