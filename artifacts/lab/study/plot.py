"""The plot: accuracy against the number of labelled examples, one panel per regime."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Final, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from artifacts.lab.study.comparison import accuracies, mean_interval
from artifacts.lab.study.efficiency import TargetRecord
from artifacts.lab.study.regime import LABEL_COUNTS, REGIMES, Regime
from artifacts.lab.study.source import Source


class _Style(NamedTuple):
    colour: str
    line: str
    marker: str


# What uses the expert is drawn solid, what does without is dashed, its controls are dotted.
_STYLES: Final = {
    Source.OWN: _Style("black", "--", "o"),
    Source.MAPPED: _Style("tab:blue", "-", "s"),
    Source.LABELS: _Style("tab:red", "-", "^"),
    Source.SELF_LABELS: _Style("tab:orange", "--", "v"),
    Source.UNTRAINED: _Style("tab:blue", ":", "s"),
    Source.UNTRAINED_LABELS: _Style("tab:red", ":", "^"),
}


def draw_plot(records: Sequence[TargetRecord], path: Path) -> None:
    """Write the plot as SVG that needs nothing else; means over targets and draws with 95 % bootstrap intervals."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, sharey=True)
    for panel, regime in zip(axes.flat, REGIMES, strict=True):
        _panel(panel, records, regime)
    for panel in axes[-1]:
        panel.set_xlabel("labelled examples, both classes together")
    for panel in axes[:, 0]:
        panel.set_ylabel("right greedy answers, test facts")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.suptitle(
        f"When does an expert pay? {len(records)} target(s), {len(records[0].conditions[0].accuracies)} draws"
    )
    figure.savefig(path, format="svg", metadata={"Date": None})


def _panel(panel: Axes, records: Sequence[TargetRecord], regime: Regime) -> None:
    for source, style in _STYLES.items():
        shown = [(count, accuracies(records, regime.name, count, source)) for count in regime.counts]
        intervals = [(count, mean_interval(values)) for count, values in shown if values is not None]
        counts = [count for count, _interval in intervals]
        panel.plot(
            counts,
            [each.value for _count, each in intervals],
            label=str(source),
            markersize=4,
            color=style.colour,
            linestyle=style.line,
            marker=style.marker,
        )
        low, high = ([getattr(each, end) for _count, each in intervals] for end in ("low", "high"))
        panel.fill_between(counts, low, high, color=style.colour, alpha=0.12, linewidth=0)
    levels = {
        "not steered": (fmean(record.unsteered for record in records), "0.6"),
        "random directions": (fmean(fmean(record.random) for record in records), "tab:brown"),
        "target's own, all 720 labels": (fmean(record.own_all for record in records), "0.2"),
        "expert mapped, all 720 labels": (fmean(record.mapped_all for record in records), "tab:cyan"),
    }
    for title, (level, colour) in levels.items():
        panel.axhline(level, color=colour, linewidth=0.8, label=title)
    panel.set(title=regime.title, xscale="log", ylim=(0, 1))
    panel.set_xticks(LABEL_COUNTS, labels=[str(count) for count in LABEL_COUNTS])
    panel.minorticks_off()
