"""What runs together with steering, from the checks that refuse the rest."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from docs.render.markdown import prose
from server.engine import compat, launch


def versions() -> str:
    """Supported versions of vLLM."""
    server = ", ".join(compat.SERVER_VLLM)
    engine = f"{compat.SUPPORTED_VLLM[0]} to {compat.SUPPORTED_VLLM[-1]}"
    return (
        f"* The server (`expertsteer serve`): vLLM {server}.\n"
        f"* The engine part, in vLLM's offline `LLM` (`server.engine.config.llm_arguments`): vLLM {engine}."
    )


def refused_flags() -> str:
    """What the checks at start refuse, in their own words."""
    found = [
        name
        for function in (launch.prepare, compat.require_servable, compat._refused_replicas)
        for name in _keys(function)
    ]
    return "\n".join(f"* {prose(name)}" for name in found)


def _keys(function: Callable[..., Any]) -> list[str]:
    """Keys of the dictionary of refusals in a function; what a key says of the value at hand is `...`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    dictionaries = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    return [_text(key) for node in dictionaries for key in node.keys if key is not None]


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    assert isinstance(node, ast.JoinedStr), "a refusal is named by a text"
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
