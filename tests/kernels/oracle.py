"""The text of `reference` as a slow loop over tokens in float64, and the comparison of a backend with it."""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from cases import EPSILON, Case
from estimate import UNIT, Estimate, exactly
from torch import Tensor

from steering_kernels import Code, Flag, Kind

# One rounding to the dtype: relative to the value, and half of the smallest number.
TOLERANCES = {
    torch.bfloat16: (2.0**-8, 2.0**-134),
    torch.float16: (2.0**-11, 2.0**-25),
    torch.float32: (2.0**-24, 2.0**-150),
}


class Steered(NamedTuple):
    """For every token: its row x after all entries, whether an entry applied to it, and its gates."""

    rows: list[Estimate]
    changed: list[bool]
    gates: list[list[Estimate]]


def gate_of(slope: Estimate, hard: bool) -> Estimate:
    if not hard:
        return slope.through(lambda z: (1 + np.tanh(z / 2)) / 2, 0.25)  # the sigmoid, without overflow
    # Nearer to the threshold than the rounding error, either answer is right.
    return Estimate(np.float64(slope.value > 0), np.float64(abs(slope.value) < slope.bound))


def edit(z: Estimate, flags: Flag, threshold: float, c: float) -> Estimate:
    """edit(v; c) - v with v = activation(z)."""
    if Flag.IDENTITY in flags:
        v = z
    elif Flag.JUMP_RELU in flags:
        undecided = abs(z.value - threshold) <= z.bound
        v = Estimate(z.value if z.value > threshold else 0.0, abs(z.value) + z.bound if undecided else z.bound)
    else:
        v = Estimate(max(z.value, 0.0), z.bound)
    if Flag.EDIT_SET in flags:
        edited = exactly(c)
    else:
        edited = v.plus(exactly(c)) if Flag.EDIT_ADD in flags else v.times(exactly(c))
    return edited.minus(v)


def angle_to(a: float, p: Estimate, q: Estimate) -> Estimate:
    """wrap(a - atan2(q, p))."""
    slope = (abs(p.value) * q.bound + abs(q.value) * p.bound) / (p.value**2 + q.value**2)
    difference = exactly(a).minus(Estimate(np.arctan2(q.value, p.value), slope + 16 * UNIT))
    turns = np.ceil((difference.value - math.pi) / (2 * math.pi))
    wrapped, bound = difference.value - 2 * math.pi * turns, difference.bound + 8 * UNIT
    return Estimate(wrapped, 2 * math.pi if math.pi - abs(wrapped) <= bound else bound)


def step(x: Estimate, kind: Kind, flags: Flag, s: Estimate, rows: Sequence[Estimate], abc: Sequence[float]) -> Estimate:
    """One entry other than CONDITION, without KEEP_NORM; rows are those of READ, WRITE, READ2, WRITE2."""
    (read, write, read2, write2), (a, b, c) = rows, abc
    p = read.times(x).sum()
    if kind is Kind.AFFINE:
        return x.plus(s.times(read.times(x).plus(write)))
    if kind is Kind.ROTATE:
        q = read2.times(x).sum()
        turn = s.times(angle_to(a, p, q) if Flag.ABSOLUTE in flags else exactly(a))
        cos, sin = turn.through(np.cos, 1), turn.through(np.sin, 1)
        new_p, new_q = cos.times(p).minus(sin.times(q)), sin.times(p).plus(cos.times(q))
        return x.plus(new_p.minus(p).times(write)).plus(new_q.minus(q).times(write2))
    if Flag.COSINE in flags:
        p = p.over(x.norm())
    factor = {
        Kind.ADD: lambda: exactly(1.0),
        Kind.ADD_RELATIVE: x.norm,
        Kind.PROJECT: lambda: exactly(0.0).minus(p),
        Kind.CLAMP: lambda: Estimate(min(max(p.value, a), b), p.bound).minus(p),
        Kind.GATED_ADD: lambda: gate_of(exactly(b).times(p.minus(exactly(a))), Flag.HARD in flags),
        Kind.FEATURE: lambda: edit(p.plus(exactly(a)), flags, b, c),
    }[kind]()
    return x.plus(s.times(factor).times(write))


