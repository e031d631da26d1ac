"""Routes and the keys that open them, and what the playground's page may do."""

from collections import defaultdict

from docs.render.markdown import code, paragraphs, table
from server.auth.keys import Role
from server.auth.rules import Access, permits, routes
from server.routes import playground

_WHO = {
    Access.OPEN: "everybody",
    Access.KNOWN: "every key",
    Access.INFERENCE: "keys that ask the model",
    Access.READ: "keys of operators",
    Access.WRITE: "keys that change what is served",
}


def access_table() -> str:
    """Who may use which route, one table for each access."""
    found: dict[Access, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for access, method, path in routes():
        found[access][path].append(method)
    sections = []
    for access, paths in found.items():
        roles = "no key" if access is Access.OPEN else ", ".join(code(role) for role in Role if permits(role, access))
        rows = [(code(path), ", ".join(methods)) for path, methods in paths.items()]
        sections.append(paragraphs(f"**{_WHO[access].capitalize()}** ({roles})", table(("route", "method"), rows)))
    return paragraphs(*sections)


def page_headers() -> str:
    """Headers that the files of the playground come with."""
    return table(("header", "value"), [(code(name), code(value)) for name, value in playground.HEADERS.items()])
