"""Readable torch implementation of the steering operator: the truth every backend is tested against."""

import torch
from torch import Tensor


def steer_reference_(
    hidden: Tensor, pool: Tensor, write_rows: Tensor, scales: Tensor, slot_ids: Tensor, strengths: Tensor
) -> None:
    """Add each token's steering vectors of one layer to its residual row, in place.

    Semantics:
        s = slot_ids[t]
        hidden[t] += strengths[t] * sum_o scales[s, o] * pool[write_rows[s, o]]   if s >= 0, over o with write_rows >= 0

    Args:
        hidden: [num_tokens, hidden_size], bf16 | fp16 | fp32. Changed in place. num_tokens may be 0.
        pool: [num_rows, hidden_size], bf16 | fp16 | fp32, finite.
        write_rows: [num_slots, max_ops], int32. Row of the pool, -1 for none.
        scales: [num_slots, max_ops], fp32.
        slot_ids: [>= num_tokens], int32. -1 leaves the row bit-identical.
        strengths: [>= num_tokens], fp32. Products and sums are fp32, rounded once on store.
    """
    num_tokens = hidden.shape[0]
    steer = _steer_on_host_ if hidden.device.type == "cpu" else _steer_on_device_
    steer(hidden, pool, write_rows, scales, slot_ids[:num_tokens], strengths[:num_tokens])


def _steer_on_device_(
    hidden: Tensor, pool: Tensor, write_rows: Tensor, scales: Tensor, slots: Tensor, strengths: Tensor
) -> None:
    """No branch on data: this is captured into CUDA graphs, where a Python `if` would be decided once and for all."""
    safe_slots = slots.clamp_min(0).long()
    rows = write_rows[safe_slots]
    active = (rows >= 0) & (slots >= 0)[:, None]
    factors = torch.where(active, strengths[:, None] * scales[safe_slots], 0.0)
    delta = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for op in range(write_rows.shape[1]):
        delta.addcmul_(factors[:, op, None], pool[rows[:, op].clamp_min(0).long()].float())
    steered = (hidden.float() + delta).to(hidden.dtype)
    hidden.copy_(torch.where(active.any(1, keepdim=True), steered, hidden))


def _steer_on_host_(
    hidden: Tensor, pool: Tensor, write_rows: Tensor, scales: Tensor, slots: Tensor, strengths: Tensor
) -> None:
    """Looking at the data is free here: leave early, and touch steered rows only."""
    rows = write_rows.index_select(0, slots.clamp_min(0))
    active = (rows >= 0) & (slots >= 0)[:, None]
    tokens = active.any(1).nonzero().squeeze(1)
    if tokens.numel() == 0:
        return
    steered, rows, active = hidden[tokens].float(), rows[tokens].clamp_min(0), active[tokens]
    factors = torch.where(active, strengths[tokens, None] * scales[slots[tokens]], 0.0)
    for op in active.any(0).nonzero().squeeze(1).tolist():
        steered.addcmul_(factors[:, op, None], pool.index_select(0, rows[:, op]).float())
    hidden[tokens] = steered.to(hidden.dtype)
