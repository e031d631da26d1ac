"""The figures of a manifest as Markdown tables: one row per measurement, one column per quantity."""

from collections.abc import Iterator, Mapping

from pydantic import JsonValue

from artifacts.interchange.markdown import escaped, table

# Groups of a manifest's `evaluation` that people look for first, and how they are called.
GROUPS = {
    "test": "On the test split",
    "controls": "Controls",
    "gates": "Declared gates",
    "source": "Where the vectors come from",
}
_MAX_ROWS = 60
_MAX_COLUMNS = 8


def figure_tables(results: Mapping[str, JsonValue]) -> list[str]:
    """Return a captioned table for each group of `GROUPS` that has figures.

    A group maps names of measurements to numbers or to mappings of quantities. A list of two numbers is an interval.
    Quantities deeper down get dotted names; what does not fit a table of a readable size is counted.
    """
    tables = []
    for key, title in GROUPS.items():
        group = results.get(key)
        if isinstance(group, dict) and group:
            tables.append(f"**{title}**\n\n{_group_table(group)}")
    return tables


def _group_table(group: Mapping[str, JsonValue]) -> str:
    rows = {name: dict(_cells(value, "")) for name, value in group.items()}
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    # "value" holds plain numbers and texts and reads best in front.
    columns.sort(key=lambda column: column != "value")
    shown, names = columns[:_MAX_COLUMNS], list(rows)[:_MAX_ROWS]
    lines = [[_words(name), *(rows[name].get(column, "") for column in shown)] for name in names]
    left = len(rows) - len(names) + len(columns) - len(shown)
    more = f"\n\n{left} more rows or columns are left out here." if left else ""
    return table(["", *map(_words, shown)], lines, numbers=True) + more


def _cells(value: JsonValue, path: str) -> Iterator[tuple[str, str]]:
    """Yield (quantity, Markdown) for every leaf under a measurement."""
    if isinstance(value, dict):
        for name, child in value.items():
            yield from _cells(child, f"{path}.{name}" if path else name)
    elif value is not None:
        yield path or "value", _shown(value)


def _shown(value: JsonValue) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    if isinstance(value, list):
        if len(value) == 2 and all(isinstance(bound, int | float) for bound in value):
            return f"{_shown(value[0])} to {_shown(value[1])}"
        return f"{len(value)} entries"
    return escaped(str(value))


def _words(name: str) -> str:
    return escaped(name.replace("_", " "))
