"""The models of the table: `DIR/target-1`, `DIR/expert-101` and so on, trained where they are missing."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from artifacts.lab.checkpoint import RECORD, SHIPPED_MODELS, check_replaceable, is_checkpoint, save_checkpoint
from artifacts.lab.model import LabModel
from artifacts.lab.recipe import Continuation, Recipe
from artifacts.lab.training import train


def recipes(recipe: Recipe, count: int, first_seed: int) -> list[Recipe]:
    """`count` times the recipe with seeds from `first_seed` on."""
    return [replace(recipe, seed=first_seed + index) for index in range(count)]


def train_missing(out: Path, wanted: list[Recipe], *, progress: bool = True) -> Iterator[Path]:
    """Train every model of `wanted` that `out` does not hold, one after the other, and yield the directories in order.

    A finished model is kept, so that an interrupted call goes on where it stopped.

    Raises:
        FileExistsError: a directory holds something else, or a model of other settings.
    """
    directories = [out / f"{recipe.name}-{recipe.seed}" for recipe in wanted]
    for directory, recipe in zip(directories, wanted, strict=True):
        _check_kept(directory, recipe)
    for directory, recipe in zip(directories, wanted, strict=True):
        if not is_checkpoint(directory):
            save_checkpoint(directory, recipe, train(recipe, start=_start(recipe), progress=progress))
        yield directory


def _start(recipe: Recipe) -> LabModel | None:
    return LabModel.load(SHIPPED_MODELS / recipe.continued) if isinstance(recipe, Continuation) else None


def _check_kept(directory: Path, recipe: Recipe) -> None:
    check_replaceable(directory)
    if not is_checkpoint(directory):
        return
    settings = json.loads((directory / RECORD).read_text())["recipe"]
    # Through JSON: tuples of the recipe are lists in the record.
    expected = json.loads(json.dumps(asdict(recipe)))
    differing = sorted(name for name in expected if settings.get(name) != expected[name])
    if differing:
        raise FileExistsError(
            f"{directory} was trained with other settings ({', '.join(differing)}); remove it or choose another --out"
        )
