"""The table as text, as JSON and as a picture."""

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Final

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from rich.table import Table

from artifacts.evaluation.statistics import Interval
from artifacts.lab.table.row import Row
from artifacts.lab.table.verdict import Comparison

SCHEMA: Final = 1
_PACKAGES = ("torch", "transformers", "numpy", "scipy", "xrfm")
_SETTING = "accuracy, 95 % bootstrap interval over pairs of test facts and over draws; greedy, exact, 204 test facts"


def rich_table(rows: Sequence[Row]) -> Table:
    """One column per target, one line per way of steering and expert."""
    targets = list(dict.fromkeys(row.target for row in rows))
    table = Table(title="Greedy exact accuracy on 204 test facts", caption=_SETTING)
    table.add_column("steering")
    for name in ("expert", "draws"):
        table.add_column(name, no_wrap=True)
    for target in targets:
        table.add_column(target, no_wrap=True)
    for kind, expert, line in _lines(rows):
        cells = [interval_text(line[target].interval) for target in targets]
        table.add_row(kind.value, expert or "", str(next(iter(line.values())).num_draws), *cells)
    return table


def rich_comparisons(comparisons: Sequence[Comparison]) -> Table:
    """Expert against untrained experts, one line per target and expert."""
    table = Table(title="Expert (B) minus untrained expert (B)", caption="McNemar: against the best untrained draw")
    for name in ("target", "expert", "difference", "only expert right", "only untrained right", "p", "beats"):
        table.add_column(name, no_wrap=True)
    for each in comparisons:
        test = each.against_best
        counts = (str(test.first_only), str(test.second_only), f"{test.p_value:.1e}")
        table.add_row(each.target, each.expert, interval_text(each.difference), *counts, "yes" if each.beats else "no")
    return table


def write_record(path: Path, rows: Sequence[Row], further: Mapping[str, object]) -> None:
    """Write everything that the table says, every draw behind it, and what is `further` known of it, as JSON."""
    record = {
        "schema": SCHEMA,
        "setting": _SETTING,
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "rows": [row.record() for row in rows],
        **further,
    }
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def write_plot(path: Path, rows: Sequence[Row]) -> None:
    """Write one panel per target with every row's accuracy and interval as SVG that needs no other file."""
    targets = list(dict.fromkeys(row.target for row in rows))
    lines = list(_lines(rows))
    figure = Figure(figsize=(5 + 3 * len(targets), 1 + 0.32 * len(lines)), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(1, len(targets), sharey=True, squeeze=False)[0]
    for target, panel in zip(targets, axes, strict=True):
        for height, (_kind, _expert, line) in enumerate(reversed(lines)):
            value, low, high = line[target].interval
            # Single vectors stand out from what has chance in it and from what does not steer.
            colour = "tab:blue" if line[target].num_draws == len(line[target].choices) == 1 else "tab:gray"
            panel.errorbar(value, height, xerr=[[value - low], [high - value]], fmt="o", color=colour, capsize=3)
        panel.set(title=target, xlim=(0, 1.02), xlabel="accuracy, 95 % interval")
        panel.grid(axis="x", alpha=0.3)
    labels = [f"{kind.value}{f'  {expert}' if expert else ''}" for kind, expert, _line in reversed(lines)]
    axes[0].set_yticks(range(len(lines)), labels)
    # Neither date nor random identifiers: the same rows give the same file.
    with rc_context({"svg.hashsalt": "expertsteer"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def _lines(rows: Sequence[Row]) -> Iterator[tuple[StrEnum, str | None, dict[str, Row]]]:
    """Rows of the same way and expert together, by target, in the order in which they come."""
    for kind in dict.fromkeys(row.kind for row in rows):
        same = [row for row in rows if row.kind is kind]
        for expert in dict.fromkeys(row.expert for row in same):
            yield kind, expert, {row.target: row for row in same if row.expert == expert}


def interval_text(interval: Interval) -> str:
    """`0.500 [0.400, 0.600]`."""
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
