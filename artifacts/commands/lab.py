"""`expertsteer lab`: the tiny expert and target models on which steering can be seen and tested."""

import argparse
import sys
import time
from pathlib import Path

from artifacts.lab.study import command as study
from artifacts.lab.table import command as table

HELP = "Train the lab's tiny expert and target models, measure what steers them, or write their data files."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    train = actions.add_parser(
        "train",
        help="train both models from scratch (about 4 minutes each on one core) and check that steering works on them",
        description="Train the lab's models into DIR/target and DIR/expert, then measure steering on DIR's pair. "
        "Exit status 1 and the figures on stderr if the pair is not steerable; the models are kept for a look.",
    )
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the models go")
    train.add_argument("--only", choices=("target", "expert"), help="train one model; the other is taken from DIR")
    for name in ("target", "expert"):
        train.add_argument(f"--steps-{name}", type=_positive, metavar="N", help=f"training steps of the {name}")
        train.add_argument(f"--seed-{name}", type=_non_negative, metavar="N", help=f"seed of the {name}")

    table.add_parser(actions)
    study.add_parser(actions)
    data = actions.add_parser("data", help="write the data files of the build job and of the tests")
    data.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the JSONL files go")


def run(args: argparse.Namespace) -> int:
    try:
        return _RUN[args.action](args)
    except OSError as error:
        print(f"expertsteer lab {args.action}: {error}", file=sys.stderr)
        return 1


def _write_data(args: argparse.Namespace) -> int:
    from artifacts.lab.dataset import write_dataset

    for path in write_dataset(args.out):
        print(f"{path}: {path.stat().st_size} bytes")
    return 0


def _train(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from transformers.utils import logging

    from artifacts.lab.checkpoint import check_replaceable, save_checkpoint
    from artifacts.lab.recipe import EXPERT, TARGET
    from artifacts.lab.training import train

    logging.disable_progress_bar()  # reading and writing takes milliseconds; training shows its own bar
    recipes = [recipe for recipe in (TARGET, EXPERT) if args.only in (None, recipe.name)]
    for recipe in recipes:
        check_replaceable(args.out / recipe.name)
    for recipe in recipes:
        steps, seed = getattr(args, f"steps_{recipe.name}"), getattr(args, f"seed_{recipe.name}")
        recipe = replace(
            recipe,
            steps=recipe.steps if steps is None else steps,
            seed=recipe.seed if seed is None else seed,
        )
        started = time.monotonic()
        trained = train(recipe)
        save_checkpoint(args.out / recipe.name, recipe, trained)
        print(
            f"{args.out / recipe.name}: {trained.model.num_parameters()} parameters, "
            f"loss {trained.final_loss:.3f}, {time.monotonic() - started:.0f} s"
        )
    return _gate(args.out)


def _gate(out: Path) -> int:
    from artifacts.lab.checkpoint import is_checkpoint
    from artifacts.lab.gate import GateError, check_pair
    from artifacts.lab.model import LabModel

    if not is_checkpoint(out / "target"):
        print(f"gate: not run, {out} holds no target; train one with --only target")
        return 0
    expert = LabModel.load(out / "expert") if is_checkpoint(out / "expert") else None
    try:
        print(f"gate passed: {check_pair(LabModel.load(out / 'target'), expert)}")
    except GateError as error:
        print(f"expertsteer lab train: {error}", file=sys.stderr)
        return 1
    return 0


_RUN = {"train": _train, "table": table.run, "labels": study.run, "data": _write_data}


def _positive(text: str) -> int:
    return _at_least(1, text)


def _non_negative(text: str) -> int:
    return _at_least(0, text)


def _at_least(bound: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = bound - 1
    if number < bound:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= {bound}")
    return number
