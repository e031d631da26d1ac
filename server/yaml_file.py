"""YAML files that people write for the server: read without surprises, refused where they could mean something else."""

import os
import re
import stat
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml

from artifacts.errors import quoted


class Content(NamedTuple):
    """Bytes of a file and its permission bits."""

    data: bytes
    mode: int


class _StrictLoader(yaml.CSafeLoader):
    """A field given twice is a mistake that must not go unseen: the last would win."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(names)) < len(names):
            twice = next(name for index, name in enumerate(names) if name in names[:index])
            raise yaml.constructor.ConstructorError(None, None, f"{quoted(twice)} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


# YAML 1.2 and JSON write so what YAML 1.1 takes for text: 1e-05.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+\Z"), list("-+0123456789")
)


def read(path: Path, what: str, max_bytes: int) -> Content:
    """Bytes of a regular file, or of one that a link leads to.

    Args:
        path: of the file.
        what: begins the messages, as "Keys file keys.yaml".
        max_bytes: bound of its size.

    Raises:
        ValueError: it cannot be read, is something else than a file, or is too large.
    """
    try:
        # Without waiting: a named pipe must not stop the server.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ValueError(f"{what} cannot be read: {error.strerror}.") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{what} is not a regular file.")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(max_bytes + 1)
    finally:
        os.close(descriptor)
    if len(data) > max_bytes:
        raise ValueError(f"{what} has more than {max_bytes} bytes.")
    return Content(data, status.st_mode & 0o777)


def parse(data: bytes, what: str, max_depth: int) -> Any:
    """Plain values of a YAML document.

    Args:
        data: the document.
        what: begins the messages.
        max_depth: bound of the nesting of lists and mappings, which the loader would follow until the stack is used up.

    Raises:
        ValueError: it is no YAML, too deep, gives a field twice, or uses aliases, by which a few lines may mean
            endlessly much.
    """
    try:
        _check_depth(data, max_depth)
        # The loader is a safe one: it builds nothing but plain values.
        return yaml.load(data, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise ValueError(f"{what}{line}: {error.problem or 'this is no YAML'}.") from None
    # The loader lets out what an impossible value of a tag raises.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError):
        raise ValueError(f"{what} is no YAML, or holds a value that cannot be.") from None


def _check_depth(data: bytes, max_depth: int) -> None:
    depth = 0
    for event in yaml.parse(data, Loader=yaml.CSafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem=f"alias *{event.anchor} is not supported; write the value out",
                problem_mark=cast(yaml.error.Mark | None, event.start_mark),
            )
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > max_depth:
            raise yaml.MarkedYAMLError(problem=f"lists and mappings are more than {max_depth} deep")
