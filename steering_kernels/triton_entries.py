"""What the Triton kernels do to a row that they hold in registers: the entries of its slot, one after the other."""

import torch
import triton
import triton.language as tl

from steering_kernels.table import CODE_WIDTH, PARAM_WIDTH, Code, Flag, Kind, Param

# Kernels see constexpr globals only, and only those are part of the key under which Triton caches what it compiled.
_END, _ADD, _ADD_RELATIVE, _PROJECT, _CLAMP, _GATED_ADD, _FEATURE, _ROTATE, _AFFINE, _CONDITION = (
    tl.constexpr(int(kind)) for kind in Kind
)
_KIND, _READ, _WRITE, _READ2, _WRITE2, _GATE, _GATE_OUT, _FLAGS = (tl.constexpr(int(column)) for column in Code)
_SCALE, _A, _B, _C = (tl.constexpr(int(column)) for column in Param)
_KEEP_NORM, _COSINE, _HARD, _ABSOLUTE, _JUMP_RELU, _IDENTITY, _EDIT_SET, _EDIT_ADD = (
    tl.constexpr(int(flag)) for flag in Flag
)
_CODE_WIDTH, _PARAM_WIDTH = tl.constexpr(CODE_WIDTH), tl.constexpr(PARAM_WIDTH)
_TINY, _PI = tl.constexpr(torch.finfo(torch.float32).tiny), tl.constexpr(torch.pi)


@triton.jit
def steered(
    x,
    columns,
    pool,
    pool_stride,
    codes,
    params,
    max_ops,
    token,
    slot,
    strengths,
    gates,
    NUM_GATES: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    GATE_BLOCK: tl.constexpr,
):
    """The row x, [BLOCK] fp32, after the entries of its slot, and 1 if one of them changed it; slot -1 has none."""
    # The gates stay in registers: a value stored by one thread would reach the others only through a barrier.
    gate_columns = tl.arange(0, GATE_BLOCK)
    gate_row = gates + token * NUM_GATES + gate_columns
    gate_values = tl.load(gate_row, mask=(gate_columns < NUM_GATES) & (slot >= 0), other=0.0)
    token_strength = tl.load(strengths + token)
    num_entries = tl.where(slot >= 0, max_ops, 0)
    codes += slot.to(tl.int64) * max_ops * _CODE_WIDTH
    params += slot.to(tl.int64) * max_ops * _PARAM_WIDTH
    changed = 0
    index = 0
    kind = tl.load(codes + _KIND, mask=num_entries > 0, other=_END)
    while kind != _END:
        gate = tl.load(codes + _GATE)
        strength = token_strength * tl.load(params + _SCALE)
        if gate >= 0:
            strength *= tl.sum(tl.where(gate_columns == gate, gate_values, 0.0))
        if kind == _CONDITION:
            p = _reading(x, columns, pool, pool_stride, codes, HIDDEN_SIZE)
            slope = tl.load(params + _B) * (p - tl.load(params + _A))
            is_out = gate_columns == tl.load(codes + _GATE_OUT)
            gate_values = tl.where(is_out, _gate(slope, tl.load(codes + _FLAGS)), gate_values)
            tl.store(gate_row, gate_values, mask=is_out)
        elif strength != 0.0:
            x = _after_entry(x, columns, pool, pool_stride, codes, params, kind, strength, HIDDEN_SIZE)
            changed = 1
        index += 1
        codes += _CODE_WIDTH
        params += _PARAM_WIDTH
        kind = tl.load(codes + _KIND, mask=index < num_entries, other=_END)
    return x, changed


@triton.jit
def _after_entry(x, columns, pool, pool_stride, codes, params, kind, strength, HIDDEN_SIZE: tl.constexpr):
    """The row after one entry other than CONDITION; at most one row of the pool is in registers at a time."""
    flags = tl.load(codes + _FLAGS)
    old_norm = 0.0
    if (kind == _ADD_RELATIVE) | ((flags & _KEEP_NORM) != 0):
        old_norm = _norm(x)
    to_write = strength
    if kind == _ADD_RELATIVE:
        to_write *= old_norm
    elif kind == _AFFINE:
        x += strength * (_pool_row(pool, pool_stride, tl.load(codes + _READ), columns, HIDDEN_SIZE) * x)
    elif kind != _ADD:
        p = _reading(x, columns, pool, pool_stride, codes, HIDDEN_SIZE)
        if kind == _ROTATE:
            q = tl.sum(_pool_row(pool, pool_stride, tl.load(codes + _READ2), columns, HIDDEN_SIZE) * x)
            turn = _turn(p, q, tl.load(params + _A), strength, flags)
            to_write = tl.cos(turn) * p - tl.sin(turn) * q - p
            to_write2 = tl.sin(turn) * p + tl.cos(turn) * q - q
            x += to_write2 * _pool_row(pool, pool_stride, tl.load(codes + _WRITE2), columns, HIDDEN_SIZE)
        else:
            to_write *= _function(kind, flags, p, tl.load(params + _A), tl.load(params + _B), tl.load(params + _C))
    x += to_write * _pool_row(pool, pool_stride, tl.load(codes + _WRITE), columns, HIDDEN_SIZE)
    if (flags & _KEEP_NORM) != 0:
        new_norm = _norm(x)
        x *= tl.where(new_norm > 0, old_norm / new_norm, 1.0)
    return x


