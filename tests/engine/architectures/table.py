"""The table of architectures, in Markdown."""

from collections.abc import Iterable, Sequence

from comparison import Comparison, Row
from edits import KINDS, kind_of

_HEAD = ("Architecture", "Steered by", *(f"`{kind}`" for kind in KINDS), "all kinds", "unsteered", "effect")


def header() -> str:
    """The first two lines: what the columns are."""
    return f"{_line(_HEAD)}\n{_line(['---'] * len(_HEAD))}"


def line(name: str, comparison: Comparison) -> str:
    """One architecture: largest error of each kind and of unsteered requests, smallest effect of a steered one."""
    fused, rows = comparison.status["fused_layers"], comparison.rows
    by_kind = [_largest_error(row for row in rows if row.bundle and kind_of(row.bundle) == kind) for kind in KINDS]
    together = _largest_error(row for row in rows if row.bundle and kind_of(row.bundle) is None)
    unsteered = _largest_error(row for row in rows if row.bundle is None)
    effect = min(row.effect for row in rows if row.bundle)
    how = "the next RMSNorm" if fused else "in place"
    return _line([name, how, *by_kind, together, unsteered, f"{effect:.2f}"])


def refused_line(name: str) -> str:
    """One architecture that the engine refuses at start."""
    return _line([name, "refused at start", *[""] * (len(_HEAD) - 2)])


def _largest_error(rows: Iterable[Row]) -> str:
    return f"{max(row.error for row in rows):.0e}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
