"""The folder of results: `bench.json`, `bench.md`, `bench.svg`, `bench.png`, `turns.jsonl` and `client.log`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from artifacts.errors import quoted
from server.bench.client import BenchError
from server.bench.figures import PERCENTILES, TIMES, ArmFigures, Figures
from server.bench.measured import Array, Measured
from server.bench.plan import Plan
from server.bench.plot import plot
from server.bench.table import CAPTION, markdown_tables
from server.schema import Receipt

LOG = "client.log"
_TURNS = "turns.jsonl"
_REPORT, _TABLES, _PLOTS = "bench.json", "bench.md", ("bench.svg", "bench.png")
# A microsecond: clocks of clients are not finer.
_DECIMALS = 6


def make_folder(folder: Path) -> None:
    """Make the folder, before anything is measured.

    Raises:
        BenchError: it holds a result already.
        OSError: it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any((folder / name).exists() for name in (_TURNS, _REPORT, _TABLES, *_PLOTS)):
        raise BenchError(f"{quoted(str(folder), 200)} holds a result already; choose another folder with -o.")
    (folder / _TURNS).touch()


def add_turn(folder: Path, turn: Measured) -> None:
    """Keep a turn, whatever comes after it."""
    line = {
        "rate": _rate(turn.turn.rate),
        "round": turn.turn.round,
        "arm": turn.turn.arm,
        "duration_s": turn.duration_s,
        "num_output_tokens": turn.num_output_tokens,
        "tokens_steered": turn.tokens_steered,
        "ttft_s": _times(turn.ttft_s),
        "tpot_s": _times(turn.tpot_s),
        "e2e_s": _times(turn.e2e_s),
        "itl_s": _times(turn.itl_s),
        "errors": list(turn.errors),
    }
    with (folder / _TURNS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def write_report(
    folder: Path,
    plan: Plan,
    figures: Figures,
    receipts: Mapping[str, Receipt],
    notes: Sequence[str],
    about: Mapping[str, str],
) -> None:
    """Write figures, tables and plot.

    Args:
        folder: that `make_folder` has made.
        plan: what was run.
        figures: of it.
        receipts: of each profile.
        notes: what a reader must know besides.
        about: versions of the server.
    """
    report = {
        "plan": asdict(plan) | {"rates": [_rate(rate) for rate in plan.rates]},
        "server": dict(about),
        "receipts": {arm: receipt.to_json() for arm, receipt in receipts.items()},
        "notes": list(notes),
        "arms": [_arm(figures, arm) for arm in figures.arms],
        "ratios": [
            {"rate": _rate(ratio.rate), "arm": ratio.arm, "figure": ratio.name}
            | ({} if ratio.interval is None else ratio.interval._asdict())
            for ratio in figures.ratios
        ],
    }
    (folder / _REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / _TABLES).write_text(_markdown(plan, figures, receipts, notes, about), encoding="utf-8")
    if figures.num_rounds:
        plot(figures, title(plan), [folder / name for name in _PLOTS])


def title(plan: Plan) -> str:
    """One line about what was measured."""
    return f"{plan.model}: {plan.input_tokens} prompt tokens, {plan.output_tokens} generated tokens"


def _markdown(
    plan: Plan, figures: Figures, receipts: Mapping[str, Receipt], notes: Sequence[str], about: Mapping[str, str]
) -> str:
    facts = [f"{name} {value}" for name, value in about.items()]
    steered = [
        f"`{receipt.profile}`: bundle `{receipt.bundle}`, strength {receipt.strength:g}, scope {receipt.scope.value}, "
        f"layers {', '.join(map(str, receipt.layers))}"
        for receipt in receipts.values()
    ]
    lines = [f"- {line}" for line in (*([", ".join(facts)] if facts else []), *steered, *notes)]
    parts = [f"# {title(plan)}", "\n".join(lines), markdown_tables(plan, figures), CAPTION]
    if figures.num_rounds:
        parts.append(f"![distributions of TTFT and TPOT]({_PLOTS[0]})")
    return "\n\n".join(parts) + "\n"


def _arm(figures: Figures, arm: ArmFigures) -> dict[str, Any]:
    times = {
        f"{name}_ms": {f"p{percentile}": arm.percentile_ms(name, percentile) for percentile in PERCENTILES}
        for name in (*TIMES, "itl")
    }
    return {
        "rate": _rate(arm.rate),
        "arm": arm.arm,
        "num_rounds": figures.num_rounds[arm.rate],
        "num_completed": arm.num_completed,
        "num_failed": arm.num_failed,
        "requests_per_s": arm.requests_per_s,
        "output_tokens_per_s": arm.output_tokens_per_s,
        "tokens_steered": arm.tokens_steered,
        **times,
        "errors": dict(arm.errors),
    }


def _rate(rate: float) -> float | str:
    """JSON has no infinity."""
    return "inf" if math.isinf(rate) else rate


def _times(values: Array) -> list[float | None]:
    """JSON has no NaN."""
    return [None if np.isnan(value) else round(float(value), _DECIMALS) for value in values]