@triton.jit
def _pool_row(pool, stride, index, columns, HIDDEN_SIZE: tl.constexpr):
    """Row of the pool, [BLOCK] fp32; zeros where the index is -1."""
    mask = (columns < HIDDEN_SIZE) & (index >= 0)
    return tl.load(pool + index.to(tl.int64) * stride + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _norm(x):
    return tl.sqrt_rn(tl.sum(x * x))


@triton.jit
def _reading(x, columns, pool, pool_stride, codes, HIDDEN_SIZE: tl.constexpr):
    """p, the product of the entry's read row with the row x, over the norm of x with COSINE."""
    p = tl.sum(_pool_row(pool, pool_stride, tl.load(codes + _READ), columns, HIDDEN_SIZE) * x)
    if (tl.load(codes + _FLAGS) & _COSINE) != 0:
        p = p / tl.maximum(_norm(x), _TINY)
    return p


@triton.jit
def _function(kind, flags, p, a, b, c):
    """What the kinds that write a function of p multiply the strength with."""
    value = -p
    if kind == _CLAMP:
        bounded = tl.maximum(p, a, propagate_nan=tl.PropagateNan.ALL)
        value = tl.minimum(bounded, b, propagate_nan=tl.PropagateNan.ALL) - p
    elif kind == _GATED_ADD:
        value = _gate(b * (p - a), flags)
    elif kind == _FEATURE:
        value = _feature_change(p + a, b, c, flags)
    return value


@triton.jit
def _gate(slope, flags):
    return tl.where((flags & _HARD) != 0, tl.where(slope > 0, 1.0, 0.0), tl.sigmoid(slope))


@triton.jit
def _feature_change(z, b, c, flags):
    """Edited activation minus activation."""
    jump = tl.where(z > b, z, 0.0)
    # Not tl.maximum: NaN stays NaN, as in the reference.
    v = tl.where((flags & _JUMP_RELU) != 0, jump, tl.where(z < 0, 0.0, z))
    v = tl.where((flags & _IDENTITY) != 0, z, v)
    edited = tl.where((flags & _EDIT_ADD) != 0, v + c, c * v)
    return tl.where((flags & _EDIT_SET) != 0, c, edited) - v


@triton.jit
def _turn(p, q, a, strength, flags):
    """Angle, in radians, by which ROTATE turns (p, q)."""
    missing = a - _atan2(q, p)
    missing -= 2 * _PI * tl.ceil((missing - _PI) / (2 * _PI))
    return strength * tl.where((flags & _ABSOLUTE) != 0, missing, a)


@triton.jit
def _atan2(y, x):
    """atan2 in fp32, absolute error below 4e-7; 0 at the origin, where there is nothing to turn.

    The arctangent of t in [0, 1] is t times a polynomial in t^2, interpolated at ten Chebyshev nodes (error 1.6e-9).
    triton.language has no atan2, and libdevice's does not run in the interpreter.
    """
    large = tl.maximum(tl.abs(x), tl.abs(y))
    small = tl.minimum(tl.abs(x), tl.abs(y))
    t = small / tl.where(large > 0, large, 1.0)
    u = t * t
    angle = -0.0017011701 * u + 0.0104876496
    angle = angle * u - 0.0303518660
    angle = angle * u + 0.0570895560
    angle = angle * u - 0.0834972486
    angle = angle * u + 0.1093234122
    angle = angle * u - 0.1426001638
    angle = angle * u + 0.1999807507
    angle = angle * u - 0.3333327770
    angle = (angle * u + 1.0) * t
    angle = tl.where(tl.abs(y) > tl.abs(x), _PI / 2 - angle, angle)
    angle = tl.where(x < 0, _PI - angle, angle)
    return tl.where(y < 0, -angle, angle)
