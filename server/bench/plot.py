"""The figures as one plot: distributions of TTFT and TPOT of each arm at each rate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from server.bench.figures import PERCENTILES, ArmFigures, Figures
from server.bench.table import rate_text
from server.commands.connection import printable

# Okabe and Ito's colours, which differ for every kind of colour vision; black is for the unsteered arm.
_COLOURS: Final = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_LINES: Final = ("-", "--", "-.", ":")
_ROWS: Final = {"ttft": "time to first token, ms", "tpot": "time per further token, ms"}
_MARKS: Final = dict(zip(PERCENTILES, ("o", "D"), strict=True))
_CELL_INCHES: Final = (3.6, 2.7)


def plot(figures: Figures, title: str, paths: Sequence[Path]) -> None:
    """Draw the plot.

    Args:
        figures: of the benchmark; at least one rate.
        title: above it.
        paths: files to write; their suffixes say the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    # Text stays text: searchable, and no path for every letter.
    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "expertsteer"
    from matplotlib import pyplot

    rates = list(figures.num_rounds)
    width, height = _CELL_INCHES
    figure, grid = pyplot.subplots(
        len(_ROWS), len(rates), figsize=(max(width * len(rates), 5.5), height * len(_ROWS) + 0.9), squeeze=False
    )
    try:
        for row, (name, label) in enumerate(_ROWS.items()):
            for column, rate in enumerate(rates):
                axes = grid[row][column]
                _draw(axes, figures.at(rate), name)
                axes.set(xlabel=label, ylim=(0, 1.02))
                if column == 0:
                    axes.set_ylabel("share of requests")
                if row == 0:
                    axes.set_title(_plain(rate_text(rate)), fontsize=10)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.suptitle(f"{_plain(title)}\ncircle: p50, diamond: p99", fontsize=11)
        figure.legend(handles, labels, loc="lower center", ncols=min(4, len(labels)), frameon=False, fontsize=9)
        figure.tight_layout(rect=(0, 0.07, 1, 1))
        for path in paths:
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    finally:
        pyplot.close(figure)


def _draw(axes: Any, arms: Sequence[ArmFigures], name: str) -> None:
    """Cumulative distributions; a circle at the median, a diamond at the 99th percentile."""
    for number, arm in enumerate(arms):
        values = arm.times_s[name]
        values_ms = np.sort(1e3 * values[~np.isnan(values)])
        style = {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _LINES[number // len(_COLOURS) % len(_LINES)]}
        shares = np.arange(1, len(values_ms) + 1) / max(1, len(values_ms))
        axes.step(values_ms, shares, where="post", lw=1.4, label=_plain(arm.arm), **style)
        for percentile, mark in _MARKS.items():
            value_ms = arm.percentile_ms(name, percentile)
            if value_ms is not None:
                axes.plot(value_ms, percentile / 100, mark, color=style["color"], ms=4.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, lw=0.6)


def _plain(text: str) -> str:
    """Text that matplotlib draws as it stands: `$` would begin a formula, a leading `_` would hide a label."""
    shown = printable(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown
