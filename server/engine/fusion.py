"""Which RMSNorm takes up a decoder layer's output, read off the model's own source.

A layer can leave its steering to the norm that follows only if nothing else sees its output in between. That is read
off the syntax trees of the layer's and the model's `forward`, in the one form that most of vLLM's models have:

    def forward(self, ..., hidden_states, residual):        # the layer
        if residual is None:
            residual = hidden_states
            hidden_states = self.NORM(hidden_states)
        else:
            hidden_states, residual = self.NORM(hidden_states, residual)
        ...
        return hidden_states, residual

    for layer in ...:                                       # the model
        hidden_states, residual = layer(..., hidden_states, residual, ...)
    ...
    hidden_states, _ = self.NORM(hidden_states, residual)

Everything else is steered in place, which is right for any model.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

_STREAM = ("hidden_states", "residual")


class FollowingNorm(NamedTuple):
    """The norm that takes up a layer's output, and what it adds to its weight."""

    module: nn.Module
    weight_offset: float


def norms_after(owner: nn.Module, layers: Mapping[int, nn.Module], num_layers: int) -> dict[int, FollowingNorm]:
    """The norm after each layer, where it is known to be an RMSNorm that nothing else comes before.

    Args:
        owner: the module whose `forward` runs the layers.
        layers: its layers by number; those of other pipeline stages are missing.
        num_layers: how many there are in all stages.

    Returns:
        Layer -> the norm that adds its output to the residual. The last layer of a pipeline stage is missing, because
        its output travels.
    """
    model = forward_of(owner)
    if model is None or not _passes_stream_on(model):
        return {}
    found = {}
    for index, layer in layers.items():
        forward = forward_of(layer)
        if forward is None or not _returns_stream(forward):
            continue
        if index + 1 in layers:
            following, name = layers[index + 1], _first_norm(forward_of(layers[index + 1]))
        elif index == num_layers - 1:
            following, name = owner, _last_norm(model)
        else:
            continue
        norm = getattr(following, name, None) if name else None
        offset = _weight_offset(norm)
        if norm is not None and offset is not None:
            found[index] = FollowingNorm(norm, offset)
    return found


def _weight_offset(norm: Any) -> float | None:
    """What an RMSNorm of vLLM adds to its weight; None for anything that the fused operator does not compute."""
    from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

    if type(norm) is GemmaRMSNorm:
        return 1.0
    if type(norm) is RMSNorm and norm.variance_size_override is None:
        return 0.0
    return None


def reduces_itself(forward: ast.FunctionDef | None) -> bool:
    """Whether a `forward` calls an all-reduce of its own, where vLLM's layers otherwise do it inside."""
    calls = [ast.unparse(node.func) for node in ast.walk(forward) if isinstance(node, ast.Call)] if forward else []
    return any("allreduce" in call or "all_reduce" in call for call in calls)


def adds_residual(forward: ast.FunctionDef | None) -> bool | None:
    """Whether the residual stream after a layer that returns (hidden_states, residual) is their sum.

    It is if the layer reads the `residual` that it is given before it assigns it, and it is not if the layer is given
    nothing but hidden_states. None where the source does not tell.
    """
    if forward is None:
        return None
    names = {argument.arg for argument in (*forward.args.args, *forward.args.kwonlyargs)}
    if "residual" not in names:
        return False if names <= {"self", "positions", "hidden_states"} and not forward.args.vararg else None
    for statement in forward.body:
        uses = [node for node in ast.walk(statement) if isinstance(node, ast.Name) and node.id == "residual"]
        if uses:
            return any(isinstance(use.ctx, ast.Load) for use in uses)
    return None


def forward_of(module: nn.Module) -> ast.FunctionDef | None:
    """Syntax tree of a module's `forward`; None where there is no source.

    Of one that does nothing but call `super().forward(...)`, as Mistral's, the one that it calls.
    """
    for cls in type(module).__mro__:
        if "forward" in vars(cls):
            function = _parsed(vars(cls)["forward"])
            if function is None or not _only_calls_super(function):
                return function
    return None


