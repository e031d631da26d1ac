"""Registration of the steering operators with torch, so that they go through torch.compile and CUDA graphs."""

import functools

import torch
from torch import Tensor

from steering_kernels import backends
from steering_kernels.table import CODE_WIDTH, PARAM_WIDTH

# Part of vLLM's compile-cache key: raise it whenever the schema or the meaning of an operator changes.
OPS_VERSION = 2

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_TABLES = "Tensor pool, Tensor codes, Tensor params, Tensor slot_ids, Tensor strengths, Tensor(c!) gates"

_library = torch.library.Library("expertsteer", "DEF")
_library.define(f"steer_(Tensor(a!) hidden, {_TABLES}, Tensor? residual) -> ()")
_library.define(
    "steer_add_rms_norm_(Tensor(a!) hidden, Tensor(b!) residual, Tensor? weight, float epsilon, float weight_offset, "
    f"{_TABLES}) -> ()"
)


def _steer(
    device_type: str,
    hidden: Tensor,
    pool: Tensor,
    codes: Tensor,
    params: Tensor,
    slot_ids: Tensor,
    strengths: Tensor,
    gates: Tensor,
    residual: Tensor | None,
) -> None:
    backends.chosen(device_type, hidden.dtype).steer_(hidden, pool, codes, params, slot_ids, strengths, gates, residual)


def _steer_add_rms_norm(
    device_type: str,
    hidden: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    weight_offset: float,
    pool: Tensor,
    codes: Tensor,
    params: Tensor,
    slot_ids: Tensor,
    strengths: Tensor,
    gates: Tensor,
) -> None:
    backends.chosen(device_type, hidden.dtype).steer_add_rms_norm_(
        hidden, residual, weight, epsilon, weight_offset, pool, codes, params, slot_ids, strengths, gates
    )


def _nothing(*_: object) -> None:
    """Both operators change their arguments and return nothing: there is no shape to infer."""


for _key in ("CPU", "CUDA"):
    _library.impl("steer_", functools.partial(_steer, _key.lower()), _key)
    _library.impl("steer_add_rms_norm_", functools.partial(_steer_add_rms_norm, _key.lower()), _key)
torch.library.register_fake("expertsteer::steer_", _nothing)
torch.library.register_fake("expertsteer::steer_add_rms_norm_", _nothing)


def steer_(
    hidden: Tensor,
    pool: Tensor,
    codes: Tensor,
    params: Tensor,
    slot_ids: Tensor,
    strengths: Tensor,
    gates: Tensor,
    residual: Tensor | None = None,
) -> None:
    """Apply each token's interventions of one layer to its residual row, in place.

    Dispatches to the backend of `hidden.device`. Semantics, shapes and dtypes: `reference.steer_`.

    Raises:
        ValueError: a shape, dtype or stride does not fit; the message names it, what is expected and the remedy.
    """
    _check_rows("hidden", hidden)
    if residual is not None:
        _check_like_hidden(residual, hidden)
    _check_tables(hidden, pool, codes, params, slot_ids, strengths, gates)
    torch.ops.expertsteer.steer_(hidden, pool, codes, params, slot_ids, strengths, gates, residual)


def steer_add_rms_norm_(
    hidden: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    weight_offset: float,
    pool: Tensor,
    codes: Tensor,
    params: Tensor,
    slot_ids: Tensor,
    strengths: Tensor,
    gates: Tensor,
) -> None:
    """Residual add, the interventions of one layer, and the RMSNorm that follows, in one pass, in place.

    Dispatches to the backend of `hidden.device`. Semantics, shapes and dtypes: `reference.steer_add_rms_norm_`.

    Raises:
        ValueError: a shape, dtype or stride does not fit; the message names it, what is expected and the remedy.
    """
    _check_rows("hidden", hidden)
    _check_like_hidden(residual, hidden)
    if weight is not None and (weight.shape != hidden.shape[1:] or weight.dtype not in _FLOATS):
        raise ValueError(
            f"weight is {weight.dtype} {tuple(weight.shape)}, expected [{hidden.shape[1]}] of bfloat16, float16 or "
            "float32"
        )
    _check_tables(hidden, pool, codes, params, slot_ids, strengths, gates)
    torch.ops.expertsteer.steer_add_rms_norm_(
        hidden, residual, weight, epsilon, weight_offset, pool, codes, params, slot_ids, strengths, gates
    )


def _check_rows(name: str, rows: Tensor, first: str = "num_tokens") -> None:
    if rows.dim() != 2:
        raise ValueError(f"{name} {tuple(rows.shape)} must be [{first}, hidden_size]")
    if rows.dtype not in _FLOATS:
        raise ValueError(f"{name} is {rows.dtype}, expected bfloat16, float16 or float32")
    if rows.stride(1) != 1:
        raise ValueError(f"{name} has stride {rows.stride(1)} within a row, expected 1: call .contiguous()")


def _check_like_hidden(residual: Tensor, hidden: Tensor) -> None:
    _check_rows("residual", residual)
    if residual.shape != hidden.shape or residual.dtype != hidden.dtype:
        raise ValueError(
            f"residual is {residual.dtype} {tuple(residual.shape)}, expected {hidden.dtype} {tuple(hidden.shape)} "
            "like hidden"
        )


def _check_tables(
    hidden: Tensor,
    pool: Tensor,
    codes: Tensor,
    params: Tensor,
    slot_ids: Tensor,
    strengths: Tensor,
    gates: Tensor,
) -> None:
    _check_rows("pool", pool, "num_rows")
    num_tokens, hidden_size = hidden.shape
    if pool.shape[1] != hidden_size:
        raise ValueError(f"pool {tuple(pool.shape)} must be [num_rows, {hidden_size}], rows as long as hidden's")
    if codes.dim() != 3 or codes.shape[2] != CODE_WIDTH:
        raise ValueError(f"codes {tuple(codes.shape)} must be [num_slots, max_ops, {CODE_WIDTH}]")
    if params.shape != (*codes.shape[:2], PARAM_WIDTH):
        raise ValueError(
            f"params {tuple(params.shape)} must be {(*codes.shape[:2], PARAM_WIDTH)}, one entry per entry of codes"
        )
    for name, tensor, dtype in (
        ("codes", codes, torch.int32),
        ("params", params, torch.float32),
        ("slot_ids", slot_ids, torch.int32),
        ("strengths", strengths, torch.float32),
        ("gates", gates, torch.float32),
    ):
        if tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype}, expected {dtype}: convert it with .to({dtype})")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}, expected contiguous: call .contiguous()")
    for name, tensor in (("slot_ids", slot_ids), ("strengths", strengths)):
        if tensor.dim() != 1 or tensor.shape[0] < num_tokens:
            raise ValueError(f"{name} {tuple(tensor.shape)} must be [>= {num_tokens}], one entry per token")
    if gates.dim() != 2 or gates.shape[0] < num_tokens:
        raise ValueError(f"gates {tuple(gates.shape)} must be [>= {num_tokens}, num_gates], one row per token")
