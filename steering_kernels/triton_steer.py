"""The `triton` backend: one program per token, whose row stays in registers from its load to its only store.

Semantics, shapes and dtypes are those of `reference`. Kinds, flags and gates are the same for a whole row, so a program
takes every branch as a whole. The host neither reads data nor allocates nor waits, and nothing is compiled for another
number of tokens, so launches may be captured into CUDA graphs.

With TRITON_INTERPRET=1 set before this module is imported, the same kernels run on the host, slowly.
"""

import subprocess

import torch
import triton
import triton.language as tl
from torch import Tensor

from steering_kernels.triton_entries import steered

_ELEMENTS_PER_THREAD, _MAX_WARPS = 16, 16

_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def supports(device_type: str, dtype: torch.dtype) -> bool:
    """Whether the kernels run here on "cpu" or "cuda"; they take every dtype of `reference`.

    On "cuda" that needs a GPU and the C compiler with which Triton builds its launcher; on "cpu" the interpreter.
    """
    if _INTERPRETED.value or device_type != "cuda":
        return bool(_INTERPRETED.value) and device_type == "cpu"
    try:
        return bool(triton.runtime.driver.active.get_current_target().backend == "cuda")
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError):
        return False


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
    """As `reference.steer_`; a token of slot -1 ends its program before a row is loaded."""
    num_tokens, hidden_size = hidden.shape
    if num_tokens == 0:
        return
    # Triton launches on the current device, which need not be the one that holds the tensors.
    with torch.cuda.device_of(hidden):
        _steer_kernel[(num_tokens,)](
            hidden,
            hidden.stride(0),
            residual,
            0 if residual is None else residual.stride(0),
            *(pool, pool.stride(0), codes, params, codes.shape[1], slot_ids, strengths, gates),
            **launch_options(hidden_size, gates.shape[1]),
        )


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
    """As `reference.steer_add_rms_norm_`: two rows read and two written, plus the pool rows of the entries."""
    num_tokens, hidden_size = hidden.shape
    if num_tokens == 0:
        return
    with torch.cuda.device_of(hidden):
        _steer_add_rms_norm_kernel[(num_tokens,)](
            hidden,
            hidden.stride(0),
            residual,
            residual.stride(0),
            weight,
            0 if weight is None else weight.stride(0),
            epsilon,
            weight_offset,
            *(pool, pool.stride(0), codes, params, codes.shape[1], slot_ids, strengths, gates),
            **launch_options(hidden_size, gates.shape[1]),
        )


def launch_options(hidden_size: int, num_gates: int) -> dict[str, int]:
    """What a kernel is compiled for. Blocks are the sizes, in elements, of what a program holds in registers.

    16 elements per thread, two loads of 16 bytes for a row of bf16, up to 16 warps; half of the threads' lanes may idle
    where hidden_size is no power of 2.
    """
    block = triton.next_power_of_2(hidden_size)
    return {
        "NUM_GATES": num_gates,
        "HIDDEN_SIZE": hidden_size,
        "BLOCK": block,
        "GATE_BLOCK": triton.next_power_of_2(max(num_gates, 1)),
        "num_warps": min(max(block // (32 * _ELEMENTS_PER_THREAD), 1), _MAX_WARPS),
    }


@triton.jit
def _steer_kernel(
    hidden,
    hidden_stride,
    residual,
    residual_stride,
    pool,
    pool_stride,
    codes,
    params,
    max_ops,
    slot_ids,
    strengths,
    gates,
    NUM_GATES: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    GATE_BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ids + token)
    if slot < 0:
        return
    columns = tl.arange(0, BLOCK)
    inside = columns < HIDDEN_SIZE
    row = hidden + token * hidden_stride + columns
    x = tl.load(row, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        base = tl.load(residual + token * residual_stride + columns, mask=inside, other=0.0)
        x += base.to(tl.float32)
    tables = pool, pool_stride, codes, params, max_ops, token, slot, strengths, gates
    x, changed = steered(x, columns, *tables, NUM_GATES, HIDDEN_SIZE, GATE_BLOCK)
    if residual is not None:
        x -= base.to(tl.float32)
    tl.store(row, _rounded(x, hidden.dtype.element_ty), mask=inside & (changed != 0))


@triton.jit
def _steer_add_rms_norm_kernel(
    hidden,
    hidden_stride,
    residual,
    residual_stride,
    weight,
    weight_stride,
    epsilon,
    weight_offset,
    pool,
    pool_stride,
    codes,
    params,
    max_ops,
    slot_ids,
    strengths,
    gates,
    NUM_GATES: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    GATE_BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ids + token)
    columns = tl.arange(0, BLOCK)
    inside = columns < HIDDEN_SIZE
    row = hidden + token * hidden_stride + columns
    residual_row = residual + token * residual_stride + columns
    x = tl.load(row, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(residual_row, mask=inside, other=0.0).to(tl.float32)
    tables = pool, pool_stride, codes, params, max_ops, token, slot, strengths, gates
    x, _ = steered(x, columns, *tables, NUM_GATES, HIDDEN_SIZE, GATE_BLOCK)
    tl.store(residual_row, _rounded(x, residual.dtype.element_ty), mask=inside)
    x *= tl.rsqrt(tl.sum(x * x) / HIDDEN_SIZE + epsilon)
    if weight is not None:
        x *= tl.load(weight + columns * weight_stride, mask=inside, other=0.0).to(tl.float32) + weight_offset
    tl.store(row, _rounded(x, hidden.dtype.element_ty), mask=inside)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """The row in the dtype it is stored in, rounded to nearest, ties to even."""
    # The interpreter would cut bf16 off instead of rounding it.
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(x == x, bits, 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)
