"""`expertsteer bundle inspect|verify|pack`: look into a bundle, prove that it may be served, make one."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from artifacts.commands.bundle_text import print_bundle, printable

if TYPE_CHECKING:
    from artifacts.bundle import Bundle

HELP = "Inspect, verify or pack a bundle file."
_SPEC = """
SPEC.yaml holds the fields of a bundle's manifest. In place of the name of a tensor stands where to take it from:
FILE.npy or FILE.safetensors#TENSOR, paths starting from SPEC.yaml. `target` is a model folder, or its fields.

  name: calm
  target: ./my-8b
  recommended_strength: 1.0
  maximum_strength: 2.0
  scope: generation
  triggers: {break: {text_contains: "\\n\\n"}}
  interventions:
    - {layer: 12, kind: project, read: directions.safetensors#anger}
    - {layer: 14, kind: clamp, read: axis.npy, parameters: {maximum: 3.5}}
    - {layer: 16, kind: add, write: pause.npy, gate: break, keep_norm: true}

Kinds and their parameters: see `artifacts.manifest`. Directions of project, clamp, rotate and cosine are unit vectors.
"""
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

    pack = actions.add_parser(
        "pack",
        help="make a bundle of any kind of intervention from your own tensors",
        description="Make a bundle of any kind of intervention from your own tensors.",
        epilog=_SPEC,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pack.add_argument("spec", type=Path, metavar="SPEC.yaml", help="what to pack")
    pack.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="bundle to write")


def run(args: argparse.Namespace) -> int:
    """Run the chosen action and return the exit status."""
    if args.action == "pack":
        return _pack(args.spec, args.output)
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

        print_bundle(Console(highlight=False), bundle)
    return 0


def _as_json(bundle: "Bundle") -> dict[str, object]:
    """Return everything `inspect` knows: identity, manifest, norms of the runtime tensors' rows, evidence."""
    from artifacts.rows import row_norms

    return {
        "digest": bundle.digest,
        "num_bytes": bundle.num_bytes,
        "manifest": bundle.manifest.model_dump(mode="json"),
        "norms": {name: row_norms(row) for name, row in bundle.rows.items()},
        "evidence": [
            {"name": entry.name, "shape": list(entry.shape), "dtype": entry.dtype, "num_bytes": entry.num_bytes}
            for entry in bundle.evidence
        ],
    }


def _pack(spec: Path, output: Path) -> int:
    from artifacts.commands.build import guarded

    def work() -> int:
        from artifacts.bundle import write_bundle
        from artifacts.interchange.bundle_spec import read_spec

        packed = read_spec(spec)
        digest = write_bundle(output, packed.manifest, packed.tensors)
        steps = ", ".join(f"{step.layer} ({step.kind})" for step in packed.manifest.interventions)
        target = packed.manifest.target
        print(f"{output}: {digest}")
        print(f"layers {steps} of {printable(target.id)} ({printable(target.architecture)})")
        return 0

    return guarded("bundle pack", work, "nothing was written")


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
