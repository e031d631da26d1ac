"""The figures as one table, for the terminal and for Markdown."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from server.bench.figures import PERCENTILES, ArmFigures, Figures
from server.bench.plan import UNSTEERED, Plan
from server.bench.ratios import Interval
from server.commands.connection import printable

CAPTION = (
    "ratio: steered / unsteered [95 % interval]; an interval that holds 1 shows no difference.\n"
    "TTFT: time to the first token; TPOT: mean time of a further token; ITL: time between two; E2E: whole answer."
)
_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e": "E2E"}
_NOTHING = "-"


class Section(NamedTuple):
    """Rows of one rate; a row has its name, one value of each arm and one ratio of each profile."""

    rate: str
    rounds: str
    rows: list[list[str]]


def columns(plan: Plan) -> list[str]:
    """Names of the columns of a row."""
    return ["", *plan.arms, *(f"{arm} / {UNSTEERED}" for arm in plan.profiles)]


def sections(plan: Plan, figures: Figures) -> list[Section]:
    """All rows, by rate."""
    found = []
    for rate in figures.num_rounds:
        arms = figures.at(rate)
        rows = [
            _row(
                "output tokens/s",
                [f"{arm.output_tokens_per_s:.1f}" for arm in arms],
                _ratios(figures, arms, "throughput"),
            )
        ]
        for name, label in _NAMES.items():
            for percentile in PERCENTILES:
                values = [_milliseconds(arm.percentile_ms(name, percentile)) for arm in arms]
                # Times between tokens belong to no request, so that there is nothing to pair.
                ratios = [] if name == "itl" else _ratios(figures, arms, f"{name}_p{percentile}")
                rows.append(_row(f"{label} p{percentile}, ms", values, ratios or [_NOTHING] * len(plan.profiles)))
        failed = [f"{arm.num_failed} of {arm.num_completed + arm.num_failed}" for arm in arms]
        rows.append(_row("failed requests", failed, [_NOTHING] * len(plan.profiles)))
        found.append(Section(rate_text(rate), _rounds(plan, figures.num_rounds[rate]), rows))
    return found


def terminal_table(plan: Plan, figures: Figures) -> Table:
    """For `rich`. No cell can format or drive the terminal."""
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for name in columns(plan):
        table.add_column(Text(printable(name)), justify="right" if name else "left", overflow="fold")
    for section in sections(plan, figures):
        table.add_row(Text(section.rate, style="bold"))
        for row in section.rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        table.add_section()
    return table


def markdown_tables(plan: Plan, figures: Figures) -> str:
    """One table for each rate."""
    head = [_cell(name) for name in columns(plan)]
    parts = []
    for section in sections(plan, figures):
        lines = [head, ["---", *["---:"] * (len(head) - 1)], *([_cell(cell) for cell in row] for row in section.rows)]
        parts.append(
            f"## {section.rate}, {section.rounds}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
        )
    return "\n".join(parts)


def rate_text(rate: float) -> str:
    """How a rate is written."""
    return "all at once" if math.isinf(rate) else f"{rate:g} requests/s"


def _rounds(plan: Plan, num_rounds: int) -> str:
    return f"{num_rounds} round{'' if num_rounds == 1 else 's'} of {plan.num_prompts} requests"


def _row(name: str, values: Sequence[str], ratios: Sequence[str]) -> list[str]:
    return [name, *values, *ratios]


def _ratios(figures: Figures, arms: Sequence[ArmFigures], name: str) -> list[str]:
    return [_interval(figures.ratio(arm.rate, arm.arm, name)) for arm in arms if arm.arm != UNSTEERED]


def _interval(interval: Interval | None) -> str:
    return _NOTHING if interval is None else str(interval)


def _milliseconds(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.1f}"


def _cell(text: str) -> str:
    return printable(text).replace("\\", "\\\\").replace("|", "\\|")
