"""Plots of a report as inline SVG, without any text that a browser would run and without fonts to fetch."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from pydantic import JsonValue

from artifacts.evaluation.schema import ConditionResult, Report
from artifacts.evaluation.statistics import Interval

# Mid tones, readable on white and on black.
BLUE, ORANGE, GREEN, GREY = "#3b82c4", "#d9822b", "#3f9e6b", "#8a8f98"
_WIDTH: Final = 7.2


def dose_plot(report: Report) -> str:
    """Accuracy over strength with its interval, perplexity ratio on a second axis."""
    shown = [report.condition(name) for name in report.dose_response.conditions]
    strengths = [each.strength for each in shown]
    with _figure(_WIDTH, 3.6) as (figure, svg):
        axes = figure.add_subplot()
        values = [each.accuracy for each in shown]
        axes.fill_between(
            strengths, [each.low for each in values], [each.high for each in values], color=BLUE, alpha=0.2, lw=0
        )
        axes.plot(strengths, [each.value for each in values], "o-", color=BLUE, ms=4)
        axes.axvline(report.about.recommended, color=GREY, ls=":", lw=1)
        # Towards the middle, where the label cannot run into an axis.
        left = report.about.recommended > (strengths[0] + strengths[-1]) / 2
        axes.annotate(
            "recommended", (report.about.recommended, 1.0), xytext=(-3 if left else 3, -9),
            textcoords="offset points", ha="right" if left else "left", color=GREY, fontsize=8,
        )  # fmt: skip
        for draw in report.draws:
            if draw.name == "random":
                axes.axhline(draw.mean.value, color=GREY, ls="--", lw=1)
                axes.annotate(
                    "random directions, mean", (max(strengths), draw.mean.value), xytext=(0, 3),
                    textcoords="offset points", ha="right", color=GREY, fontsize=8,
                )  # fmt: skip
        axes.set(xlabel="strength", ylim=(-0.02, 1.05))
        axes.set_ylabel("accuracy", color=BLUE)
        ratios = [(each.strength, each.perplexity_ratio.value) for each in shown if each.perplexity_ratio is not None]
        if ratios:
            second = axes.twinx()
            second.plot(*zip(*ratios, strict=True), "s--", color=ORANGE, ms=3)
            second.set_ylabel("perplexity, over unsteered", color=ORANGE)
            second.spines["top"].set_visible(False)
            # A model that falls apart would flatten everything else.
            if max(ratio for _, ratio in ratios) > 10:
                second.set_yscale("log")
    return svg[0]


def baseline_plot(report: Report) -> str:
    """Every condition as a dot with its interval; single draws of chance as small dots."""
    rows: list[tuple[str, Interval, str]] = []
    drawn = {draw.name for draw in report.draws}
    for each in report.conditions:
        if each.kind in ("off", "on", "negated", "prompt", "control") and each.name.rpartition("-")[0] not in drawn:
            rows.append((each.name, each.accuracy, GREEN if each.kind == "on" else BLUE))
    rows += [(f"{draw.name}, mean of {draw.count}", draw.mean, ORANGE) for draw in report.draws]
    with _figure(_WIDTH, 0.9 + 0.32 * len(rows)) as (figure, svg):
        axes = figure.add_subplot()
        for place, (_, interval, colour) in enumerate(rows):
            axes.hlines(place, interval.low, interval.high, color=colour, lw=2)
            axes.plot([interval.value], [place], "o", color=colour, ms=6)
        for place, draw in enumerate(report.draws, len(rows) - len(report.draws)):
            values = [each.accuracy.value for each in report.conditions if _is_draw(each, draw.name)]
            axes.plot(values, [place] * len(values), "|", color=GREY, ms=7)
        axes.set_yticks(range(len(rows)), [_plain(name) for name, _, _ in rows])
        axes.invert_yaxis()
        axes.set(xlabel="accuracy with 95 % interval", xlim=(-0.02, 1.02))
        axes.grid(axis="x", color=GREY, alpha=0.3, lw=0.5)
    return svg[0]


def layer_plot(pairs: Sequence[Mapping[str, JsonValue]], key: str, label: str) -> str | None:
    """Heat-map of one figure over expert and target layers; None when no pair has it."""
    known: dict[tuple[int, int], float] = {}
    for pair in pairs:
        expert, target, figure = _layer(pair, "expert"), _layer(pair, "target"), _number(pair.get(key))
        if expert is not None and target is not None and figure is not None:
            known[expert, target] = figure
    if not known:
        return None
    experts, targets = sorted({expert for expert, _ in known}), sorted({target for _, target in known})
    grid = [[known.get((expert, target), float("nan")) for target in targets] for expert in experts]
    with _figure(min(_WIDTH, 1.8 + 0.5 * len(targets)), 1.2 + 0.4 * len(experts)) as (drawing, svg):
        axes = drawing.add_subplot()
        image = axes.imshow(grid, cmap="viridis", aspect="auto")
        axes.set_xticks(range(len(targets)), [str(each) for each in targets])
        axes.set_yticks(range(len(experts)), [str(each) for each in experts])
        axes.set(xlabel="target layer", ylabel="expert layer")
        if len(known) <= 150:
            bounds = min(known.values()), max(known.values())
            for (expert, target), value in known.items():
                bright = value > sum(bounds) / 2
                axes.text(
                    targets.index(target), experts.index(expert), f"{value:.2f}", ha="center", va="center", fontsize=7,
                    color="#000000" if bright else "#ffffff",
                )  # fmt: skip
        drawing.colorbar(image, ax=axes, label=label)
    return svg[0]


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Any, list[str]]]:
    """A figure without window, in inches; on leaving, its SVG is put into the list."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "path",
        "svg.hashsalt": "expertsteer",
        "font.size": 9,
        "axes.spines.top": False,
        "text.parse_math": False,
    }
    style |= {f"{part}.color": GREY for part in ("text", "xtick", "ytick")}
    style |= {"axes.edgecolor": GREY, "axes.labelcolor": GREY, "axes.facecolor": "none"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
        FigureCanvasSVG(figure)
        svg: list[str] = []
        yield figure, svg
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
        svg.append(_inline(buffer.getvalue()))


def _inline(text: str) -> str:
    """The `<svg>` element alone: no document type, which a browser would look up, and no metadata."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text.replace("<svg ", '<svg role="img" ', 1)


def _is_draw(condition: ConditionResult, name: str) -> bool:
    stem, _, number = condition.name.rpartition("-")
    return stem == name and number.isdecimal()


def _layer(pair: Mapping[str, JsonValue], side: str) -> int | None:
    value = pair.get(side)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _plain(text: str) -> str:
    """Text that fonts can draw: names come from bundles of strangers."""
    return "".join(char if char.isprintable() and ord(char) < 0x250 else "?" for char in text)[:60]