def steered_row(case: Case, token: int, x: Estimate, gates: list[Estimate]) -> tuple[Estimate, bool]:
    """The documented semantics for one token; `gates` are changed in place."""
    slot, changed = int(case.slot_ids[token]), False
    for index in range(case.codes.shape[1] if slot >= 0 else 0):
        code = case.codes[slot, index].tolist()
        scale, *abc = case.params[slot, index].tolist()
        kind, flags = Kind(code[Code.KIND]), Flag(code[Code.FLAGS])
        if kind is Kind.END:
            break
        rows = [
            exactly(case.pool[code[column]]) if code[column] >= 0 else exactly(np.zeros(x.value.shape))
            for column in (Code.READ, Code.WRITE, Code.READ2, Code.WRITE2)
        ]
        if kind is Kind.CONDITION:
            p = rows[0].times(x).sum()
            p = p.over(x.norm()) if Flag.COSINE in flags else p
            gates[code[Code.GATE_OUT]] = gate_of(exactly(abc[1]).times(p.minus(exactly(abc[0]))), Flag.HARD in flags)
            continue
        s = exactly(case.strengths[token]).times(exactly(scale))
        s = s.times(gates[code[Code.GATE]]) if code[Code.GATE] >= 0 else s
        if s == (0, 0):
            continue
        new = step(x, kind, flags, s, rows, abc)
        if Flag.KEEP_NORM in flags and new.value.any():
            new = new.times(x.norm().over(new.norm()))
        x, changed = new, True
    return x, changed


def steered(case: Case, form: str) -> Steered:
    result = Steered([], [], [])
    for token in range(case.hidden.shape[0]):
        x = exactly(case.hidden[token])
        x = x if form == "in place" else x.plus(exactly(case.residual[token]))
        gates = [exactly(gate) for gate in case.gates[token]]
        x, changed = steered_row(case, token, x, gates)
        for results, value in zip(result, (x, changed, gates), strict=True):
            results.append(value)
    return result


def normed(x: Estimate, weight: Tensor | None, weight_offset: float) -> Estimate:
    mean = x.times(x).sum().over(exactly(x.value.size))
    square = mean.plus(exactly(EPSILON))
    root = np.sqrt(square.value)
    normal = x.over(Estimate(root, square.bound / (2 * root) + UNIT * root))
    return normal if weight is None else normal.times(exactly(weight).plus(exactly(weight_offset)))


def assert_row(actual: Tensor, expected: Estimate, what: str) -> None:
    roundoff, smallest = TOLERANCES[actual.dtype]
    bound = expected.bound + roundoff * (abs(expected.value) + expected.bound) + smallest
    excess = abs(actual.double().numpy() - expected.value) - bound
    assert (excess <= 0).all(), f"{what}: {int((~(excess <= 0)).sum())} elements off, worst by {excess.max()}"


def assert_matches(case: Case, before: Case, form: str, expected: Steered) -> None:
    """Everything that the operator wrote is right, and it wrote nothing else."""
    for token, (x, changed, gates) in enumerate(zip(*expected, strict=True)):
        if form == "fused":
            assert_row(case.residual[token], x, f"residual[{token}]")
            assert_row(case.hidden[token], normed(x, case.weight, case.weight_offset), f"hidden[{token}]")
        elif changed:
            minus = x if form == "in place" else x.minus(exactly(before.residual[token]))
            assert_row(case.hidden[token], minus, f"hidden[{token}]")
        else:
            assert torch.equal(case.hidden[token], before.hidden[token]), f"hidden[{token}] must stay as it is"
        for gate, value in enumerate(gates):
            assert_row(case.gates[token, gate], value, f"gates[{token}, {gate}]")
    num_tokens = case.hidden.shape[0]
    assert torch.equal(case.gates[num_tokens:], before.gates[num_tokens:])
    written = {"hidden", "gates"} | ({"residual"} if form == "fused" else set())
    for name in set(Case._fields) - written - {"weight_offset"}:
        old, new = getattr(before, name), getattr(case, name)
        assert old is new is None or torch.equal(old.nan_to_num(), new.nan_to_num()), f"{name} was changed"


def check(backend: ModuleType, case: Case, form: str, expected: Steered | None = None) -> None:
    """Run a case, which is changed, and compare."""
    before = case.clone()
    case.run(backend, form)
    assert_matches(case, before, form, steered(before, form) if expected is None else expected)