def _parsed(function: Callable[..., Any]) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return None
    return tree.body[0] if isinstance(tree.body[0], ast.FunctionDef) else None


def _only_calls_super(function: ast.FunctionDef) -> bool:
    body = _without_docstring(function)
    value = body[0].value if len(body) == 1 and isinstance(body[0], ast.Return) else None
    return isinstance(value, ast.Call) and ast.unparse(value.func) == "super().forward"


def _first_norm(forward: ast.FunctionDef | None) -> str | None:
    """Name of the norm with which a layer begins, in both branches of `if residual is None`."""
    if forward is None:
        return None
    body = _without_docstring(forward)
    first = body[0] if body else None
    if not isinstance(first, ast.If) or ast.unparse(first.test) != "residual is None":
        return None
    start = [ast.unparse(statement) for statement in first.body]
    if len(start) != 2 or start[0] not in ("residual = hidden_states", "residual = hidden_states.clone()"):
        return None
    if len(first.orelse) != 1:
        return None
    name = _norm_of(first.orelse[0])
    return name if name is not None and start[1] == f"hidden_states = self.{name}(hidden_states)" else None


def _last_norm(model: ast.FunctionDef) -> str | None:
    """Name of the norm that the model applies to the stream after its layers, if it does so once."""
    calls = [node for node in ast.walk(model) if isinstance(node, ast.Assign) and _norm_of(node) is not None]
    return _norm_of(calls[0]) if len(calls) == 1 else None


def _norm_of(statement: ast.AST) -> str | None:
    """NAME of `hidden_states, ... = self.NAME(hidden_states, residual)`."""
    if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Call):
        return None
    target, call = statement.targets[0], statement.value
    if not isinstance(target, ast.Tuple) or not target.elts or ast.unparse(target.elts[0]) != _STREAM[0]:
        return None
    of_self = isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "self"
    if not of_self or call.keywords or tuple(ast.unparse(argument) for argument in call.args) != _STREAM:
        return None
    assert isinstance(call.func, ast.Attribute)
    return call.func.attr


def _returns_stream(forward: ast.FunctionDef) -> bool:
    returns = [node for node in ast.walk(forward) if isinstance(node, ast.Return)]
    return bool(returns) and all(
        node.value is not None and ast.unparse(node.value) in ("(hidden_states, residual)",) for node in returns
    )


def _passes_stream_on(model: ast.FunctionDef) -> bool:
    """Whether the one loop that runs layers hands the stream of each to the next, untouched."""
    loops = [node for node in ast.walk(model) if isinstance(node, ast.For) and any(_runs_layer(node))]
    if len(loops) != 1:
        return False
    assigned = [name for node in ast.walk(loops[0]) for name in _assigned(node)]
    return sum(1 for _ in _runs_layer(loops[0])) == 1 and all(assigned.count(name) == 1 for name in _STREAM)


def _runs_layer(loop: ast.For) -> Iterator[ast.Assign]:
    """Statements `hidden_states, residual = layer(..)` of a loop over layers."""
    variables = {node.id for node in ast.walk(loop.target) if isinstance(node, ast.Name)}
    for node in ast.walk(loop):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and ast.unparse(node.value.func) in variables
            and ast.unparse(node.targets[0]) == "(hidden_states, residual)"
            and {ast.unparse(argument) for argument in _arguments(node.value)}.issuperset(_STREAM)
        ):
            yield node


def _arguments(call: ast.Call) -> Iterator[ast.expr]:
    yield from call.args
    yield from (keyword.value for keyword in call.keywords)


def _assigned(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id


def _without_docstring(function: ast.FunctionDef) -> list[ast.stmt]:
    first = function.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return function.body[1:] if is_docstring else function.body
