"""Train the targets of the second world where they are missing and measure them."""

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from artifacts.lab.choice import STRENGTHS
from artifacts.lab.model import LabModel
from artifacts.lab.nonlinear.measure import Measured, measure_target
from artifacts.lab.recipe import Recipe
from artifacts.lab.table.models import train_missing
from artifacts.lab.training import one_thread


def measure_targets(
    out: Path,
    targets: Sequence[Recipe],
    num_random: int,
    strengths: Sequence[float] = STRENGTHS,
    *,
    progress: bool = True,
) -> Measured:
    """Rows and layers of all targets, one after the other; `num_random` and `strengths` as in `measure_target`.

    Raises:
        FileExistsError: as in `train_missing`.
        OSError: `out` cannot be written.
    """
    directories = list(train_missing(out, list(targets), progress=progress))
    measured = Measured([], [])
    with one_thread():
        for directory in tqdm(directories, desc="measuring", unit="target", disable=not progress):
            each = measure_target(directory.name, LabModel.load(directory), num_random, strengths)
            measured.rows.extend(each.rows)
            measured.layers.extend(each.layers)
    return measured
