"""This server's HTTP routes, from the OpenAPI document that they make of themselves. No engine runs."""

import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import Any

from fastapi import APIRouter, FastAPI

import server.routes
from artifacts.manifest import Manifest
from docs.render.fields import fields_table, type_of
from docs.render.markdown import code, paragraphs, prose, table
from server.auth.rules import access_of

_OPENAPI_METHODS = ("get", "put", "post", "delete", "patch")
# What this server adds to a request or an answer of vLLM's.
_ADDED = ("steering_profile", "steering")


def routes() -> str:
    """Every route: who may use it, parameters, body and answers."""
    document = _document()
    sections = []
    for path, operations in sorted(document["paths"].items()):
        for method in _OPENAPI_METHODS:
            if method in operations:
                sections.append(_operation(path, method, operations[method], document["components"]["schemas"]))
    return paragraphs(*sections)


def schemas() -> str:
    """Objects in bodies, but for those of vLLM."""
    components = _document()["components"]["schemas"]
    ours = {name: schema for name, schema in sorted(components.items()) if name in _our_models()}
    return paragraphs(
        *(
            paragraphs(f"### {name}", prose(schema.get("description", "")), fields_table(schema))
            for name, schema in ours.items()
            if "properties" in schema
        )
    )


@cache
def _document() -> dict[str, Any]:
    app = FastAPI()
    for name in _modules():
        router = getattr(import_module(name), "router", None)
        if isinstance(router, APIRouter):
            app.include_router(router)
    return app.openapi()


def _modules() -> Iterator[str]:
    for found in pkgutil.walk_packages(server.routes.__path__, "server.routes."):
        if not found.ispkg:
            yield found.name


def _our_models() -> frozenset[str]:
    """Names of the models that this package's own modules define."""
    names: set[str] = set()
    for module in ("server.admin_schema", "server.schema"):
        members = inspect.getmembers(import_module(module), inspect.isclass)
        names.update(name for name, each in members if each.__module__ == module)
    return frozenset(names)


def _operation(path: str, method: str, operation: Mapping[str, Any], components: Mapping[str, Any]) -> str:
    access = access_of(method.upper(), path)
    about = operation.get("description", "").replace("\n\n", "\n").split("\n")
    parameters = [
        (
            code(each["name"]),
            each["in"],
            type_of(each["schema"]),
            prose(each.get("description", "") or each["schema"].get("description", "")),
        )
        for each in operation.get("parameters", ())
    ]
    return paragraphs(
        f"### {method.upper()} {path}",
        f"{prose(' '.join(about))} Access: {access.value}.",
        table(("parameter", "in", "type", "meaning"), parameters) if parameters else "",
        _body(operation, components),
        _answers(operation, components),
    )


def _body(operation: Mapping[str, Any], components: Mapping[str, Any]) -> str:
    content = operation.get("requestBody", {}).get("content", {})
    if not content:
        return ""
    shown = []
    for media, body in content.items():
        schema = body.get("schema", {})
        name = schema.get("$ref", "").rpartition("/")[2]
        if name and name not in _our_models():
            about = f"Body ({code(media)}): what vLLM takes on this route"
            if not components[name]["properties"].keys() & set(_ADDED):
                return f"{about}."
            return paragraphs(f"{about}, and", fields_table(components[name], _ADDED))
        shown.append(f"{_names(schema)} ({code(media)})")
    return f"Body: {' or '.join(shown)}."


def _answers(operation: Mapping[str, Any], components: Mapping[str, Any]) -> str:
    rows = []
    added = ""
    for status, answer in sorted(operation["responses"].items()):
        # Refusals have one form on all routes, and 422 is FastAPI's default, which no route answers.
        if not status.startswith("2"):
            continue
        schema = answer.get("content", {}).get("application/json", {}).get("schema", {})
        name = schema.get("$ref", "").rpartition("/")[2]
        if name and name not in _our_models() and "steering" in components[name].get("properties", {}):
            added = paragraphs("Added to vLLM's answer:", fields_table(components[name], _ADDED))
            continue
        body, meaning = _names(schema), prose(answer.get("description", "").replace("Successful Response", ""))
        if body or meaning:
            rows.append(f"* {status}: {'; '.join(part for part in (body, meaning) if part)}")
    return paragraphs("Answers:\n\n" + "\n".join(rows) if rows else "", added)


def _names(schema: Mapping[str, Any]) -> str:
    """Names of the models that a body may be."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name == Manifest.__name__:
            return f"[{code(name)}](bundle.md#manifest)"
        return f"[{code(name)}](#{name.lower()})" if name in _our_models() else code(name)
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices:
        return " or ".join(_names(choice) for choice in choices)
    if schema.get("format") == "binary":
        return "the file"
    if schema.get("type") == "object" and "title" in schema:
        return f"an object with {' and '.join(map(code, schema['properties']))}"
    return type_of(schema) if schema else ""
