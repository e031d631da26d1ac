"""Registration of the steering operator with torch, so that it goes through torch.compile and CUDA graphs."""

import torch
from torch import Tensor

from steering_kernels.native import has_kernel, steer_cpu_
from steering_kernels.reference import steer_reference_

# Part of vLLM's compile-cache key: raise it whenever the schema or the meaning of an operator changes.
OPS_VERSION = 1

_library = torch.library.Library("expertsteer", "DEF")
_library.define(
    "steer_(Tensor(a!) hidden, Tensor pool, Tensor write_rows, Tensor scales, Tensor slot_ids, Tensor strengths) -> ()"
)
_library.impl("steer_", steer_cpu_, "CPU")
_library.impl("steer_", steer_reference_, "CUDA")


def _steer_fake(
    hidden: Tensor, pool: Tensor, write_rows: Tensor, scales: Tensor, slot_ids: Tensor, strengths: Tensor
) -> None:
    """Mutates `hidden` and returns nothing: there is no shape to infer."""


torch.library.register_fake("expertsteer::steer_", _steer_fake)


def steer_(
    hidden: Tensor, pool: Tensor, write_rows: Tensor, scales: Tensor, slot_ids: Tensor, strengths: Tensor
) -> None:
    """Apply each token's steering vectors of one layer to the residual stream, in place.

    Dispatches to the backend of `hidden.device`. Semantics, shapes and dtypes: `reference.steer_reference_`.

    Raises:
        ValueError: a shape or dtype does not fit; the message names it and what is expected.
    """
    _check(hidden, pool, write_rows, scales, slot_ids, strengths)
    torch.ops.expertsteer.steer_(hidden, pool, write_rows, scales, slot_ids, strengths)


def backend(device_type: str, dtype: torch.dtype) -> str:
    """Name of the backend that runs for a residual stream on "cpu" or "cuda": `cpu` or `reference`."""
    return "cpu" if device_type == "cpu" and has_kernel(dtype) else "reference"


def _check(
    hidden: Tensor, pool: Tensor, write_rows: Tensor, scales: Tensor, slot_ids: Tensor, strengths: Tensor
) -> None:
    if hidden.dim() != 2 or pool.dim() != 2 or hidden.shape[1] != pool.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and pool {tuple(pool.shape)} must be "
            "[num_tokens, hidden_size] and [num_rows, hidden_size] of one hidden_size"
        )
    if write_rows.dim() != 2 or write_rows.shape != scales.shape:
        raise ValueError(
            f"write_rows {tuple(write_rows.shape)} and scales {tuple(scales.shape)} must both be [num_slots, max_ops]"
        )
    for name, tensor, dtype in (
        ("write_rows", write_rows, torch.int32),
        ("scales", scales, torch.float32),
        ("slot_ids", slot_ids, torch.int32),
        ("strengths", strengths, torch.float32),
    ):
        if tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype}, expected {dtype}: convert it with .to({dtype})")
    for name, tensor in (("hidden", hidden), ("pool", pool)):
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"{name} is {tensor.dtype}, expected bfloat16, float16 or float32")
    for name, tensor in (("slot_ids", slot_ids), ("strengths", strengths)):
        if tensor.dim() != 1 or tensor.shape[0] < hidden.shape[0]:
            raise ValueError(f"{name} {tuple(tensor.shape)} must be [>= {hidden.shape[0]}], one entry per token")
