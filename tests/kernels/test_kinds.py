"""Each kind of entry, each flag and their order, on every backend against the slow loop of `oracle`."""

import math
from types import ModuleType

import pytest
import torch
from cases import FORMS, READS, SMALL, WRITES, make_case
from oracle import check

from steering_kernels import Flag, Kind
from steering_kernels.entry import Entry

NUM_TOKENS = 6
R, R2, W, W2 = READS[0], READS[1], WRITES[0], WRITES[1]
PROGRAMS: dict[str, list[Entry]] = {
    "nothing": [],
    "add": [Entry(Kind.ADD, write=W)],
    "add, the same row three times": [Entry(Kind.ADD, write=W, scale=scale) for scale in (1.0, 0.25, -0.5)],
    "add relative": [Entry(Kind.ADD_RELATIVE, write=W, scale=0.1)],
    "project": [Entry(Kind.PROJECT, R, R)],
    "project, write other than read": [Entry(Kind.PROJECT, R, W)],
    "clamp": [Entry(Kind.CLAMP, R, R, a=-0.5, b=1.0)],
    "clamp from above": [Entry(Kind.CLAMP, R, R, a=-math.inf, b=-1.0)],
    "clamp from below": [Entry(Kind.CLAMP, R, R, a=1.0, b=math.inf)],
    "clamp to a value": [Entry(Kind.CLAMP, R, R, a=2.0, b=2.0)],
    "gated add": [Entry(Kind.GATED_ADD, R, W, a=0.5, b=1.5)],
    "gated add, below": [Entry(Kind.GATED_ADD, R, W, a=0.5, b=-1.5)],
    "gated add, hard": [Entry(Kind.GATED_ADD, R, W, flags=Flag.HARD, a=0.5, b=1.0)],
    "gated add, hard, below": [Entry(Kind.GATED_ADD, R, W, flags=Flag.HARD, a=0.5, b=-1.0)],
    "gated add, cosine": [Entry(Kind.GATED_ADD, R, W, flags=Flag.COSINE, a=0.1, b=10.0)],
    "gated add, cosine, hard": [Entry(Kind.GATED_ADD, R, W, flags=Flag.COSINE | Flag.HARD, a=0.1, b=10.0)],
    "gated add, saturated": [Entry(Kind.GATED_ADD, R, W, b=1e4)],
    "rotate by": [Entry(Kind.ROTATE, R, R, R2, R2, a=2.5)],
    "rotate to": [Entry(Kind.ROTATE, R, R, R2, R2, flags=Flag.ABSOLUTE, a=-2.5)],
    "rotate, other rows": [Entry(Kind.ROTATE, R, W, R2, W2, a=-1.0)],
    "affine": [Entry(Kind.AFFINE, SMALL[0], SMALL[1])],
    "affine without factors": [Entry(Kind.AFFINE, write=W)],
    "affine without offset": [Entry(Kind.AFFINE, W)],
    "condition": [Entry(Kind.CONDITION, R, gate_out=2, a=0.5, b=1.5)],
    "condition, hard": [Entry(Kind.CONDITION, R, gate_out=7, flags=Flag.HARD, a=0.5, b=-1.5)],
    "condition, cosine": [Entry(Kind.CONDITION, R, gate_out=0, flags=Flag.COSINE, a=0.1, b=10.0)],
    "condition of no strength": [Entry(Kind.CONDITION, R, gate_out=0, scale=0.0, b=1.0)],
    "condition, then what it gates": [
        Entry(Kind.CONDITION, R, gate_out=3, b=1.0),
        Entry(Kind.ADD, write=W, gate=3),
        Entry(Kind.CONDITION, R2, gate_out=3, flags=Flag.HARD, b=1.0),
        Entry(Kind.ADD, write=W2, gate=3),
    ],
    "project, then add": [Entry(Kind.PROJECT, R, R), Entry(Kind.ADD, write=W)],
    "add, then project": [Entry(Kind.ADD, write=W), Entry(Kind.PROJECT, R, R)],
    "eight entries": [
        Entry(Kind.ADD, write=W),
        Entry(Kind.CLAMP, R, R, a=-1.0, b=1.0),
        Entry(Kind.CONDITION, R2, gate_out=1, b=1.0),
        Entry(Kind.ROTATE, R, R, R2, R2, a=1.0),
        Entry(Kind.GATED_ADD, R2, W2, gate=1, b=2.0),
        Entry(Kind.AFFINE, SMALL[0], SMALL[1], flags=Flag.KEEP_NORM),
        Entry(Kind.FEATURE, R, W, a=0.5, c=2.0),
        Entry(Kind.PROJECT, R2, R2),
    ],
}
_ACTIVATIONS = {"relu": Flag(0), "jump relu": Flag.JUMP_RELU, "identity": Flag.IDENTITY}
_EDITS = {"scale": Flag(0), "set": Flag.EDIT_SET, "add": Flag.EDIT_ADD}
PROGRAMS |= {
    f"feature, {activation}, {edit}": [
        Entry(Kind.FEATURE, R, W, flags=_ACTIVATIONS[activation] | _EDITS[edit], a=0.5, b=1.0, c=-2.5)
    ]
    for activation in _ACTIVATIONS
    for edit in _EDITS
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_kind(name: str, form: str, dtype: torch.dtype, each_backend: ModuleType) -> None:
    check(each_backend, make_case([PROGRAMS[name]], [0] * NUM_TOKENS, dtype=dtype), form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [name for name in PROGRAMS if not name.startswith("condition")])
def test_kind_with_keep_norm_and_gate(name: str, form: str, each_backend: ModuleType) -> None:
    entries = [
        entry if entry.kind is Kind.CONDITION else entry._replace(flags=entry.flags | Flag.KEEP_NORM, gate=4)
        for entry in PROGRAMS[name]
    ]
    check(each_backend, make_case([entries], [0] * NUM_TOKENS), form)


@pytest.mark.parametrize("form", FORMS)
def test_all_programs_in_one_batch(form: str, each_backend: ModuleType) -> None:
    check(each_backend, make_case(list(PROGRAMS.values()), [*range(len(PROGRAMS)), -1]), form)


@pytest.mark.parametrize("max_ops", [1, 3])
def test_other_numbers_of_entries(max_ops: int, each_backend: ModuleType) -> None:
    case = make_case([PROGRAMS["eight entries"]], [0] * NUM_TOKENS)
    codes, params = (table[:, :max_ops].contiguous() for table in (case.codes, case.params))
    check(each_backend, case._replace(codes=codes, params=params), "in place")


@pytest.mark.parametrize("num_gates", [2, 11])
def test_other_numbers_of_gates(num_gates: int, each_backend: ModuleType) -> None:
    case = make_case([PROGRAMS["eight entries"]], [0] * NUM_TOKENS)
    check(each_backend, case._replace(gates=torch.rand(NUM_TOKENS, num_gates)), "in place")


@pytest.mark.parametrize("form", FORMS)
def test_condition_at_one_layer_gates_a_later_one(form: str, each_backend: ModuleType) -> None:
    """Gates live on between the calls of one step; tokens whose condition is false stay bit-identical."""
    early, late = (
        make_case([[entry]], [0] * 12, seed=seed)
        for seed, entry in enumerate(
            [Entry(Kind.CONDITION, R, gate_out=5, flags=Flag.HARD, b=1.0), Entry(Kind.ADD, write=W, gate=5)]
        )
    )
    late = late._replace(gates=early.gates)
    check(each_backend, early, form)
    opened = late.gates[:12, 5].bool()
    assert 0 < opened.sum() < 12
    check(each_backend, late, form)
    unsteered = late._replace(slot_ids=torch.full_like(late.slot_ids, -1)).clone()
    check(each_backend, unsteered, form)
