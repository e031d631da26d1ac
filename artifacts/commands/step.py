"""`expertsteer step`: one step of a build, with everything before it that is not finished."""

import argparse

from artifacts.commands.build import add_common_arguments, configured, guarded, say, silent

HELP = "Run a build as far as one step and print what it found."
# Of `artifacts.jobs.runner.STEPS`, spelt out so that --help needs no torch; a test compares them.
STEPS = {
    "capture": "residual-stream states of both models on the same texts",
    "probe": "whether the expert knows the concept, and which examples look mislabelled",
    "align": "maps from the expert's states to the target's, against permuted pairs",
    "pair": "which expert layer teaches which target layer",
    "vectors": "directions by every competing method",
    "tune": "vector and strength on the tuning split",
    "diagnose": "stability of the chosen direction",
    "controls": "directions with one ingredient replaced by chance",
    "evaluate": "figures of the test split",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare one subcommand per step."""
    steps = parser.add_subparsers(dest="step", metavar="STEP", required=True)
    for name, what in STEPS.items():
        add_common_arguments(steps.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}."))


def run(args: argparse.Namespace) -> int:
    """Run the step; 0 when it is finished, 1 with one line on stderr otherwise."""
    return guarded(f"step {args.step}", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    from artifacts.jobs.report import print_step
    from artifacts.jobs.runner import run_steps

    build = configured(args, None)
    run_steps(build, args.step, args.restart, silent if args.quiet else say)
    if not args.quiet:
        print_step(build, args.step)
    return 0
