"""Readable torch implementation of the steering operator: the truth every backend is tested against."""

import math

import torch
from torch import Tensor

from steering_kernels.table import Code, Flag, Kind, Param


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

    Semantics, for every token t with slot = slot_ids[t] >= 0, all in fp32:
        x = hidden[t] + residual[t]                                     (hidden[t] alone without residual)
        for i in range(max_ops), until codes[slot, i, KIND] is END:
            s = strengths[t] * params[slot, i, SCALE] * (gates[t, GATE] if GATE >= 0 else 1);  a, b, c = params[slot, i]
            p = pool[READ] . x;  q = pool[READ2] . x;  with COSINE p = p / |x|;  step or sigmoid: g(z)
            ADD           x += s * pool[WRITE]
            ADD_RELATIVE  x += s * |x| * pool[WRITE]
            PROJECT       x += s * -p * pool[WRITE]
            CLAMP         x += s * (min(max(p, a), b) - p) * pool[WRITE]
            GATED_ADD     x += s * g(b * (p - a)) * pool[WRITE]
            FEATURE       v = activation(p + a);  x += s * (edit(v; c) - v) * pool[WRITE]
            ROTATE        t = s * a, or with ABSOLUTE s * wrap(a - atan2(q, p));  (p, q) turned by t is (p', q')
                          x += (p' - p) * pool[WRITE] + (q' - q) * pool[WRITE2]
            AFFINE        x += s * (pool[READ] * x + pool[WRITE])        (elementwise; row -1 counts as zeros)
            CONDITION     gates[t, GATE_OUT] = g(b * (p - a));  x as it is, whatever s
            KEEP_NORM     x *= |x before this entry| / |x|               (unless |x| is 0)
        hidden[t] = x - residual[t], rounded once; not written at all when no entry changed x
    An entry with s == 0 changes nothing, bit for bit. g is the sigmoid, with HARD the step z > 0. Activations: relu;
    JUMP_RELU z if z > b else 0; IDENTITY. Edits: c * v; EDIT_SET c; EDIT_ADD v + c. wrap maps to (-pi, pi].

    Args:
        hidden: [num_tokens, hidden_size], bf16 | fp16 | fp32, unit stride in a row. Changed in place. num_tokens may
            be 0.
        pool: [num_rows, hidden_size], bf16 | fp16 | fp32, finite.
        codes: [num_slots, max_ops, CODE_WIDTH], int32; columns `table.Code`.
        params: [num_slots, max_ops, PARAM_WIDTH], fp32; columns `table.Param`.
        slot_ids: [>= num_tokens], int32. -1 leaves the row bit-identical.
        strengths: [>= num_tokens], fp32.
        gates: [>= num_tokens, num_gates], fp32. Changed in place by CONDITION.
        residual: like hidden, or None.
    """
    x, changed = _steered(hidden, residual, pool, codes, params, slot_ids, strengths, gates)
    written = x if residual is None else x - residual.float()
    hidden.copy_(torch.where(changed[:, None], written.to(hidden.dtype), hidden))


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

    Semantics, for every token t, all in fp32:
        x = hidden[t] + residual[t];  steered as in `steer_`
        residual[t] = x;  hidden[t] = x / sqrt(mean(x ** 2) + epsilon) * (weight_offset + weight)

    Each result is rounded once. (RMSNorm: Zhang and Sennrich, arXiv 1910.07467; weight_offset 1 is Gemma's variant.)

    Args:
        hidden: [num_tokens, hidden_size], bf16 | fp16 | fp32. Gets the normalised row.
        residual: like hidden. Gets the steered residual stream.
        weight: [hidden_size], bf16 | fp16 | fp32, or None for a norm without weight, which multiplies by 1.
        epsilon: added to the mean square.
        weight_offset: added to the weight; not used without weight.

    The other arguments are those of `steer_`.
    """
    x, _ = _steered(hidden, residual, pool, codes, params, slot_ids, strengths, gates)
    residual.copy_(x.to(residual.dtype))
    normed = x * torch.rsqrt(x.square().mean(1, keepdim=True) + epsilon)
    if weight is not None:
        normed = normed * (weight.float() + weight_offset)
    hidden.copy_(normed.to(hidden.dtype))


