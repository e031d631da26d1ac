"""A report on the terminal."""

from typing import Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from artifacts.evaluation.schema import ConditionResult, Report
from artifacts.evaluation.statistics import Interval

_FIGURES: Final = ("expert", "gap_closed.expert", "gap_closed.prompt", "clas", "axbench", "spearman")


def print_report(report: Report, console: Console) -> None:
    """Print conditions, chance, tests and gates. Cells are plain text: names come from bundles of strangers."""
    console.print(_conditions(report))
    if report.comparisons:
        console.print(_tests(report))
    for name in _FIGURES:
        if name in report.figures:
            console.print(f"{name} {report.figures[name]:.3f}")
    for name, reason in report.not_measured.items():
        console.print(Text(_printable(f"not measured: {name}: {reason}")), soft_wrap=True)
    for gate in report.gates:
        console.print(Text(_printable(f"gate {gate}")), soft_wrap=True)


def _conditions(report: Report) -> Table:
    count = sum(each.task == "target" for each in report.questions)
    columns = ("condition", "strength", "accuracy", "95 %", "perplexity", "retention")
    table = _table(f"{report.about.name}: {count} questions", *columns)
    drawn = tuple(f"{each.name}-" for each in report.draws)
    for each in report.conditions:
        if not each.name.startswith(drawn):
            _row(table, *_condition(each))
    for draw in report.draws:
        _row(table, draw.name, f"mean of {draw.count}", f"{draw.mean.value:.3f}", _bounds(draw.mean))
        _row(table, "", "best", f"{draw.maximum:.3f}")
    return table


def _tests(report: Report) -> Table:
    table = _table("Steered against", "condition", "difference", "95 %", "McNemar p", "Holm p")
    for each in report.comparisons:
        p_values = f"{each.p_value:.2g}", f"{each.p_holm:.2g}"
        _row(table, each.against, f"{each.difference.value:+.3f}", _bounds(each.difference, "+.3f"), *p_values)
    for draw in report.draws:
        difference = draw.difference
        rank = f"rank {draw.p_value:.2g}"
        _row(table, f"{draw.name}, mean", f"{difference.value:+.3f}", _bounds(difference, "+.3f"), rank)
    return table


def _condition(each: ConditionResult) -> tuple[str, ...]:
    return (
        each.name,
        f"{each.strength:g}" if each.vector else "-",
        f"{each.accuracy.value:.3f}",
        _bounds(each.accuracy),
        "-" if each.perplexity_ratio is None else f"x{each.perplexity_ratio.value:.3f}",
        "-" if each.retention is None else f"{each.retention.value:.3f}",
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(_printable(title)), title_justify="left", box=SIMPLE_HEAD, show_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table


def _row(table: Table, *cells: str) -> None:
    table.add_row(*(Text(_printable(cell)) for cell in cells))


def _bounds(each: Interval, form: str = ".3f") -> str:
    return f"{each.low:{form}} {each.high:{form}}"


def _printable(text: str) -> str:
    """Control and direction-changing characters escaped, so that a text cannot drive the terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
