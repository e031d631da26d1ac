"""Tables of the chart's values in its README, from values.schema.json and values.yaml.

python deploy/helm/values_table.py          writes them
python deploy/helm/values_table.py --check  exits with 1 when the README has others
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

CHART = Path(__file__).parent / "expertsteer"
BEGIN, END = "<!-- values: written by deploy/helm/values_table.py -->", "<!-- end of values -->"
# Its fields are those of the section `steering`.
_LISTED_ELSEWHERE = "servingEngineSpec.modelSpec[].steering"


class Field(NamedTuple):
    """One value: its path, its schema, and its default, or None where it has none."""

    path: str
    schema: dict[str, Any]
    default: Any


def fields(schema: dict[str, Any], values: dict[str, Any]) -> list[Field]:
    """Every value that the schema names, in its order."""
    return list(_walk(schema, schema, values, ""))


def _walk(root: dict[str, Any], schema: dict[str, Any], values: Any, prefix: str) -> Iterator[Field]:
    for name, child in schema.get("properties", {}).items():
        default = values.get(name) if isinstance(values, dict) else None
        resolved = _resolve(root, child)
        path = f"{prefix}{name}"
        if resolved.get("type") == "object" and "properties" in resolved and path != _LISTED_ELSEWHERE:
            yield from _walk(root, resolved, default, f"{path}.")
        elif "$ref" in resolved.get("items", {}):
            yield Field(path, resolved, default)
            yield from _walk(root, _resolve(root, resolved["items"]), None, f"{path}[].")
        else:
            yield Field(path, resolved, default)


def _resolve(root: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    for reference in [schema, *schema.get("allOf", [])]:
        if "$ref" in reference:
            found = root["definitions"][reference["$ref"].rpartition("/")[2]]
            return {**found, **{key: value for key, value in schema.items() if key not in ("$ref", "allOf")}}
    return schema


def remedy(schema: dict[str, Any]) -> str | None:
    """What to do instead of a field that is only there to be refused; None for one that is supported."""
    for part in (schema, schema.get("else")):
        if isinstance(part, dict) and isinstance(part.get("const"), str):
            return str(part["const"])
    return None


def tables(schema: dict[str, Any], values: dict[str, Any]) -> str:
    """Both tables in Markdown: what can be set, and what is refused."""
    known = fields(schema, values)
    lines = ["| value | default | meaning |", "|---|---|---|"]
    lines += [
        f"| `{field.path}` | {_default(field.default)} | {_cell(_meaning(field.schema))} |"
        for field in known
        if remedy(field.schema) is None
    ]
    lines += [
        "",
        "Fields of the production stack that are refused, with the message:",
        "",
        "| value | message |",
        "|---|---|",
    ]
    lines += [f"| `{field.path}` | {_cell(text)} |" for field in known if (text := remedy(field.schema)) is not None]
    return "\n".join(lines)


def _meaning(schema: dict[str, Any]) -> str:
    choices = schema.get("enum") or schema.get("items", {}).get("enum")
    return f"{schema['description']}{f' One of: {_list(choices)}.' if choices else ''}"


def _list(choices: list[Any]) -> str:
    return ", ".join(f"`{each}`" for each in choices)


def _default(value: Any) -> str:
    return "" if value is None or value in ("", {}, []) else f"`{_cell(json.dumps(value))}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(arguments: list[str]) -> int:
    """Write the tables, or compare them."""
    readme = CHART / "README.md"
    text = readme.read_text()
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = f"{before}{BEGIN}\n{tables(schema, values)}\n{END}{after}"
    if "--check" in arguments:
        return int(text != wanted)
    readme.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
