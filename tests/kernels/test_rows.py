"""What the operators must leave as it is, bit for bit, and what may lie in the tables without an effect."""

from types import ModuleType

import pytest
import torch
from cases import FORMS, READS, SMALL, WRITES, Case, bits, make_case
from oracle import TOLERANCES, check
from torch import Tensor

from steering_kernels import Code, Flag, Kind, Param
from steering_kernels.entry import Entry

R, R2, W, W2 = READS[0], READS[1], WRITES[0], WRITES[1]
EVERY_KIND = [
    Entry(Kind.ADD, write=W),
    Entry(Kind.ADD_RELATIVE, write=W, scale=0.1),
    Entry(Kind.PROJECT, R, R, flags=Flag.KEEP_NORM),
    Entry(Kind.CLAMP, R, R, a=5.0, b=6.0),
    Entry(Kind.GATED_ADD, R, W, b=1.0),
    Entry(Kind.FEATURE, R, W, flags=Flag.IDENTITY, c=2.0),
    Entry(Kind.ROTATE, R, R, R2, R2, a=1.0),
    Entry(Kind.AFFINE, SMALL[0], SMALL[1]),
]
NAN = float("nan")
each_form = pytest.mark.parametrize("form", FORMS)
each_dtype = pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)


def put_odd_values(rows: Tensor) -> None:
    """Zeros of both signs, infinities, subnormals and NaN of unusual payload and sign, in the first columns."""
    patterns = {
        torch.bfloat16: [0x8000, 0x0000, 0x7F80, 0xFF80, 0x0001, 0x7FC1, 0xFFD5, 0x7F81],
        torch.float16: [0x8000, 0x0000, 0x7C00, 0xFC00, 0x0001, 0x7E01, 0xFE55, 0x7C01],
        torch.float32: [0x80000000, 0, 0x7F800000, 0xFF800000, 1, 0x7FC00001, 0xFFD55555, 0x7F800001],
    }[rows.dtype]
    size = 8 * rows.element_size()
    signed = [pattern - 2**size if pattern >= 2 ** (size - 1) else pattern for pattern in patterns]
    bits(rows)[:, : len(signed)] = torch.tensor(signed, dtype=bits(rows).dtype)


def assert_same_bits(one: Case, other: Case, names: str) -> None:
    for name in names.split():
        assert torch.equal(bits(getattr(one, name)), bits(getattr(other, name))), f"{name} differs"


@pytest.mark.parametrize("form", FORMS[:2])
@each_dtype
def test_rows_that_no_entry_changes_stay_bit_identical(form: str, dtype: torch.dtype, each_backend: ModuleType) -> None:
    condition = Entry(Kind.CONDITION, R, gate_out=1, b=1.0)
    slots = [
        EVERY_KIND,
        [],
        [entry._replace(scale=0.0) for entry in EVERY_KIND],
        [entry._replace(gate=0) for entry in EVERY_KIND],
        [condition],
        [condition, Entry(Kind.ADD, write=W, scale=0.0)],
    ]
    case = make_case(slots, [-1, 0, 1, 2, -1, 3, 0, 4, 5, 0], dtype=dtype)
    unchanged, steered = [0, 2, 3, 4, 5, 7, 8, 9], [1, 6]
    for token in unchanged:
        put_odd_values(case.hidden[token : token + 1])
    case.gates[:, 0] = 0.0
    case.strengths[[0, 4]] = NAN
    case.strengths[9] = 0.0
    before = case.clone()
    case.run(each_backend, form)
    assert torch.equal(bits(case.hidden[unchanged]), bits(before.hidden[unchanged]))
    assert (case.hidden[steered] != before.hidden[steered]).any(1).all()
    assert_same_bits(case, before, "residual weight pool codes params slot_ids strengths")


@each_dtype
@pytest.mark.parametrize("off", ["slot", "strength", "scale", "gate"])
def test_fused_without_effect_equals_no_steering(off: str, dtype: torch.dtype, each_backend: ModuleType) -> None:
    """Residual add and norm do not depend, in any bit, on why a token is unsteered."""
    case = make_case([EVERY_KIND], [0] * 5, dtype=dtype)
    plain = case.clone()
    plain.slot_ids.fill_(-1)
    if off == "slot":
        case.codes[0, 0, Code.KIND] = Kind.END
    elif off == "strength":
        case.strengths.zero_()
    elif off == "scale":
        case.params[..., Param.SCALE] = 0.0
    else:
        case.codes[..., Code.GATE] = 2
        case.gates[:, 2] = 0.0
    for each in (case, plain):
        each.run(each_backend, "fused")
    assert_same_bits(case, plain, "hidden residual")


