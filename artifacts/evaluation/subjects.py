"""From a bundle to a subject with baselines: in a model folder, or on a running server."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from artifacts.bundle import Bundle
from artifacts.errors import quoted
from artifacts.evaluation.controls import BundleVectors, control_description, profile_name, stem
from artifacts.evaluation.local import LocalSubject
from artifacts.evaluation.plan import MIN_RANDOM, Baselines
from artifacts.evaluation.server import ServerSubject
from artifacts.evaluation.subject import Condition, Subject
from artifacts.jobs.errors import BuildError
from artifacts.jobs.model import load_model


class Prepared(NamedTuple):
    """A subject, what it calls the vector under test, what it is, its baselines, and bundles by vector on a server."""

    subject: Subject
    vector: str
    about: dict[str, str]
    baselines: Baselines
    receipts: Mapping[str, str]


def local_subject(
    bundle: Bundle,
    vectors: BundleVectors,
    directory: Path,
    fingerprint: str | None,
    dtype: str,
    device: str,
    batch_tokens: int,
) -> Prepared:
    """The target in a folder, with the bundle's vectors. `fingerprint` is that of the folder's own weights.

    Raises:
        BuildError: the model cannot be loaded, or the bundle steers other tokens than all.
    """
    manifest = bundle.manifest
    if manifest.scope != "all":
        raise BuildError(
            f"the bundle steers the scope {manifest.scope.value}, and offline every token is steered; measure it "
            "through a server with --server"
        )
    model = load_model("target", directory, dtype, device)
    named = vectors.named()
    # A bundle's name cannot begin with a tilde.
    rows = {manifest.name: vectors.own.rows, **{f"~{name}": each.rows for name, each in named.items()}}
    conditions = {name: Condition(f"~{name}", each.strength) for name, each in named.items()}
    about = {"model": str(directory), "dtype": dtype, "device": str(model.device)}
    if fingerprint is not None:
        about["weights"] = fingerprint
    baselines = _baselines(vectors, conditions, dict(vectors.missing))
    return Prepared(LocalSubject(model, rows, batch_tokens), manifest.name, about, baselines, {})


def server_subject(bundle: Bundle, vectors: BundleVectors, subject: ServerSubject) -> Prepared:
    """A server that holds the bundle as a profile, and its controls as far as they are profiles too.

    Raises:
        BuildError: no profile is this bundle.
    """
    served = [each for each in subject.profiles.values() if each.bundle == bundle.digest]
    if not served:
        held = [f"{each.name} {each.bundle}" for each in subject.profiles.values()]
        raise BuildError(
            f"no profile of the server is this bundle ({bundle.digest}); it holds {quoted(held)}: serve it with "
            "--steering-bundle"
        )
    conditions: dict[str, Condition] = {}
    missing, lacking = dict(vectors.missing), Counter[str]()
    for name, vector in vectors.named().items():
        kind, profile = stem(name), subject.profiles.get(profile_name(bundle.manifest.name, name))
        if profile is None:
            lacking[kind] += 1
            missing[kind] = (
                f"the server holds no profile of {lacking[kind]} such vectors; write them with --write-controls, serve "
                "them"
            )
        elif profile.description != control_description(name, bundle.digest):
            missing[kind] = f"the server's profile {profile.name} is a control of another bundle; write it anew"
        else:
            conditions[name] = Condition(profile.name, vector.strength)
    measured = [served[0].name, *(each.name for each in conditions.values() if each.name is not None)]
    receipts = {name: subject.profiles[name].bundle for name in measured}
    return Prepared(subject, served[0].name, subject.about(), _baselines(vectors, conditions, missing), receipts)


def _baselines(vectors: BundleVectors, found: Mapping[str, Condition], missing: dict[str, str]) -> Baselines:
    """Baselines of the conditions that a subject can take; too few random directions are none."""
    random = [f"random-{index}" for index in range(len(vectors.random))]
    held = [name for name in random if name in found]
    reasons = {name: reason for name, reason in missing.items() if name != "random"}
    if len(held) < MIN_RANDOM:
        reason = missing.get("random", "none was asked for")
        reasons["random"] = f"{len(held)} directions of at least {MIN_RANDOM}: {reason}"
        held = []
    controls = {name: found[name] for name in vectors.controls if name in found}
    return Baselines(controls, [found[name] for name in held], reasons)