def _steered(
    hidden: Tensor,
    residual: Tensor | None,
    pool: Tensor,
    codes: Tensor,
    params: Tensor,
    slot_ids: Tensor,
    strengths: Tensor,
    gates: Tensor,
) -> tuple[Tensor, Tensor]:
    """The residual rows after all entries, [num_tokens, hidden_size] fp32, and which of them changed, [num_tokens].

    Branches on data on the host only: on a device this may be captured into a CUDA graph, where a Python `if` would be
    decided once and for all.
    """
    num_tokens = hidden.shape[0]
    slots, strengths, gates = slot_ids[:num_tokens], strengths[:num_tokens], gates[:num_tokens]
    x = hidden.float() if residual is None else hidden.float() + residual.float()
    changed = torch.zeros(num_tokens, dtype=torch.bool, device=hidden.device)
    running = slots >= 0
    on_host = hidden.device.type == "cpu"
    safe_slots = slots.clamp_min(0).long()
    for index in range(codes.shape[1]):
        code, param = codes[safe_slots, index], params[safe_slots, index]
        running = running & (code[:, Code.KIND] != Kind.END)
        if on_host and not running.any():
            break
        gate = gates.gather(1, code[:, Code.GATE].clamp_min(0).long()[:, None])[:, 0]
        strength = strengths * param[:, Param.SCALE] * torch.where(code[:, Code.GATE] >= 0, gate, 1.0)
        read, write = _rows(pool, code[:, Code.READ]), _rows(pool, code[:, Code.WRITE])
        norm = x.norm(dim=1)
        p = (read * x).sum(1)
        is_cosine = _has(code, Flag.COSINE)
        p = torch.where(is_cosine, p / norm.clamp_min(torch.finfo(torch.float32).tiny), p)
        a, b, c = param[:, Param.A], param[:, Param.B], param[:, Param.C]
        slope = b * (p - a)
        gate_value = torch.where(_has(code, Flag.HARD), (slope > 0).float(), torch.sigmoid(slope))
        coefficient = {
            Kind.ADD: strength,
            Kind.ADD_RELATIVE: strength * norm,
            Kind.PROJECT: strength * -p,
            Kind.CLAMP: strength * (torch.minimum(torch.maximum(p, a), b) - p),
            Kind.GATED_ADD: strength * gate_value,
            Kind.FEATURE: strength * _feature(p, a, b, c, code),
        }
        steered = x
        for kind, factor in coefficient.items():
            steered = torch.where(_is(code, kind), x + factor[:, None] * write, steered)
        read2, write2 = _rows(pool, code[:, Code.READ2]), _rows(pool, code[:, Code.WRITE2])
        q = (read2 * x).sum(1)
        turn = strength * torch.where(_has(code, Flag.ABSOLUTE), _wrapped(a - torch.atan2(q, p)), a)
        to_write = torch.cos(turn) * p - torch.sin(turn) * q - p
        to_write2 = torch.sin(turn) * p + torch.cos(turn) * q - q
        rotated = x + to_write[:, None] * write + to_write2[:, None] * write2
        steered = torch.where(_is(code, Kind.ROTATE), rotated, steered)
        steered = torch.where(_is(code, Kind.AFFINE), x + strength[:, None] * (read * x + write), steered)
        new_norm = steered.norm(dim=1)
        kept = _has(code, Flag.KEEP_NORM) & (new_norm > 0)
        steered = steered * torch.where(kept, norm / torch.where(kept, new_norm, 1.0), 1.0)[:, None]

        is_condition = code[:, Code.KIND] == Kind.CONDITION
        out = code[:, Code.GATE_OUT].clamp_min(0).long()[:, None]
        old = gates.gather(1, out)
        gates.scatter_(1, out, torch.where((running & is_condition)[:, None], gate_value[:, None], old))

        applies = running & ~is_condition & (strength != 0)
        x = torch.where(applies[:, None], steered, x)
        changed = changed | applies
    return x, changed


def _rows(pool: Tensor, index: Tensor) -> Tensor:
    """Pool rows in fp32, [num_tokens, hidden_size]; zeros where the index is -1."""
    return torch.where((index >= 0)[:, None], pool[index.clamp_min(0).long()].float(), 0.0)


def _is(code: Tensor, kind: Kind) -> Tensor:
    return (code[:, Code.KIND] == kind)[:, None]


def _has(code: Tensor, flag: Flag) -> Tensor:
    return (code[:, Code.FLAGS] & int(flag)) != 0


def _feature(p: Tensor, a: Tensor, b: Tensor, c: Tensor, code: Tensor) -> Tensor:
    z = p + a
    jump = torch.where(z > b, z, 0.0)
    v = torch.where(_has(code, Flag.IDENTITY), z, torch.where(_has(code, Flag.JUMP_RELU), jump, z.clamp_min(0.0)))
    return torch.where(_has(code, Flag.EDIT_SET), c, torch.where(_has(code, Flag.EDIT_ADD), v + c, c * v)) - v


def _wrapped(angle: Tensor) -> Tensor:
    """The same angle in (-pi, pi]."""
    return angle - 2 * math.pi * torch.ceil((angle - math.pi) / (2 * math.pi))
