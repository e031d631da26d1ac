"""`expertsteer lab labels`: when does an expert pay?"""

import argparse
from pathlib import Path
from typing import Any

_DEFAULT_DRAWS = 20


def add_parser(actions: Any) -> None:
    """Add the action to those of `expertsteer lab`."""
    parser = actions.add_parser(
        "labels",
        help="measure when an expert pays: steering from 2 to 64 labelled examples with and without it",
        description="Fit directions from few labelled examples by the target alone, through the expert and through "
        "controls, count right answers, and say where the expert pays. Writes labels.json, labels.svg and one "
        "record per target into --out; targets measured before with the same models and settings are not measured "
        "again. About 10 to 15 minutes per target on one core.",
    )
    parser.add_argument(
        "--target",
        type=Path,
        action="append",
        metavar="DIR",
        help="lab target, may be given several times [shipped one]",
    )
    parser.add_argument("--expert", type=Path, metavar="DIR", help="lab expert [shipped one]")
    parser.add_argument("--out", type=Path, default=Path("labels"), metavar="DIR", help="where results go [labels]")
    parser.add_argument(
        "--draws", type=_draws, default=_DEFAULT_DRAWS, metavar="N", help="labelled sets per point, >= 4 [%(default)s]"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> int:
    """Measure and report; OSError when a model cannot be read or the results not written."""
    import torch
    from rich.console import Console
    from transformers.utils import logging

    from artifacts.lab.checkpoint import SHIPPED_MODELS
    from artifacts.lab.study.comparison import compare
    from artifacts.lab.study.report import show_report, write_report
    from artifacts.lab.study.study import study

    logging.disable_progress_bar()  # reading takes milliseconds; the study shows its own bar
    torch.set_num_threads(1)  # several threads are slower than one on models this small
    targets = args.target or [SHIPPED_MODELS / "target"]
    expert = args.expert or SHIPPED_MODELS / "expert"
    records = list(study(targets, expert, args.out, args.draws, progress=not args.quiet))
    comparisons = compare(records)
    console = Console()
    show_report(records, comparisons, console)
    for path in write_report(records, comparisons, args.out):
        console.print(f"{path}: {path.stat().st_size} bytes", highlight=False)
    return 0


def _draws(text: str) -> int:
    # The draws that choose the strength are among those that are reported.
    least = 4
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= {least}")
    return int(text)
