"""Fields of a pydantic model, as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

from docs.render.markdown import code, prose, table

# Keys of a lower bound, of an upper one, and what they count.
_RANGES = (("minimum", "maximum", ""), ("minLength", "maxLength", " characters"), ("minItems", "maxItems", " items"))
_EXCLUSIVE = {"exclusiveMinimum": "over", "exclusiveMaximum": "under"}


def fields_table(schema: Mapping[str, Any], only: Sequence[str] | None = None) -> str:
    """Fields of an object.

    Args:
        schema: JSON schema of the object.
        only: names of the fields to show; None for all.
    """
    required = schema.get("required", ())
    fields = {name: field for name, field in schema["properties"].items() if only is None or name in only}
    described = any("description" in field for field in fields.values())
    rows = []
    for name, field in fields.items():
        default = "required" if name in required else _default(field)
        row = [code(name), type_of(field), default]
        rows.append([*row, prose(field.get("description", ""))] if described else row)
    columns = ("field", "type", "default", "meaning")
    return table(columns if described else columns[:3], rows)


def type_of(field: Mapping[str, Any]) -> str:
    """Type of a field in few words, with its bounds."""
    if "$ref" in field:
        return code(field["$ref"].rpartition("/")[2])
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(type_of(choice) for choice in field["anyOf"]))
    if "const" in field:
        return code(str(field["const"]))
    if "enum" in field:
        return ", ".join(code(str(choice)) for choice in field["enum"])
    kind = field.get("type", "any JSON value")
    if kind == "array":
        items = field.get("items", {})
        text = f"list of {type_of(items)}" if items else "list"
    elif kind == "object":
        values = field.get("additionalProperties")
        text = f"object of {type_of(values)}" if isinstance(values, Mapping) and values else "object"
    else:
        text = {"string": "text", "null": "null", "integer": "whole number"}.get(kind, kind)
    if field.get("format") == "date-time":
        text = "time"
    bounds = [range_text for keys in _RANGES if (range_text := _range(field, *keys))]
    bounds += [f"{word} {_number(field[key])}" for key, word in _EXCLUSIVE.items() if key in field]
    if "pattern" in field:
        bounds.append(code(field["pattern"]))
    return f"{text} ({', '.join(bounds)})" if bounds else text


def _range(field: Mapping[str, Any], lower: str, upper: str, unit: str) -> str:
    if lower in field and upper in field:
        return f"{_number(field[lower])} to {_number(field[upper])}{unit}"
    if lower in field:
        return f"{_number(field[lower])}{unit} or more"
    return f"at most {_number(field[upper])}{unit}" if upper in field else ""


def _default(field: Mapping[str, Any]) -> str:
    if "default" not in field:
        return ""
    value = field["default"]
    # What a schema of JSON cannot say otherwise: a field that says nothing.
    return "" if value in (None, "", [], {}) else code(str(value).lower() if isinstance(value, bool) else str(value))


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and value < 1e15 else str(value)
