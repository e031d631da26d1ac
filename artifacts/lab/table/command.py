"""`expertsteer lab table`: what steers the lab's targets, and is it the expert?"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from artifacts.lab.table.row import Row

    # Rows, what is printed below their table, and what else the JSON holds.
    _Result = tuple[list[Row], list[object], dict[str, object]]


def add_parser(actions: Any) -> None:
    """Add the action to those of `expertsteer lab`."""
    parser = actions.add_parser(
        "table",
        help="train several targets and experts and compare every way of steering them, controls included",
        description="Train targets and experts into DIR where they are missing, choose every vector on the tune facts, "
        "and print accuracy on the test facts with 95 % intervals. Writes DIR/table.json and DIR/table.svg. About 5 "
        "minutes per model and 8 per target on one core.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where models and table go")
    parser.add_argument("--targets", type=_count, default=3, metavar="N", help="targets, seeds from 1 [%(default)s]")
    parser.add_argument("--experts", type=_count, default=2, metavar="N", help="experts, seeds from 101 [%(default)s]")
    parser.add_argument(
        "--world",
        choices=("careful", "two-sided"),
        default="careful",
        help="careful: the shipped models' world; two-sided: a label that errs to either side of an axis, where "
        "estimators are compared and no expert takes part [%(default)s]",
    )
    parser.add_argument("--quick", action="store_true", help="few draws of every control: a look, not a result")


def run(args: argparse.Namespace) -> int:
    """Train, measure and report; OSError when a directory holds something else or cannot be written."""
    from rich.console import Console
    from transformers.utils import logging

    from artifacts.lab.table.output import rich_table, write_plot, write_record

    logging.disable_progress_bar()  # reading takes milliseconds; training and measuring show their own bars
    rows, printed, further = (_two_sided if args.world == "two-sided" else _careful)(args)
    # The table is kept in files too, so it is not squeezed into a narrow terminal.
    console = Console(width=max(160, 95 + 25 * args.targets))
    console.print(rich_table(rows), *printed, sep="\n", highlight=False)
    write_record(args.out / "table.json", rows, further)
    write_plot(args.out / "table.svg", rows)
    console.print(args.out / "table.json", args.out / "table.svg", sep="\n", highlight=False)
    return 0


def _careful(args: argparse.Namespace) -> "_Result":
    from artifacts.lab.recipe import EXPERT, TARGET
    from artifacts.lab.table.measure import QUICK, Draws
    from artifacts.lab.table.models import recipes
    from artifacts.lab.table.output import rich_comparisons
    from artifacts.lab.table.run import measure_table
    from artifacts.lab.table.verdict import compare, verdict

    targets, experts = recipes(TARGET, args.targets, first_seed=1), recipes(EXPERT, args.experts, first_seed=101)
    rows = measure_table(args.out, targets, experts, QUICK if args.quick else Draws())
    comparisons = compare(rows)
    said = verdict(comparisons)
    further = {"comparisons": [each.record() for each in comparisons], "verdict": said}
    return rows, [rich_comparisons(comparisons), *said], further


def _two_sided(args: argparse.Namespace) -> "_Result":
    from artifacts.lab.nonlinear.report import advantages, layer_record, rich_advantages, rich_layers, sentences
    from artifacts.lab.nonlinear.run import measure_targets
    from artifacts.lab.recipe import TWO_SIDED_TARGET
    from artifacts.lab.table.measure import QUICK, Draws
    from artifacts.lab.table.models import recipes

    draws = QUICK if args.quick else Draws()
    measured = measure_targets(args.out, recipes(TWO_SIDED_TARGET, args.targets, first_seed=1), draws.random)
    found = advantages(measured.rows)
    said = sentences(found, measured.layers)
    further = {
        "advantages": [each.record() for each in found],
        "layers": [layer_record(each) for each in measured.layers],
        "verdict": said,
    }
    return measured.rows, [rich_advantages(found), rich_layers(measured.layers), *said], further


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 1")
    return int(text)
