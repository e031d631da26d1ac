"""The specification of a bundle, from the docstrings and models that read it."""

import inspect
import json

from pydantic import BaseModel

from artifacts.bundle import CHECKS
from artifacts.errors import BundleErrorCode
from artifacts.gates import Trigger
from artifacts.manifest import Intervention, LayerPair, Manifest, ModelIdentity, Parameters
from docs.render.fields import fields_table
from docs.render.markdown import code, paragraphs

_MODELS: tuple[type[BaseModel], ...] = (Manifest, ModelIdentity, LayerPair, Intervention, Parameters, Trigger)


def specification() -> str:
    """The normative text."""
    first, _, rest = inspect.cleandoc(Manifest.__doc__ or "").partition("\n\n")
    return paragraphs(f"*{first}*", rest)


def field_tables() -> str:
    """Fields of the manifest and of its parts."""
    sections = []
    for model in _MODELS:
        # What is said about the manifest's fields is part of the specification.
        about = "" if model is Manifest else inspect.cleandoc(model.__doc__ or "")
        text, _, attributes = about.partition("\n\nAttributes:\n")
        table = fields_table(model.model_json_schema())
        sections.append(paragraphs(f"### {model.__name__}", text, table, _attributes(attributes)))
    return paragraphs(*sections)


def checks() -> str:
    """What is checked in which order, and the codes of what fails."""
    codes = ", ".join(code(each.value) for each in BundleErrorCode)
    order = ", ".join(code(check) for check in CHECKS)
    return paragraphs(f"Checks, in order: {order}.", f"Codes of refusals: {codes}.")


def json_schema() -> str:
    """JSON schema of the manifest."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": "Rendered from artifacts/manifest.py by `make docs`. What a schema cannot say is in bundle.md.",
        **Manifest.model_json_schema(),
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _attributes(text: str) -> str:
    """The lines `name: meaning` of a docstring as a list."""
    found: list[str] = []
    for line in text.splitlines():
        # Continuation lines are indented further than the names.
        if line.startswith("        ") and found:
            found[-1] += f" {line.strip()}"
        elif line.strip():
            names, _, meaning = line.strip().partition(": ")
            found.append(f"* {', '.join(code(name) for name in names.split(', '))}: {meaning}")
    return "\n".join(found)
