"""`expertsteer vector import|export`: vectors of llama.cpp, repeng, NumPy and safetensors to bundles and back."""

import argparse
from pathlib import Path

from artifacts.commands.build import guarded

HELP = "Turn control vectors of other programs into bundles, and bundles into theirs."
_FILES = ".gguf (llama.cpp, repeng), .npy or .safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the two actions and their options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_import(actions.add_parser("import", help="make a bundle for one target model from a file of vectors"))
    export = actions.add_parser("export", help="write a bundle's vectors, times a strength, for other programs")
    export.add_argument("bundle", type=Path, metavar="BUNDLE", help="the bundle, a .safetensors file")
    export.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help=f"file to write: {_FILES}")
    export.add_argument("--strength", type=float, metavar="S", help="to multiply in (default: the recommended one)")


def _add_import(action: argparse.ArgumentParser) -> None:
    action.add_argument("file", type=Path, metavar="FILE", help=f"the vectors: {_FILES}")
    action.add_argument("--target", type=Path, required=True, metavar="MODEL_DIR", help="folder of the model to steer")
    action.add_argument("-o", "--output", type=Path, required=True, metavar="BUNDLE", help="bundle to write")
    action.add_argument(
        "--target-id", metavar="ID", help="what the bundle calls the model (default: its folder's name)"
    )
    action.add_argument("--name", help="of the bundle (default: from the name of BUNDLE)")
    action.add_argument("--description", default="", metavar="TEXT", help="what the vectors do")
    action.add_argument("--licence", default="", metavar="ID", help="licence of the vectors, such as Apache-2.0")
    action.add_argument(
        "--layer",
        type=int,
        action="append",
        default=[],
        metavar="L",
        help="decoder block (0-based): where a single vector acts, or which ones to take; may be given several times",
    )
    action.add_argument(
        "--recommended", type=float, metavar="S", help="strength (default: that of the file, 1 as it is)"
    )
    action.add_argument("--maximum", type=float, metavar="S", help="largest strength (default: the recommended one)")
    action.add_argument(
        "--scope", choices=("all", "prompt", "response", "generation"), default="all", help="tokens to steer (all)"
    )
    action.add_argument(
        "--normalise",
        type=Path,
        metavar="TEXTS.jsonl",
        help="run the model over these texts and let strength count median norms of each layer",
    )
    action.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of that run")
    action.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of that run")


def run(args: argparse.Namespace) -> int:
    """Run the chosen action; 0 when the file lies at its place, 1 with one line on stderr otherwise."""
    return guarded(f"vector {args.action}", lambda: _run(args), "nothing was written")


def _run(args: argparse.Namespace) -> int:
    lines = _import(args) if args.action == "import" else _export(args)
    print("\n".join(lines))
    return 0


def _import(args: argparse.Namespace) -> list[str]:
    from artifacts.interchange.residual_norm import measure_norms
    from artifacts.interchange.vector_file import read_vectors
    from artifacts.interchange.vector_import import ImportSettings, check_vectors, import_bundle
    from artifacts.jobs.config import ModelSource
    from artifacts.jobs.errors import BuildError
    from artifacts.jobs.source import find_model
    from artifacts.manifest import Scope

    if not args.target.is_dir():
        raise BuildError(f"there is no model folder {args.target}; name a Hugging Face model folder")
    file = read_vectors(args.file, args.layer)
    target = find_model(ModelSource(model=str(args.target.resolve()), id=args.target_id), Path())
    check_vectors(file, target.identity)
    norms = None
    if args.normalise is not None:
        norms = measure_norms(target, args.normalise, list(file.vectors), args.dtype, args.device)
    settings = ImportSettings(
        name=args.name or args.output.stem.lower(),
        description=args.description,
        licence=args.licence,
        recommended=args.recommended,
        maximum=args.maximum,
        scope=Scope(args.scope),
    )
    digest = import_bundle(args.output, args.file, file, target.identity, settings, norms)
    hint = f"; the file was made for {file.model_hint!r}" if file.model_hint else ""
    return [
        f"{args.output}: {digest}",
        f"layers {', '.join(map(str, file.vectors))} of {target.identity.id} ({target.identity.architecture}){hint}",
        "nothing is known about what these vectors do here: measure it with `expertsteer eval` before you serve them",
    ]


def _export(args: argparse.Namespace) -> list[str]:
    from artifacts.bundle import load_bundle
    from artifacts.interchange.vector_export import baked_vectors, lost_in_export
    from artifacts.interchange.vector_file import format_of, write_vectors

    format_of(args.output)
    bundle = load_bundle(args.bundle)
    vectors = baked_vectors(bundle, args.strength)
    write_vectors(args.output, vectors, bundle.manifest.target)
    strength = bundle.manifest.recommended_strength if args.strength is None else args.strength
    layers = ", ".join(map(str, vectors))
    return [f"{args.output}: layers {layers} at strength {strength:g}", *lost_in_export(bundle)]
