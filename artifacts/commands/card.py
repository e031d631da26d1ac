"""`expertsteer card BUNDLE`: the README.md of a bundle's repository on a hub."""

import argparse
import sys
from pathlib import Path

HELP = "Write the model card of a bundle."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the bundle, a .safetensors file")
    parser.add_argument("-o", "--output", type=Path, metavar="README.md", help="file to write (default: print it)")


def run(args: argparse.Namespace) -> int:
    """Write the card; 0 when it is written, 1 with one line on stderr otherwise."""
    from artifacts.bundle import load_bundle
    from artifacts.errors import BundleError
    from artifacts.interchange.card import model_card
    from artifacts.interchange.whole_file import written_whole

    try:
        text = model_card(load_bundle(args.bundle), args.bundle.name)
        if args.output is None:
            sys.stdout.write(text)
        else:
            with written_whole(args.output) as temporary:
                temporary.write_text(text, encoding="utf-8")
    except (BundleError, OSError) as error:
        print(f"expertsteer card: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0
