"""Progress bars of the build: rate and remaining time on stderr."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(items: Iterable[Item], title: str, quiet: bool) -> Iterable[Item]:
    """Iterate with a bar that shows the rate and the remaining time; plain iteration when quiet."""
    bar: Iterable[Item] = tqdm(
        items, desc=f"{title:<24}", disable=quiet, file=sys.stderr, dynamic_ncols=True, mininterval=0.5
    )
    return bar
