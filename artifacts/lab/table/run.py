"""Make the table: train what is missing, measure every target with every expert."""

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from artifacts.lab.model import LabModel
from artifacts.lab.recipe import Recipe
from artifacts.lab.table.measure import Draws, measure_target, prepare_expert
from artifacts.lab.table.models import train_missing
from artifacts.lab.table.row import ROWS_PER_EXPERT, ROWS_PER_TARGET, Row
from artifacts.lab.training import one_thread


def measure_table(
    out: Path,
    targets: Sequence[Recipe],
    experts: Sequence[Recipe],
    draws: Draws,
    *,
    progress: bool = True,
) -> list[Row]:
    """Every row of every target, with models that are trained into `out` where they are missing.

    Raises:
        FileExistsError: as in `train_missing`.
        OSError: `out` cannot be written.
    """
    directories = list(train_missing(out, [*targets, *experts], progress=progress))
    target_directories, expert_directories = directories[: len(targets)], directories[len(targets) :]
    rows: list[Row] = []
    with one_thread():
        width = targets[0].hidden_size
        prepared = {
            directory.name: prepare_expert(LabModel.load(directory), recipe, draws, width)
            for directory, recipe in zip(expert_directories, experts, strict=True)
        }
        total = len(targets) * (ROWS_PER_TARGET + ROWS_PER_EXPERT * len(experts))
        with tqdm(total=total, desc="measuring", unit="row", disable=not progress) as bar:
            for directory in target_directories:
                for row in measure_target(directory.name, LabModel.load(directory), prepared, draws):
                    rows.append(row)
                    bar.update()
    return rows
