"""`expertsteer bundle inspect|verify FILE`: look into a bundle, or prove that it may be served."""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pydantic import JsonValue
    from rich.console import Console

    from artifacts.bundle import Bundle
    from artifacts.manifest import ModelIdentity

HELP = "Inspect or verify a bundle file."
_LABEL_WIDTH = 12
_MAX_GROUP_ROWS = 6
_MAX_LIST = 4
_WORDS = {"passed": "ok", "failed": "FAIL", "not_run": "not run"}


class Check(NamedTuple):
    """One line of `verify`: `status` is passed, failed or not_run; `found` is what was seen, or why it failed."""

    check: str
    status: str
    found: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the two actions and their options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    inspect = actions.add_parser("inspect", help="print what a bundle holds")
    verify = actions.add_parser("verify", help="run every check; exit status 0 when all pass, 1 otherwise")
    for action in (inspect, verify):
        action.add_argument("file", type=Path, metavar="FILE", help="the bundle, a .safetensors file")
        action.add_argument("--json", action="store_true", help="print JSON instead of text")
    verify.add_argument("--model", type=Path, metavar="DIR", help="also check that it belongs to the model in DIR")


def run(args: argparse.Namespace) -> int:
    """Run the chosen action and return the exit status."""
    if args.action == "verify":
        return _verify(args.file, args.model, args.json)
    return _inspect(args.file, args.json)


def _inspect(path: Path, as_json: bool) -> int:
    from artifacts.bundle import BundleError, load_bundle

    try:
        bundle = load_bundle(path)
    except BundleError as error:
        print(f"expertsteer bundle inspect: {error}", file=sys.stderr)
        return 1
    if as_json:
        print(json.dumps(_as_json(bundle), indent=2))
    else:
        from rich.console import Console

        _print_bundle(Console(highlight=False), bundle)
    return 0


def _as_json(bundle: "Bundle") -> dict[str, object]:
    """Return everything `inspect` knows: identity, manifest, norms of the runtime rows, evidence."""
    return {
        "digest": bundle.digest,
        "num_bytes": bundle.num_bytes,
        "manifest": bundle.manifest.model_dump(mode="json"),
        "norms": {name: float(row.norm()) for name, row in bundle.writes.items()},
        "evidence": [
            {"name": entry.name, "shape": list(entry.shape), "dtype": entry.dtype, "num_bytes": entry.num_bytes}
            for entry in bundle.evidence
        ],
    }


def _print_bundle(console: "Console", bundle: "Bundle") -> None:
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
        ("data", manifest.data_digest or "-"),
        ("seed", str(manifest.seed)),
        ("versions", ", ".join(f"{tool} {number}" for tool, number in sorted(manifest.tool_versions.items())) or "-"),
    ):
        console.print(f"{label:<{_LABEL_WIDTH}}{printable(value)}", soft_wrap=True, markup=False, emoji=False)
    interventions = [
        (
            str(step.layer),
            step.kind,
            step.write,
            f"{float(bundle.writes[step.write].norm()):.6g}",
            _pairs(step.parameters),
        )
        for step in manifest.interventions
    ]
    pairs = [(str(pair.expert), str(pair.target), _pairs(pair.scores)) for pair in manifest.layer_pairs]
    evidence = [
        (entry.name, "x".join(map(str, entry.shape)) or "scalar", entry.dtype, str(entry.num_bytes))
        for entry in bundle.evidence
    ]
    _print_table(console, "Interventions", ("layer", "kind", "row", "norm", "parameters"), interventions)
    _print_table(console, "Layer pairs", ("expert", "target", "scores"), pairs)
    _print_table(console, "Evidence tensors", ("name", "shape", "dtype", "bytes"), evidence)
    _print_table(console, "Evaluation", ("measure", "value"), _evaluation(manifest.evaluation))


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


def _verify(path: Path, model_dir: Path | None, as_json: bool) -> int:
    checks = run_checks(path, model_dir)
    passed = all(check.status == "passed" for check in checks)
    if as_json:
        report = {"file": str(path), "ok": passed, "checks": [check._asdict() for check in checks]}
        print(json.dumps(report, indent=2))
    else:
        for check in checks:
            print(f"{_WORDS[check.status]:<8} {check.check:<9} {printable(check.found)}".rstrip())
    return 0 if passed else 1


def run_checks(path: Path, model_dir: Path | None) -> list[Check]:
    """Return the outcome of every check, in order; the first failure leaves the rest not run.

    Args:
        path: the bundle.
        model_dir: Hugging Face model folder that the bundle must belong to; None leaves that check out.
    """
    from artifacts.bundle import CHECKS, BundleError, load_bundle

    names = list(CHECKS) if model_dir is None else [*CHECKS, "model"]
    checks: list[Check] = []
    try:
        bundle = load_bundle(path, lambda check, found: checks.append(Check(check, "passed", found)))
        if model_dir is not None:
            checks.append(Check("model", "passed", _check_model(bundle, model_dir)))
    except BundleError as error:
        checks.append(Check(names[len(checks)], "failed", str(error)))
    return checks + [Check(name, "not_run", "") for name in names[len(checks) :]]


def _check_model(bundle: "Bundle", model_dir: Path) -> str:
    from artifacts.verify import check_target, served_model

    served = served_model(model_dir)
    check_target(bundle, served)
    weights = "same weights" if bundle.manifest.target.fingerprint else "weights not compared: the bundle names none"
    return f"{served.architecture}, hidden size {served.hidden_size}, {served.num_layers} layers, {weights}"
