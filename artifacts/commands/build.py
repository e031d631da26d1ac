"""`expertsteer build`: from an expert model and a target model to a bundle."""

import argparse
import sys
from pathlib import Path

HELP = "Build a steering bundle from an expert model and a target model."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("config", metavar="CONFIG.yaml", type=Path, help="what to build; paths in it start from it")
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, required=True, help="bundle to write (.safetensors)"
    )
    parser.add_argument(
        "--work",
        metavar="DIR",
        type=Path,
        help="where the steps leave their results (default: .expertsteer/build/NAME beside FILE)",
    )
    parser.add_argument("--restart", action="store_true", help="forget earlier results in the work directory")
    parser.add_argument("--quiet", action="store_true", help="no progress and no table, only errors")


def run(args: argparse.Namespace) -> int:
    """Build the bundle; 0 when it lies at its place, 1 with one line on stderr otherwise."""
    from artifacts.jobs.config import load_config
    from artifacts.jobs.errors import BuildError

    try:
        config = load_config(args.config)
        from artifacts.errors import BundleError
        from artifacts.jobs.build import Build
        from artifacts.jobs.report import print_report
        from artifacts.jobs.runner import run_build

        work = args.work or args.output.parent / ".expertsteer" / "build" / config.name
        build = Build(config, args.config.parent, work, args.quiet)
        try:
            bundle = run_build(build, args.output, args.restart, lambda line: None if args.quiet else _say(line))
        except (BundleError, OSError) as error:
            raise BuildError(str(error)) from error
    except BuildError as error:
        _say(f"expertsteer build: {' '.join(str(error).split())}")
        return 1
    except KeyboardInterrupt:
        _say("expertsteer build: interrupted; the same command goes on where this one stopped")
        return 130
    if not args.quiet:
        print_report(bundle, args.output)
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr)