@each_form
def test_unused_fields_do_not_matter(form: str, each_backend: ModuleType) -> None:
    """NaN in parameters, strengths and gates that nothing reads, and leftovers behind the end of a list."""
    condition = Entry(Kind.CONDITION, R, gate_out=6, b=1.0)
    case = make_case([EVERY_KIND[2:6], [condition, *EVERY_KIND[:2]], EVERY_KIND[6:]], [0, 1, -1, 2, 0, 1, 2])
    case.slot_ids[-3:] = -1
    dirty = case.clone()
    used = {
        Kind.CLAMP: [Param.A, Param.B],
        Kind.GATED_ADD: [Param.A, Param.B],
        Kind.CONDITION: [Param.A, Param.B],
        Kind.FEATURE: [Param.A, Param.C],
        Kind.ROTATE: [Param.A],
    }
    for slot, op in torch.cartesian_prod(*map(torch.arange, dirty.params.shape[:2])).tolist():
        kind = Kind(int(dirty.codes[slot, op, Code.KIND]))
        kept = {*used.get(kind, []), *([] if kind in (Kind.END, Kind.CONDITION) else [Param.SCALE])}
        for param in set(Param) - kept:
            dirty.params[slot, op, param] = NAN
    for slot in range(3):
        end = (dirty.codes[slot, :, Code.KIND] == Kind.END).nonzero()[0, 0] + 1
        dirty.codes[slot, end:] = torch.tensor([Kind.ADD, R, W, R2, W2, 0, 0, 0])
    dirty.strengths[2] = NAN
    dirty.gates[:] = NAN
    for each in (case, dirty):
        each.run(each_backend, form)
    assert_same_bits(case, dirty, "hidden residual")
    assert torch.equal(case.gates[[1, 5], 6], dirty.gates[[1, 5], 6])


@each_form
def test_only_a_condition_of_its_own_writes_a_token_s_gates(form: str, each_backend: ModuleType) -> None:
    """Not one of slot 0 those of a token without a slot, and not a leftover behind the end of a list."""
    condition = Entry(Kind.CONDITION, R, gate_out=3, b=1.0)
    case = make_case([[condition], [], [Entry(Kind.ADD, write=W), condition]], [-1, 0, 1, 2, -1])
    case.codes[2, 0, Code.KIND] = Kind.END
    before = case.clone()
    case.run(each_backend, form)
    assert (bits(case.gates) != bits(before.gates)).nonzero().tolist() == [[1, 3]]


@each_form
def test_nan_of_a_steered_row_stays_in_its_row(form: str, each_backend: ModuleType) -> None:
    case = make_case([EVERY_KIND], [0] * 5)
    alone = case.clone()
    case.hidden[2, 7] = NAN
    for each in (case, alone):
        each.run(each_backend, form)
    others = [0, 1, 3, 4]
    assert torch.equal(case.hidden[others], alone.hidden[others])
    assert case.hidden[2].isnan().all()


@each_form
@each_dtype
def test_rows_of_wider_buffers(form: str, dtype: torch.dtype, each_backend: ModuleType) -> None:
    """Rows may lie apart, and not all equally far; what lies between them is not touched."""
    case = make_case([EVERY_KIND], [0, -1, 0], dtype=dtype)

    def widened(rows: Tensor, by: int) -> Tensor:
        buffer = torch.full((rows.shape[0], rows.shape[1] + by), 7.0, dtype=dtype)
        buffer[:, : rows.shape[1]] = rows
        return buffer

    buffers = [widened(rows, by) for rows, by in ((case.hidden, 3), (case.residual, 8), (case.pool, 5))]
    hidden, residual, pool = (buffer[:, : case.hidden.shape[1]] for buffer in buffers)
    wide = case._replace(hidden=hidden, residual=residual, pool=pool)
    wide.run(each_backend, form)
    case.run(each_backend, form)
    for name in ("hidden", "residual"):
        assert torch.equal(getattr(wide, name), getattr(case, name))
    assert all((buffer[:, case.hidden.shape[1] :] == 7.0).all() for buffer in buffers)


@each_form
@pytest.mark.parametrize("pool_dtype", list(TOLERANCES), ids=str)
@each_dtype
def test_pool_of_another_dtype(
    form: str, dtype: torch.dtype, pool_dtype: torch.dtype, each_backend: ModuleType
) -> None:
    check(each_backend, make_case([EVERY_KIND], [0] * 4, dtype=dtype, pool_dtype=pool_dtype), form)


@each_form
def test_rounds_once(form: str, each_backend: ModuleType) -> None:
    """Four times 2^-9 is one step of bf16 above 1; rounded one by one, each would be lost."""
    case = make_case([[Entry(Kind.ADD, write=0)] * 4], [0], dtype=torch.bfloat16)
    case.hidden.fill_(1.0)
    case.residual.zero_()
    case.pool.fill_(2.0**-9)
    case.strengths.fill_(1.0)
    case.run(each_backend, form)
    steered = case.residual if form == "fused" else case.hidden
    assert (steered == 1 + 2.0**-7).all()
