"""`expertsteer build`: from an expert model and a target model to a bundle."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from artifacts.jobs.build import Build

HELP = "Build a steering bundle from an expert model and a target model."
GATE_FAILED = 3
EPILOG = """
The steps, each skipped when its inputs did not change since it last finished:
  capture   residual-stream states of both models on the same texts
  probe     does the expert know the concept? suspected mislabelled examples
  align     a map from the expert's states to the target's, against permuted pairs
  pair      which expert layer teaches which target layer
  vectors   directions by every competing method
  tune      vector and strength on the tuning split, within the budgets
  diagnose  stability of the chosen direction
  controls  what the figures are worth nothing without
  evaluate  the test split, once
  pack      the bundle with all evidence
`expertsteer step STEP CONFIG.yaml` goes as far as one step and prints what it found.

exit status: 0 built, 1 refused (one line says why), 2 usage, 3 built but a gate of `evaluate.gates` failed,
130 interrupted
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="bundle to write (default: NAME.safetensors)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan with its cost, run nothing")
    parser.add_argument(
        "--rate",
        metavar="TFLOPS",
        type=float,
        help="reckon the plan's times with this rate of matrix products, in 10^12 operations per second, instead of "
        "measuring it here; for planning a build on another machine",
    )
    add_common_arguments(parser)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of a whole build and of a single step."""
    parser.add_argument("config", metavar="CONFIG.yaml", type=Path, help="what to build; paths in it start from it")
    parser.add_argument(
        "--work",
        metavar="DIR",
        type=Path,
        help="where the steps leave their results (default: .expertsteer/build/NAME, beside FILE where one is named)",
    )
    parser.add_argument(
        "--preset",
        choices=("recommended", "paper"),
        help="recommended: ridge aligner fitted on other prompts, every vector method, pairs by trying them; "
        "paper: auto-encoder, low mutual information, RFM on aligned states",
    )
    parser.add_argument(
        "--align",
        choices=("ridge", "procrustes", "cca", "joint", "autoencoder", "labeller"),
        help="the way from the expert to the target, over align.method",
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="any key of the configuration, e.g. --set tune.objective=likelihood (repeatable)",
    )
    parser.add_argument("--restart", action="store_true", help="forget earlier results in the work directory")
    parser.add_argument("--quiet", action="store_true", help="no plan, no progress and no table, only errors")


def run(args: argparse.Namespace) -> int:
    """Build the bundle; see the epilog for the exit status."""
    return guarded("build", lambda: _run(args))


RESUMES = "the same command goes on where this one stopped"


def guarded(command: str, work: Callable[[], int], interrupted: str = RESUMES) -> int:
    """The exit status of some work, its refusals as one line on stderr; `interrupted` says what Ctrl-C left behind."""
    # Threads that wait by spinning take the processor from those that work when other programs want it too. The OpenMP
    # runtime reads this when torch loads it, and not again.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from artifacts.errors import BundleError
    from artifacts.jobs.errors import BuildError

    try:
        return work()
    except (BuildError, BundleError, OSError) as error:
        say(f"expertsteer {command}: {' '.join(str(error).split())}")
        return 1
    except torch.OutOfMemoryError as error:
        say(f"expertsteer {command}: out of memory; take fewer tokens a batch: {' '.join(str(error).split())}")
        return 1
    except KeyboardInterrupt:
        say(f"expertsteer {command}: interrupted; {interrupted}")
        return 130


def configured(args: argparse.Namespace, output: Path | None) -> "Build":
    """The build that the arguments describe; its work directory lies beside `output` unless one is named."""
    from artifacts.jobs.build import Build
    from artifacts.jobs.config import load_config

    config = load_config(args.config, _changes(args))
    beside = Path() if output is None else output.parent
    return Build(config, args.config.parent, args.work or beside / ".expertsteer" / "build" / config.name, args.quiet)


def say(line: str) -> None:
    """Tell the user on stderr, where the progress bars are."""
    print(line, file=sys.stderr)


def silent(_line: str) -> None:
    """Say nothing."""


def _run(args: argparse.Namespace) -> int:
    from artifacts.jobs.errors import BuildError
    from artifacts.jobs.evaluate import failed_gates
    from artifacts.jobs.plan import print_plan
    from artifacts.jobs.report import print_report
    from artifacts.jobs.runner import run_build

    if args.rate is not None and not args.rate > 0:
        raise BuildError(f"--rate is {args.rate:g}; it must be greater than 0")
    build = configured(args, args.output)
    output = args.output or Path(f"{build.config.name}.safetensors")
    if args.dry_run or not args.quiet:
        print_plan(build, output, None if args.rate is None else args.rate * 1e12)
    if args.dry_run:
        return 0
    bundle = run_build(build, output, args.restart, silent if args.quiet else say)
    if not args.quiet:
        print_report(bundle, output)
    failed = failed_gates(build)
    for gate in failed:
        say(f"expertsteer build: gate failed: {gate}")
    return GATE_FAILED if failed else 0


def _changes(args: argparse.Namespace) -> list[Mapping[str, Any]]:
    """What the command line lays over the file."""
    from artifacts.jobs.config import parse_change
    from artifacts.jobs.errors import BuildError
    from artifacts.jobs.preset import PRESETS

    changes: list[Mapping[str, Any]] = [] if args.preset is None else [PRESETS[args.preset]]
    if args.align is not None:
        changes.append({"align": {"method": args.align}})
    try:
        return [*changes, *map(parse_change, args.set)]
    except ValueError as error:
        raise BuildError(f"--set: {error}") from error
