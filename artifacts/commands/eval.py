"""`expertsteer eval`: what a bundle does to a model, against everything that it has to be compared with."""

import argparse
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from artifacts.commands.build import guarded
from artifacts.commands.eval_arguments import add_arguments

if TYPE_CHECKING:
    from artifacts.bundle import Bundle
    from artifacts.evaluation.controls import BundleVectors
    from artifacts.evaluation.judge import Judge
    from artifacts.evaluation.schema import About, Report, Settings
    from artifacts.evaluation.subjects import Prepared

__all__ = ["HELP", "add_arguments", "run"]

HELP = "Measure a bundle against its baselines, offline or through a running server."
GATE_FAILED = 3


def run(args: argparse.Namespace) -> int:
    """Measure; see the epilog for the exit status."""
    if args.write_controls is None and not args.data:
        return _usage("--data names no file of questions; give at least one")
    return guarded("eval", lambda: _run(args), "nothing was written")


def _run(args: argparse.Namespace) -> int:
    from artifacts.bundle import load_bundle
    from artifacts.evaluation.controls import bundle_vectors, write_controls

    if args.judge_url is not None and args.judge_model is None:
        return _usage("--judge-url needs --judge-model")
    bundle = load_bundle(args.bundle)
    vectors = bundle_vectors(args.bundle, bundle, args.random_directions, args.seed)
    if args.write_controls is not None:
        written = write_controls(args.write_controls, bundle, vectors)
        print(
            f"{len(written)} bundles in {args.write_controls}; serve them with --steering-bundle beside {args.bundle}"
        )
        return 0
    output = args.output or Path(f"{bundle.manifest.name}-eval")
    # Before the hours of work whose result goes there; without a result it is taken away again.
    made = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    try:
        report = _measure(args, bundle, vectors)
    except BaseException:
        if made:
            output.rmdir()
        raise
    _write(report, output)
    if not args.quiet:
        _print_report(report, output)
    failed = [each for each in report.gates if not each.passed]
    for each in failed:
        print(f"expertsteer eval: gate {each}", file=sys.stderr)
    return GATE_FAILED if failed else 0


def _measure(args: argparse.Namespace, bundle: "Bundle", vectors: "BundleVectors") -> "Report":
    from artifacts.evaluation.gates import check_gates
    from artifacts.evaluation.local import LocalSubject
    from artifacts.evaluation.rows import read_questionnaire
    from artifacts.evaluation.run import evaluate
    from artifacts.evaluation.schema import DataFile
    from artifacts.jobs.model import load_model
    from artifacts.jobs.workdir import file_digest

    questionnaire = read_questionnaire(args.data, args.retention)
    files = tuple(DataFile(path=path.name, digest=file_digest(path)) for path in (*args.data, *args.retention))
    with ExitStack() as stack:
        judge = _judge(args, bundle, stack)
        prepared = _prepare(args, bundle, vectors, stack)
        expert = None
        if args.expert is not None:
            expert = LocalSubject(load_model("expert", args.expert, args.dtype, args.device), {}, args.batch_tokens)
        report = evaluate(
            prepared.subject,
            questionnaire,
            _about(bundle, vectors, prepared),
            prepared.baselines,
            _settings(args, bundle),
            expert=expert,
            judge=judge,
            quiet=args.quiet,
        )
    pairs = bundle.manifest.evaluation.get("pairs")
    return report.model_copy(
        update={
            "gates": check_gates(args.gate, report.figures),
            "data": files,
            "pairs": tuple(each for each in pairs if isinstance(each, dict)) if isinstance(pairs, list) else (),
        }
    )


def _prepare(args: argparse.Namespace, bundle: "Bundle", vectors: "BundleVectors", stack: ExitStack) -> "Prepared":
    from dataclasses import replace

    from artifacts.evaluation.endpoint import Endpoint
    from artifacts.evaluation.server import ServerSubject
    from artifacts.evaluation.subjects import local_subject, server_subject
    from artifacts.verify import check_target, served_model

    if args.server is not None:
        key = _key_from(args.api_key_env)
        endpoint = stack.enter_context(Endpoint(args.server, key, args.concurrency))
        return server_subject(bundle, vectors, ServerSubject(endpoint, args.model))
    served = served_model(args.target)
    expected = served.fingerprint if args.fingerprint == "enforce" else bundle.manifest.target.fingerprint
    check_target(bundle, replace(served, fingerprint=expected))
    return local_subject(bundle, vectors, args.target, served.fingerprint, args.dtype, args.device, args.batch_tokens)


def _about(bundle: "Bundle", vectors: "BundleVectors", prepared: "Prepared") -> "About":
    from importlib.metadata import version

    from artifacts.evaluation.schema import About

    return About(
        name=prepared.vector,
        subject=prepared.about,
        bundle=bundle.digest,
        scope=bundle.manifest.scope.value,
        layers=tuple(sorted(vectors.own.rows)),
        recommended=bundle.manifest.recommended_strength,
        maximum=bundle.manifest.maximum_strength,
        receipts=dict(prepared.receipts),
        versions={name: version(name) for name in ("expertsteer", "torch", "transformers", "numpy", "scipy")},
    )


def _settings(args: argparse.Namespace, bundle: "Bundle") -> "Settings":
    from artifacts.evaluation.schema import Settings

    own = bundle.manifest.evaluation.get("prompt")
    return Settings(
        seed=args.seed,
        doses=args.doses,
        negative_doses=args.negative_doses,
        max_new_tokens=args.max_new_tokens,
        exact=args.exact or ("forced" if args.server is None else "generation"),
        prompt=args.prompt or (own if isinstance(own, str) and own else None),
    )


def _judge(args: argparse.Namespace, bundle: "Bundle", stack: ExitStack) -> "Judge | None":
    from artifacts.evaluation.judge import Judge, judge_client
    from artifacts.jobs.errors import BuildError

    if args.judge_url is None:
        return None
    concept = args.judge_concept or bundle.manifest.description
    if not concept:
        raise BuildError(
            "the bundle has no description for the judge; say with --judge-concept what steering should bring"
        )
    endpoint = stack.enter_context(judge_client(args.judge_url, _key_from(args.judge_key_env), args.concurrency))
    judge = Judge(endpoint, args.judge_model, concept)
    judge.check()
    return judge


def _key_from(variable: str | None) -> str | None:
    from artifacts.jobs.errors import BuildError

    if variable is None:
        return None
    # A key from a mounted secret often ends in a newline.
    key = os.environ.get(variable, "").strip()
    if not key:
        raise BuildError(f"the environment variable {variable} is not set; put the API key into it")
    if not (key.isascii() and key.isprintable()):
        raise BuildError(f"the API key in {variable} has characters that no HTTP header takes; set it anew")
    return key


def _write(report: "Report", output: Path) -> None:
    from artifacts.evaluation.html import write_html
    from artifacts.evaluation.schema import write_report

    write_report(output / "report.json", report)
    write_html(output / "report.html", report)


def _print_report(report: "Report", output: Path) -> None:
    from rich.console import Console

    from artifacts.evaluation.console import print_report

    print_report(report, Console(highlight=False))
    print(f"{output / 'report.html'} and report.json")


def _usage(message: str) -> int:
    print(f"expertsteer eval: {message}", file=sys.stderr)
    return 2
