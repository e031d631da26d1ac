"""Model card of a bundle, the README.md of its repository on a hub."""

import re
import shlex
from collections.abc import Mapping, Sequence

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not in __all__
from pydantic import JsonValue

from artifacts.bundle import Bundle
from artifacts.interchange.figure_table import figure_tables
from artifacts.interchange.markdown import escaped, paragraph, plain, table
from artifacts.manifest import Manifest, ModelIdentity

TAGS = ("activation-steering", "steering-vector", "expertsteer")
# Licence identifiers of the hub are SPDX identifiers in lower case; anything else is a licence of its own name.
_LICENCE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.safetensors")
_SCOPES = {
    "all": "all tokens",
    "prompt": "the prompt's tokens",
    "response": "the response's tokens",
    "generation": "the generated tokens",
}


def model_card(bundle: Bundle, file_name: str) -> str:
    """Return the README.md: YAML front matter for the hub, then Markdown for people.

    Equal bundles give equal text. Whatever the manifest holds is shown as plain words: it cannot format the page, link
    anywhere, or add keys to the front matter.

    Args:
        bundle: passed every check of `artifacts.bundle`.
        file_name: of the bundle in the repository, for the commands; an unusual one is replaced by the bundle's name.
    """
    manifest = bundle.manifest
    file = file_name if _FILE_NAME.fullmatch(file_name) else f"{manifest.name}.safetensors"
    sections = (
        f"# {escaped(manifest.name)}",
        paragraph(manifest.description) or "The bundle comes without a description.",
        f"A steering bundle: it {_effect(manifest)} the residual stream of one model, per request, and changes no "
        "weights.",
        "## What it does\n\n" + _facts(manifest),
        "## How to use it\n\n" + _commands(manifest, file),
        "## Evaluation\n\n" + _evaluation(manifest.evaluation),
        "## Limits\n\n" + _limits(manifest),
        "## Identity\n\n" + _identity(bundle),
    )
    card = ModelCard(f"---\n{_front_matter(manifest).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")
    return str(card)


def _front_matter(manifest: Manifest) -> ModelCardData:
    licence = plain(manifest.licence)
    known = _LICENCE_ID.fullmatch(licence) is not None
    return ModelCardData(
        license=(licence.lower() if known else "other") if licence else None,
        license_name=None if known or not licence else licence,
        base_model=manifest.target.id if _is_hub_id(manifest.target.id) else None,
        library_name="expertsteer",
        pipeline_tag="text-generation",
        tags=list(TAGS),
    )


def _is_hub_id(name: str) -> bool:
    """Whether the hub would take the name; it refuses a card whose base model is none."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _facts(manifest: Manifest) -> str:
    interventions = [f"{step.layer} ({step.kind})" for step in manifest.interventions]
    facts = [
        ("steers", _model(manifest.target)),
        ("taught by", _model(manifest.expert) if manifest.expert else "no expert model is named"),
        ("decoder blocks, from 0", ", ".join(interventions)),
        ("paired layers, expert to target", _pairs(manifest)),
        ("recommended strength", f"{manifest.recommended_strength:g}"),
        ("largest strength", f"{manifest.maximum_strength:g}; negative strengths reverse the effect, 0 is off"),
        ("tokens", _tokens(manifest)),
        ("licence", escaped(manifest.licence) or "none is named"),
    ]
    return table(("", ""), facts)


def _effect(manifest: Manifest) -> str:
    return "adds vectors to" if all(step.is_plain_add for step in manifest.interventions) else "acts on"


def _tokens(manifest: Manifest) -> str:
    spans = ", ".join(span.replace("_", " ") for span in manifest.exclude)
    return _SCOPES[manifest.scope.value] + (f", without {spans}" if spans else "")


def _model(model: ModelIdentity) -> str:
    revision = f", revision {escaped(model.revision)}" if model.revision else ""
    return (
        f"{escaped(model.id)}{revision} ({escaped(model.architecture)}, hidden size {model.hidden_size}, "
        f"{model.num_layers} layers)"
    )


def _pairs(manifest: Manifest) -> str:
    return ", ".join(f"{pair.expert} to {pair.target}" for pair in manifest.layer_pairs) or "none"


def _commands(manifest: Manifest, file: str) -> str:
    model = manifest.target.id if _is_hub_id(manifest.target.id) else "MODEL"
    request = f'"steering_profile": {{"name": "{manifest.name}", "strength": {manifest.recommended_strength:g}}}'
    return "\n".join(
        (
            "```",
            f"expertsteer bundle verify {shlex.quote(file)}",
            f"expertsteer serve {shlex.quote(model)} --steering-bundle {shlex.quote(file)}",
            "```",
            "",
            "A chat request then asks for it with",
            "",
            "```",
            request,
            "```",
        )
    )


def _evaluation(results: Mapping[str, JsonValue]) -> str:
    tables = figure_tables(results)
    if not tables:
        return "No measurement of its effect comes with the bundle."
    return "\n\n".join([*tables, "`expertsteer bundle inspect --json` prints every figure that the bundle holds."])


def _limits(manifest: Manifest) -> str:
    limits = [
        f"It fits {escaped(manifest.target.id)} only; another model, even of the same shape, is refused or not steered "
        "as measured.",
        "Steering strengthens behaviour that the model has; it adds no skill and no knowledge.",
        "The figures are of the data they were measured on. A result that random directions or the untrained expert "
        "reach too is no effect of the expert.",
    ]
    if "source" in manifest.evaluation:
        limits.append(
            "The vectors were imported from a file of another program, which says nothing about their effect."
        )
    return "\n".join(f"* {limit}" for limit in limits)


def _identity(bundle: Bundle) -> str:
    manifest = bundle.manifest
    tools = ", ".join(f"{escaped(tool)} {escaped(number)}" for tool, number in sorted(manifest.tool_versions.items()))
    rows: Sequence[tuple[str, str]] = (
        ("bundle", f"`{bundle.digest}`"),
        ("target weights", _code(manifest.target.fingerprint)),
        ("target tokenizer", _code(manifest.target.tokenizer_digest)),
        ("expert weights", _code(manifest.expert.fingerprint if manifest.expert else None)),
        ("data", _code(manifest.data_digest)),
        ("seed", str(manifest.seed)),
        ("made with", tools or "not named"),
    )
    return table(("", ""), rows)


def _code(digest: str | None) -> str:
    """A digest; the manifest's own pattern keeps anything else out."""
    return f"`{digest}`" if digest else "not named"
