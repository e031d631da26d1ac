"""Figures of a run as tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from blocks import Block, Pair
from ratios import Array, Interval, Samples, ratio_of_percentiles, ratio_of_rounds
from rich.table import Table
from turn import Workload

PERCENTILES = (50, 99)


@dataclass(frozen=True)
class Comparison:
    """Ratios of one variant to another.

    `cpu_time` counts the processor time of the engine process, which other people's jobs disturb less than the clock;
    it says nothing about a GPU. Of `ttft` and `tpot`: p50 and p99 over requests.
    """

    workload: str
    pair: Pair
    throughput: Interval
    cpu_time: Interval
    ttft: tuple[Interval, Interval]
    tpot: tuple[Interval, Interval]

    @property
    def verdict(self) -> str:
        """Whether the interval is above or below the goal, or holds it."""
        goal, interval = self.pair.goal, self.throughput
        if goal is None:
            return "within noise" if interval.low <= 1 <= interval.high else f"{interval.estimate - 1:+.1%}"
        if interval.low >= goal:
            return f">= {goal} met"
        return f">= {goal} {'missed' if interval.high < goal else 'open'}"


@dataclass(frozen=True)
class Times:
    """Absolute figures of one variant; pairs are p50 and p99."""

    workload: str
    variant: str
    tokens_per_s: float
    ttft_ms: tuple[float, float]
    tpot_ms: tuple[float, float]


def compare(block: Block, samples: Mapping[str, Samples]) -> list[Comparison]:
    """Comparisons of a block from the samples of its variants, by name."""
    comparisons = []
    for pair in block.pairs:
        ours, theirs = samples[pair.ours], samples[pair.theirs]
        comparisons.append(
            Comparison(
                str(block.workload),
                pair,
                throughput=ratio_of_rounds(theirs.seconds, ours.seconds),
                cpu_time=ratio_of_rounds(ours.cpu_seconds, theirs.cpu_seconds),
                ttft=_percentile_ratios(ours.ttft, theirs.ttft),
                tpot=_percentile_ratios(ours.tpot, theirs.tpot),
            )
        )
    return comparisons


def times_of(workload: Workload, variant: str, samples: Samples) -> Times:
    """Absolute figures of a variant."""
    tokens_per_s = workload.batch * workload.output_tokens / float(np.median(samples.seconds))
    return Times(str(workload), variant, tokens_per_s, _percentiles_ms(samples.ttft), _percentiles_ms(samples.tpot))


def settings_table(settings: Mapping[str, str]) -> Table:
    """What was run on what."""
    table = Table(title="Steering overhead", show_header=False)
    for name, value in settings.items():
        table.add_row(name, value)
    return table


def throughput_table(comparisons: Sequence[Comparison]) -> Table:
    """Throughput against the goals."""
    table = _table(
        "Throughput, ratio [95 % interval]",
        "throughput: more is better; CPU time: less. open: the goal is inside the interval; within noise: 1 is",
        ("throughput", "goal", "CPU time"),
    )
    for row in comparisons:
        table.add_row(row.workload, _name(row.pair), str(row.throughput), row.verdict, str(row.cpu_time))
    return table


def latency_table(comparisons: Sequence[Comparison]) -> Table:
    """Latency, where less is better."""
    table = _table(
        "Latency, ratio [95 % interval]",
        "less is better. TTFT: arrival to first token; TPOT: mean time per further token of a request",
        ("TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99"),
    )
    for row in comparisons:
        table.add_row(row.workload, _name(row.pair), *map(str, (*row.ttft, *row.tpot)))
    return table


def times_table(times: Sequence[Times]) -> Table:
    """Absolute figures, for orientation."""
    table = _table(
        "For orientation: absolute figures of this run", "p50 / p99", ("generated tokens/s", "TTFT ms", "TPOT ms")
    )
    for row in times:
        ttft, tpot = (f"{p50:.1f} / {p99:.1f}" for p50, p99 in (row.ttft_ms, row.tpot_ms))
        table.add_row(row.workload, row.variant, f"{row.tokens_per_s:.1f}", ttft, tpot)
    return table


def _table(title: str, caption: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, caption=f"{caption}\nworkload: requests at a time x prompt tokens + generated tokens")
    for name in ("workload", ""):
        table.add_column(name, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _name(pair: Pair) -> str:
    return f"{pair.ours} / {pair.theirs}"


def _percentile_ratios(ours: Array, theirs: Array) -> tuple[Interval, Interval]:
    p50, p99 = (ratio_of_percentiles(ours, theirs, percentile) for percentile in PERCENTILES)
    return p50, p99


def _percentiles_ms(seconds: Array) -> tuple[float, float]:
    p50, p99 = 1e3 * np.percentile(seconds, PERCENTILES)
    return float(p50), float(p99)
