"""Arguments that the operators refuse, with words that say what does not fit and what to do."""

import pytest
import torch
from cases import WRITES, make_case
from torch import Tensor

import steering_kernels
from steering_kernels import Kind
from steering_kernels.entry import Entry, pack

NUM_TOKENS, HIDDEN_SIZE, NUM_SLOTS = 6, 40, 2


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def integers(*shape: int) -> Tensor:
    return zeros(*shape, dtype=torch.int32)


EITHER_OPERATOR: list[tuple[dict[str, Tensor], list[str]]] = [
    ({"hidden": zeros(3, 4, 5)}, ["hidden (3, 4, 5)", "[num_tokens, hidden_size]"]),
    ({"hidden": zeros(6, 40, dtype=torch.float64)}, ["hidden is torch.float64", "bfloat16, float16 or float32"]),
    ({"hidden": zeros(40, 6).T}, ["hidden has stride 6", "expected 1", ".contiguous()"]),
    ({"residual": zeros(5, 40)}, ["residual is torch.float32 (5, 40)", "torch.float32 (6, 40)", "like hidden"]),
    ({"residual": zeros(6, 40).bfloat16()}, ["residual is torch.bfloat16", "torch.float32 (6, 40)"]),
    ({"residual": zeros(40, 6).T}, ["residual has stride 6", ".contiguous()"]),
    ({"pool": zeros(40)}, ["pool (40,)", "hidden_size]"]),
    ({"pool": zeros(9, 41)}, ["pool (9, 41)", "[num_rows, 40]"]),
    ({"pool": integers(9, 40)}, ["pool is torch.int32", "bfloat16, float16 or float32"]),
    ({"pool": zeros(40, 40).T}, ["pool has stride 40", ".contiguous()"]),
    ({"codes": integers(2, 8)}, ["codes (2, 8)", "[num_slots, max_ops, 8]"]),
    ({"codes": integers(2, 8, 7)}, ["codes (2, 8, 7)", "[num_slots, max_ops, 8]"]),
    ({"codes": integers(2, 3, 8)}, ["params (2, 8, 4)", "(2, 3, 4)", "one entry per entry of codes"]),
    ({"codes": zeros(2, 8, 8)}, ["codes is torch.float32", "torch.int32", ".to(torch.int32)"]),
    ({"codes": integers(8, 2, 8).transpose(0, 1)}, ["codes has strides", ".contiguous()"]),
    ({"params": zeros(2, 8, 3)}, ["params (2, 8, 3)", "(2, 8, 4)"]),
    ({"params": zeros(2, 8, 4).half()}, ["params is torch.float16", ".to(torch.float32)"]),
    ({"slot_ids": zeros(6).long()}, ["slot_ids is torch.int64", ".to(torch.int32)"]),
    ({"slot_ids": integers(5)}, ["slot_ids (5,)", "[>= 6]", "one entry per token"]),
    ({"slot_ids": integers(6, 1)}, ["slot_ids (6, 1)", "[>= 6]"]),
    ({"slot_ids": integers(12)[::2]}, ["slot_ids has strides (2,)", ".contiguous()"]),
    ({"strengths": zeros(6).double()}, ["strengths is torch.float64", ".to(torch.float32)"]),
    ({"strengths": zeros(5)}, ["strengths (5,)", "[>= 6]"]),
    ({"strengths": zeros()}, ["strengths ()", "[>= 6]"]),
    ({"gates": zeros(6, 8).half()}, ["gates is torch.float16", ".to(torch.float32)"]),
    ({"gates": zeros(5, 8)}, ["gates (5, 8)", "[>= 6, num_gates]", "one row per token"]),
    ({"gates": zeros(8)}, ["gates (8,)", "num_gates"]),
]
FUSED_ONLY: list[tuple[dict[str, Tensor], list[str]]] = [
    ({"weight": zeros(41)}, ["weight is torch.float32 (41,)", "[40]"]),
    ({"weight": zeros(1, 40)}, ["weight is torch.float32 (1, 40)", "[40]"]),
    ({"weight": integers(40)}, ["weight is torch.int32", "bfloat16, float16 or float32"]),
]


@pytest.mark.parametrize(
    ("form", "changes", "words"),
    [
        *(("with residual", *refusal) for refusal in EITHER_OPERATOR),
        *(("fused", *refusal) for refusal in EITHER_OPERATOR + FUSED_ONLY),
    ],
)
def test_refuses_arguments(form: str, changes: dict[str, Tensor], words: list[str]) -> None:
    case = make_case([[Entry(Kind.ADD, write=WRITES[0])]] * NUM_SLOTS, [0] * NUM_TOKENS, HIDDEN_SIZE)
    case = case._replace(**changes)
    before = case.clone()
    with pytest.raises(ValueError) as caught:
        case.run(steering_kernels, form)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert torch.equal(case.hidden, before.hidden)
    assert torch.equal(case.residual, before.residual)


@pytest.mark.parametrize("form", ["in place", "with residual", "fused"])
def test_takes_the_arguments_that_those_were_made_from(form: str) -> None:
    case = make_case([[Entry(Kind.ADD, write=WRITES[0])]] * NUM_SLOTS, [0] * NUM_TOKENS, HIDDEN_SIZE)
    before = case.clone()
    case.run(steering_kernels, form)
    assert not torch.equal(case.hidden, before.hidden)


def test_pack_refuses_too_many_entries() -> None:
    with pytest.raises(ValueError, match=r"slot 1 has 3 entries, the most is 2"):
        pack([[], [Entry(Kind.ADD, write=0)] * 3], max_ops=2)


def test_fields_of_an_entry_are_the_columns_of_the_table() -> None:
    fields = tuple(name.upper() for name in Entry._fields)
    assert fields == (*steering_kernels.Code.__members__, *steering_kernels.Param.__members__)
