"""A bundle as text for people."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import JsonValue
    from rich.console import Console

    from artifacts.bundle import Bundle
    from artifacts.manifest import Intervention, ModelIdentity, Trigger

_LABEL_WIDTH = 12
_MAX_GROUP_ROWS = 6
_MAX_LIST = 4


def print_bundle(console: "Console", bundle: "Bundle") -> None:
    """Print what a bundle holds. Nothing in it can format or drive the terminal."""
    manifest = bundle.manifest
    for label, value in (
        ("identity", bundle.digest),
        ("size", f"{bundle.num_bytes} bytes"),
        ("name", manifest.name),
        ("description", manifest.description or "-"),
        ("licence", manifest.licence or "-"),
        ("target", _model_line(manifest.target)),
        ("expert", _model_line(manifest.expert) if manifest.expert else "-"),
        ("strength", f"{manifest.recommended_strength:g} recommended, {manifest.maximum_strength:g} at most"),
        ("scope", manifest.scope.value),
        ("exclude", ", ".join(manifest.exclude) or "-"),
        ("data", manifest.data_digest or "-"),
        ("seed", str(manifest.seed)),
        ("versions", ", ".join(f"{tool} {number}" for tool, number in sorted(manifest.tool_versions.items())) or "-"),
    ):
        console.print(f"{label:<{_LABEL_WIDTH}}{printable(value)}", soft_wrap=True, markup=False, emoji=False)
    steps = [line for step in manifest.interventions for line in _step_lines(bundle, step)]
    triggers = [(gate, _trigger(trigger)) for gate, trigger in manifest.triggers.items()]
    pairs = [(str(pair.expert), str(pair.target), _pairs(pair.scores)) for pair in manifest.layer_pairs]
    evidence = [
        (entry.name, "x".join(map(str, entry.shape)) or "scalar", entry.dtype, str(entry.num_bytes))
        for entry in bundle.evidence
    ]
    _print_table(console, "Interventions", ("layer", "kind", "row", "norm", "parameters"), steps)
    _print_table(console, "Triggers", ("gate", "tokens"), triggers)
    _print_table(console, "Layer pairs", ("expert", "target", "scores"), pairs)
    _print_table(console, "Evidence tensors", ("name", "shape", "dtype", "bytes"), evidence)
    _print_table(console, "Evaluation", ("measure", "value"), _evaluation(manifest.evaluation))


def _step_lines(bundle: "Bundle", step: "Intervention") -> list[tuple[str, ...]]:
    """One line per runtime tensor of an intervention; what belongs to all of them is in the first."""
    from artifacts.rows import row_norms

    first: tuple[str, ...] = (str(step.layer), step.kind, ", ".join(_choices(step)) or "-")
    lines: list[tuple[str, ...]] = []
    for name in step.tensors:
        layer, kind, choices = ("", "", "") if lines else first
        norms = ", ".join(f"{norm:.6g}" for norm in row_norms(bundle.rows[name]))
        lines.append((layer, kind, name, norms, choices))
    return lines


def _choices(step: "Intervention") -> Iterator[str]:
    for name, value in (*step.parameters.said().items(), ("keep_norm", step.keep_norm)):
        if isinstance(value, bool):
            yield from [name] * value
        else:
            yield f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
    if step.gate is not None:
        yield f"gate {step.gate}"
    if step.sets is not None:
        yield f"sets {step.sets}"


def _trigger(trigger: "Trigger") -> str:
    if trigger.token_ids is None:
        return f"those that contain {trigger.text_contains!r}"
    shown = ", ".join(map(str, trigger.token_ids[:_MAX_LIST]))
    hidden = len(trigger.token_ids) - _MAX_LIST
    return f"{shown} and {hidden} more, see --json" if hidden > 0 else shown


def _model_line(model: "ModelIdentity") -> str:
    """Return one line; the digests follow the sizes because they are what people compare last."""
    line = f"{model.id} ({model.architecture}, hidden size {model.hidden_size}, {model.num_layers} layers"
    for label, value in (
        ("revision", model.revision),
        ("weights", model.fingerprint),
        ("tokenizer", model.tokenizer_digest),
    ):
        line += f", {label} {value}" if value else ""
    return f"{line})"


def _pairs(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in values.items()) or "-"


def _evaluation(results: "Mapping[str, JsonValue]") -> list[tuple[str, str]]:
    """Rows for people: the figures on the test split in full, of every other group the shallowest ones."""
    rows: list[tuple[str, str]] = []
    for key in sorted(results, key=lambda name: (name != "test", name)):
        group = sorted(_leaves(results[key], key), key=lambda row: row[0].count("."))
        shown = group if key == "test" else group[:_MAX_GROUP_ROWS]
        rows += shown
        if len(shown) < len(group):
            rows.append((f"{key}...", f"{len(group) - len(shown)} more values, see --json"))
    return rows


def _leaves(value: "JsonValue", path: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted path, value) for every leaf; a long list is one leaf that tells its length."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _leaves(child, f"{path}.{key}")
    elif isinstance(value, list) and len(value) > _MAX_LIST:
        yield path, f"{len(value)} entries, see --json"
    else:
        yield path, value if isinstance(value, str) else json.dumps(value)


def _print_table(console: "Console", title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print one section. Cells are plain text: a bundle's author must not format the reader's terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    table = Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False)
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print()
    console.print(table)


def printable(text: str) -> str:
    """Return `text` with control and direction-changing characters escaped, so that it cannot drive the terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
