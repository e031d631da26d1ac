"""A page with rendered parts, each between a line that names it and a line that ends it."""

import re
from collections.abc import Callable, Mapping

Render = Callable[[], str]

_PART = re.compile(
    r"(?P<start><!-- rendered: (?P<name>[a-z-]+) -->\n)(?P<text>.*?)(?P<end><!-- end: (?P=name) -->)", re.DOTALL
)


def parts(text: str) -> list[str]:
    """Names of the rendered parts of a page, in order."""
    return [match["name"] for match in _PART.finditer(text)]


def rendered(text: str, renders: Mapping[str, Render]) -> str:
    """A page with its parts as they are now.

    Args:
        text: the page.
        renders: by name of the part.

    Raises:
        KeyError: a part has a name that is not among them.
    """

    def replace(match: re.Match[str]) -> str:
        return f"{match['start']}\n{renders[match['name']]().strip()}\n\n{match['end']}"

    return _PART.sub(replace, text)
