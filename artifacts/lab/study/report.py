"""What the study leaves: tables on the terminal, a JSON file and the plot."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Final

from rich.console import Console
from rich.table import Table

from artifacts.lab.study.comparison import Comparison, accuracies, chosen_estimator, mean_interval
from artifacts.lab.study.efficiency import TargetRecord
from artifacts.lab.study.estimator import Estimator
from artifacts.lab.study.plot import draw_plot
from artifacts.lab.study.regime import LABEL_COUNTS, REGIMES
from artifacts.lab.study.source import LABEL_SOURCES, Source
from artifacts.lab.study.verdict import Point, points, verdict

JSON_NAME: Final = "labels.json"
PLOT_NAME: Final = "labels.svg"

_SCHEMA: Final = 1
_PACKAGES: Final = ("torch", "transformers", "scikit-learn", "xrfm", "numpy")


def write_report(records: Sequence[TargetRecord], comparisons: Sequence[Comparison], out: Path) -> list[Path]:
    """Write the JSON and the plot into `out`; returns their paths."""
    value = {
        "schema": _SCHEMA,
        "versions": versions(),
        "verdict": verdict(records, comparisons),
        "comparisons": [asdict(each) | {"difference": each.difference._asdict()} for each in comparisons],
        "targets": [asdict(record) for record in records],
    }
    paths = [out / JSON_NAME, out / PLOT_NAME]
    paths[0].write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    draw_plot(records, paths[1])
    return paths


def versions() -> dict[str, str]:
    """Versions of the packages that the figures depend on."""
    return {package: version(package) for package in _PACKAGES}


def show_report(records: Sequence[TargetRecord], comparisons: Sequence[Comparison], console: Console) -> None:
    """Print every table and the verdict."""
    console.print(_levels(records))
    console.print(_by_source(records))
    console.print(_chosen(records))
    console.print(_by_estimator(records))
    console.print(_labellings(records))
    console.print(_comparisons(points(comparisons), len(records)))
    console.print(verdict(records, comparisons), highlight=False)


def _levels(records: Sequence[TargetRecord]) -> Table:
    names = ("not steered", "random mean", "random max", "own, all labels", "expert mapped, all labels")
    table = Table("target", "expert", "layers", *names, title="Right greedy answers on the test facts")
    for record in records:
        figures = (record.unsteered, fmean(record.random), max(record.random), record.own_all, record.mapped_all)
        layers = ", ".join(f"{name} {layer}" for name, layer in record.layers.items())
        table.add_row(record.target, record.expert, layers, *(f"{each:.3f}" for each in figures))
    return table


def _by_source(records: Sequence[TargetRecord]) -> Table:
    table = Table(
        "regime",
        "labels",
        *map(str, Source),
        title="Mean over targets and draws by the chosen estimator (see below), 95 % interval",
    )
    for regime in REGIMES:
        for labels in regime.counts:
            cells = []
            for source in Source:
                values = accuracies(records, regime.name, labels, source)
                cells.append("" if values is None else "{:.2f} [{:.2f}, {:.2f}]".format(*mean_interval(values)))
            table.add_row(regime.title, str(labels), *cells, end_section=labels == regime.counts[-1])
    return table


def _chosen(records: Sequence[TargetRecord]) -> Table:
    table = Table("regime", *map(str, Source), title="Estimator of each source: best on the tuning facts")
    for regime in REGIMES:
        most = max(regime.counts)
        table.add_row(regime.title, *(chosen_estimator(records, regime.name, most, source) or "" for source in Source))
    return table


def _by_estimator(records: Sequence[TargetRecord]) -> Table:
    tried = (Estimator.DIFFERENCE, Estimator.LOGISTIC, Estimator.RFM)
    columns = [f"{estimator} {what}" for estimator in tried for what in ("accuracy", "cosine, AUC")]
    table = Table(
        "regime", "labels", "source", *columns, title="Estimators; cosine with the own direction from all labels"
    )
    for regime in REGIMES:
        for labels in regime.counts if regime.counts == LABEL_COUNTS else ():
            for source in (Source.OWN, Source.MAPPED, Source.UNTRAINED):
                cells = [
                    cell for estimator in tried for cell in _cells(records, regime.name, labels, source, estimator)
                ]
                table.add_row(regime.name, str(labels), str(source), *cells)
    return table


def _labellings(records: Sequence[TargetRecord]) -> Table:
    columns = ("accuracy", "cosine, AUC", "refused by the guard rails")
    table = Table(
        "regime", "labels", "source", *columns, title="Labellers; where refused, the figures show what was avoided"
    )
    for regime in REGIMES:
        for labels in regime.counts:
            for source in LABEL_SOURCES:
                cells = _cells(records, regime.name, labels, source, Estimator.MATCHED)
                refused = [
                    each.refused
                    for record in records
                    for each in record.conditions
                    if (each.regime, each.labels, each.source) == (regime.name, labels, str(source))
                ]
                if refused:
                    table.add_row(regime.name, str(labels), str(source), *cells, f"{fmean(refused):.0%}")
    return table


def _cells(
    records: Sequence[TargetRecord], regime: str, labels: int, source: Source, estimator: Estimator
) -> tuple[str, str]:
    found = [
        each
        for record in records
        for each in record.conditions
        if (each.regime, each.labels, each.source, each.estimator) == (regime, labels, str(source), str(estimator))
    ]
    if not found:
        return "", ""
    cosines, areas = (
        [value for each in found if (value := getattr(each, name)) is not None] for name in ("cosine", "auc")
    )
    placed = f"{fmean(cosines):.2f}, {fmean(areas):.2f}" if cosines else ""
    return f"{fmean(fmean(each.accuracies) for each in found):.3f}", placed


def _comparisons(judged: Sequence[Point], num_targets: int) -> Table:
    table = Table(
        "regime",
        "labels",
        "way",
        "rival",
        "difference",
        "p (Holm)",
        "targets ahead",
        "pays",
        title="The expert against what does without",
    )
    titles = {regime.name: regime.title for regime in REGIMES}
    for point in judged:
        for each in point.comparisons:
            table.add_row(
                titles[point.regime],
                str(point.labels),
                str(point.route),
                str(each.rival),
                "{:+.3f} [{:+.3f}, {:+.3f}]".format(*each.difference),
                f"{each.adjusted:.4f}",
                f"{each.targets_ahead} of {num_targets}",
                ("yes" if point.pays else "no") if each is point.comparisons[-1] else "",
                end_section=each is point.comparisons[-1],
            )
    return table
