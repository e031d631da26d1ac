"""What `expertsteer eval` takes on its command line."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from artifacts.evaluation.gates import Gate

# As `artifacts.evaluation.plan` has it; that module is too heavy to import for a help text.
MIN_RANDOM: Final = 30
EPILOG: Final = """
data: JSON Lines, one object a line, `messages` (a chat) or `text`, and one of
  answer             the exact text of the right answer
  pattern            a regular expression that the answer contains
  choices, correct   texts, and the index of the right one: the likeliest per token is chosen
  (none)             neutral text, with task: neutral or a split; only split test is used
`task` is target (default), retention or neutral; rows of one `group` are resampled together.

measured on the same questions: unsteered, the recommended strength, its negation, strengths from 0 to the maximum,
random directions of the same norm, every control vector in the bundle, and a system prompt instead of steering.
What is missing is named in the report.

gates: sums of figures with >=, <=, > or < between them, for example
  --gate 'on >= 0.6' --gate 'on - random.mean >= 0.2' --gate 'on > untrained' --gate 'perplexity_ratio <= 1.25'
figures: off, on, negated, prompt, own, untrained and other controls, each with .low, .high, .perplexity_ratio,
  .retention, .clas, .axbench, .likelihood (without a name: of `on`); random.mean, .max, .min and so for other chance;
  gap_closed.prompt, gap_closed.expert; spearman; p.NAME (two-sided McNemar, Holm-adjusted: add
  `on > NAME`; the rank among draws of chance)

through a server, controls are measured where it holds them as profiles:
  expertsteer eval BUNDLE --write-controls DIR
  expertsteer serve MODEL --steering-bundle BUNDLE DIR/*.safetensors
  expertsteer eval BUNDLE --server http://127.0.0.1:8000 --data test.jsonl

lm-evaluation-harness asks the same server with MODEL@PROFILE as the model; the lab's task file and the command are in
  {tasks}

exit status: 0 measured, 1 refused (one line says why), 2 usage, 3 a gate failed, 130 interrupted
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG.format(tasks=Path(__file__).parents[1] / "evaluation" / "lm_eval")
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="the bundle under test")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--target", metavar="MODEL_DIR", type=Path, help="measure offline, with the target in this folder"
    )
    where.add_argument("--server", metavar="URL", help="measure through this running server, which serves the bundle")
    where.add_argument(
        "--write-controls",
        metavar="DIR",
        type=Path,
        help="only write controls and random directions as bundles to serve",
    )
    _add_questions(parser)
    _add_subject(parser)
    _add_judge(parser)
    parser.add_argument(
        "--output", metavar="DIR", type=Path, help="for report.json and report.html (default: NAME-eval)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress and no table, only failures")


def _add_questions(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("questions")
    group.add_argument("--data", metavar="FILE", type=Path, nargs="+", action="extend", default=[], help="see below")
    group.add_argument(
        "--retention",
        metavar="FILE",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        help="like --data; rows are of task retention unless they say otherwise",
    )
    group.add_argument("--prompt", metavar="TEXT", help="system prompt to compare with (default: the bundle's)")
    group.add_argument(
        "--random-directions", metavar="N", type=_random_count, default=MIN_RANDOM, help="30 (default) or more"
    )
    group.add_argument(
        "--doses", metavar="N", type=_dose_count, default=9, help="strengths from 0 to the maximum (default: 9)"
    )
    group.add_argument("--negative-doses", action="store_true", help="also strengths down to minus the maximum")
    group.add_argument("--gate", metavar="EXPR", type=_gate, action="append", default=[], help="see below (repeatable)")
    group.add_argument("--seed", type=int, default=0, help="of random directions and intervals (default: 0)")
    group.add_argument("--max-new-tokens", metavar="N", type=_positive, default=32, help="of an answer (default: 32)")
    group.add_argument(
        "--exact",
        choices=("forced", "generation"),
        help="tell exact answers by one forward pass (default offline) or by generating (default with --server)",
    )


def _add_subject(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--expert", metavar="MODEL_DIR", type=Path, help="also ask the expert: share of its gap closed")
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="offline (default: float32)"
    )
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="offline (default: auto)")
    group.add_argument(
        "--batch-tokens", metavar="N", type=_positive, default=4096, help="offline, of a forward pass (default: 4096)"
    )
    group.add_argument(
        "--fingerprint",
        choices=("enforce", "ignore"),
        default="enforce",
        help="refuse a target with other weights than the bundle was made for, or ignore it, for quantised copies",
    )
    group.add_argument("--model", metavar="NAME", help="served model (default: the server's first)")
    group.add_argument("--api-key-env", metavar="NAME", help="environment variable with the server's API key")
    group.add_argument(
        "--concurrency", metavar="N", type=_positive, default=16, help="requests in flight (default: 16)"
    )


def _add_judge(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("judge", "A model behind an OpenAI-compatible endpoint that scores the answers.")
    group.add_argument("--judge-url", metavar="URL", help="what stands before /chat/completions, usually ends in /v1")
    group.add_argument("--judge-model", metavar="NAME", help="needed with --judge-url")
    group.add_argument("--judge-key-env", metavar="NAME", help="environment variable with the judge's API key")
    group.add_argument("--judge-concept", metavar="TEXT", help="what steering should bring (default: the description)")


def _gate(text: str) -> "Gate":
    from artifacts.evaluation.gates import parse_gate

    try:
        return parse_gate(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _random_count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < MIN_RANDOM:
        raise argparse.ArgumentTypeError(f"{text!r} random directions say too little; give {MIN_RANDOM} or more")
    return int(text)


def _dose_count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 2 <= int(text) <= 101:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of strengths; give 2 to 101")
    return int(text)


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)
